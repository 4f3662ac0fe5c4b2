"""How much of the gap between weak teachers and ceiling the student recovers (PGR), of one run or of several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from macpo.evaluation.prompt_scores import Policy, PromptScores, ScoredRun
from macpo.evaluation.summary import MEAN_TEACHER, Weak, first_and_last, headline_metric, of_role, weak_supervisors
from macpo.evaluation.uncertainty import Clusters, gap_recovered


def pgr(weak: float, student: float, ceiling: float) -> float | None:
    """Return the performance gap recovered, (student - weak) / (ceiling - weak) (arXiv 2312.09390, section 3).

    1 is the ceiling, 0 no gain over the weak supervisor, below 0 a loss. None when the ceiling is not above the weak
    supervisor: there is no gap to recover.
    """
    return (student - weak) / (ceiling - weak) if ceiling > weak else None


def gaps_recovered(runs: Sequence[ScoredRun]) -> list[dict[str, Any]]:
    """Return the student's PGR by iteration for each `weak`: the mean initial teacher first, which is the headline.

    Each entry has `metric`, `weak_agent`, `weak`, `ceiling`, `gap` ([low, high] of ceiling - weak) and `student`, rows
    of {"iteration", "value", "low", "high"}. Several runs are seeds: values are ratios of means over them. Where all
    runs have scores by prompt there are intervals, and `value` is None if that of the gap covers 0; else `gap`, `low`
    and `high` are None. Empty without teachers, student or ceiling, or where the runs differ in these.
    """
    metrics = {headline_metric(run.summary) for run in runs}
    metric = metrics.pop() if len(metrics) == 1 else None
    if metric is None:
        return []
    ends = [_ends(run.summary, metric) for run in runs]
    if any(end is None for end in ends):
        return []
    found = []
    choices = [weak_supervisors(run.summary, metric) for run in runs]
    for weaks in zip(*choices, strict=False):
        sides = [(weak, *end) for weak, end in zip(weaks, ends, strict=True) if end is not None]
        entry = _entry(runs, metric, sides)
        if entry is not None:
            found.append(entry)
    return found


_Sides = tuple[Weak, tuple[str, float], tuple[str, dict[int, float]]]


def _ends(summary: Mapping[str, Any], metric: str) -> tuple[tuple[str, float], tuple[str, dict[int, float]]] | None:
    """Name and value of the ceiling, and of the student by iteration."""
    tops = list(of_role(summary["agents"], "ceiling").items())
    students = list(of_role(summary["agents"], "student").items())
    top = first_and_last(tops[0][1], metric) if tops else None
    if top is None or not students:
        return None
    values = {row["iteration"]: row[metric] for row in students[0][1]["scores"] if row.get(metric) is not None}
    return (tops[0][0], top[1]), (students[0][0], values)


def _entry(runs: Sequence[ScoredRun], metric: str, sides: Sequence[_Sides]) -> dict[str, Any] | None:
    iterations = sorted(set.intersection(*(set(student[1]) for *_, student in sides)))
    if not iterations:
        return None
    weak, ceiling = (float(np.mean(values)) for values in zip(*((w.value, c[1]) for w, c, _ in sides), strict=True))
    tables = [run.scores and _table(run.scores, side, iterations) for run, side in zip(runs, sides, strict=True)]
    measured = gap_recovered([table for table in tables if table]) if all(tables) else None
    rows: list[dict[str, Any]] = []
    for place, iteration in enumerate(iterations):
        value, low, high = None, None, None
        if measured is None:
            value = pgr(weak, float(np.mean([student[1][iteration] for *_, student in sides])), ceiling)
        elif measured.recovered is not None:
            found = measured.recovered[place]
            value, low, high = found.value, found.low, found.high
        rows.append({"iteration": iteration, "value": value, "low": low, "high": high})
    return {
        "metric": metric,
        "weak_agent": _named([weak for weak, *_ in sides]),
        "weak": weak,
        "ceiling": ceiling,
        "gap": [measured.gap.low, measured.gap.high] if measured else None,
        "student": rows,
    }


def _named(weaks: Sequence[Weak]) -> str:
    """The name of the weak supervisor; of a chosen teacher also which it is, or by seed was."""
    name = weaks[0].name
    if name == MEAN_TEACHER:
        return name
    return f"{name} ({', '.join(dict.fromkeys(weak.teachers[0][0] for weak in weaks))})"


def _table(scores: PromptScores, sides: _Sides, iterations: Sequence[int]) -> Clusters | None:
    """Columns (weak, ceiling, student by iteration) over the prompts that all of them answered; None without one."""
    weak, (ceiling, _), (student, _) = sides
    teachers = [Policy("", name, iteration) for name, iteration in weak.teachers]
    others = [Policy("", ceiling, 0), *(Policy("", student, iteration) for iteration in iterations)]
    values = scores.columns([*teachers, *others])
    columns = np.column_stack([values[:, : len(teachers)].mean(1), values[:, len(teachers) :]])
    kept = np.isfinite(columns).all(1)
    clusters = [cluster for cluster, has in zip(scores.clusters, kept, strict=True) if has]
    return Clusters.of(columns[kept], clusters) if kept.any() else None
