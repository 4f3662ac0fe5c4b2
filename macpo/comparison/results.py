"""How the arms of a comparison fare: scores, differences from the naive student and gap recovered, with intervals.

One seed is judged prompt by prompt, which speaks of its trained weights; several seeds by Student's t over seeds, which
speaks of the methods. What decides is the interval together with the p value by Holm over all rows of the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from macpo.comparison.ledger import Ledger
from macpo.engine.errors import DataError
from macpo.evaluation.claims import shared_metric
from macpo.evaluation.prompt_scores import OF_PAIRS, Policy, PromptScores, ScoredRun
from macpo.evaluation.summary import first_and_last, of_role, weak_supervisors
from macpo.evaluation.uncertainty import (
    LEVEL,
    Clusters,
    Estimate,
    Floats,
    at_equal_length,
    gap_recovered,
    hierarchical,
    holm,
    length_columns,
    paired_differences,
    t_interval,
    the_means,
)

Kind: TypeAlias = Literal["method", "bound", "teachers", "ablation"]
Verdict: TypeAlias = Literal["above", "below", "open"]
_Part: TypeAlias = tuple[Floats, Floats, list[Any]]  # of one seed: scores [n, k], words [n, k], clusters [n]


@dataclass(frozen=True, slots=True)
class Row:
    """One arm's last student, or a bound; of an arm that was left out only name, kind and why."""

    name: str
    kind: Kind
    score: Estimate | None = None
    """The mean over prompts and seeds."""
    change: Estimate | None = None
    """Its difference from the naive student, on the same prompts; of an ablation, the method's from it."""
    adjusted_p: float | None = None
    recovered: Estimate | None = None
    """The share of the gap between weak teachers and ceiling (PGR); None where that is not defined."""
    words: float | None = None
    equal_length: Estimate | None = None
    """The change at equal length of the responses."""
    by_iteration: tuple[tuple[int, float], ...] = ()
    ledger: Ledger | None = None
    left_out: str = ""

    @property
    def verdict(self) -> Verdict:
        """Whether the row is above or below what it is compared with; `open` where nothing shows it."""
        sign = 0 if self.change is None else self.change.sign
        if sign == 0 or self.adjusted_p is None or self.adjusted_p > 1 - LEVEL:
            return "open"
        return "above" if sign > 0 else "below"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


@dataclass(frozen=True, slots=True)
class Results:
    """A comparison's table: methods and bounds first, then the curve of teachers and the ablations."""

    metric: str
    seeds: tuple[int, ...]
    num_prompts: int
    gap: Estimate | None
    """Ceiling minus the mean weak teacher; None without a ceiling."""
    rows: tuple[Row, ...]
    curve: tuple[tuple[int, int, Estimate], ...]
    """(number of teachers, arms that have so many, their mean score)."""

    def of(self, *kinds: Kind) -> list[Row]:
        return [row for row in self.rows if row.kind in kinds]

    def to_json(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "seeds": self.seeds,
            "level": LEVEL,
            "adjustment": "holm",
            "prompts": self.num_prompts,
            "gap": self.gap and asdict(self.gap),
            "rows": [row.to_json() for row in self.rows],
            "teachers": [{"count": k, "arms": n, "score": asdict(score)} for k, n, score in self.curve],
        }


@dataclass(frozen=True, slots=True)
class _Column:
    """What a row is measured by: the mean of some policies' scores."""

    name: str
    kind: Kind
    policies: tuple[Policy, ...]


def results(
    runs: Sequence[ScoredRun],
    kinds: Mapping[str, Kind],
    *,
    teachers: Mapping[str, int],
    ledgers: Mapping[str, Ledger],
    left_out: Mapping[str, str],
) -> Results:
    """Compare the arms of runs that differ in their seed alone.

    Args:
        kinds: what each arm is; the recipe's own has the name "".
        teachers: number of teachers of the method and of the arms of the kind `teachers`, by name.
        ledgers: by arm, `ceiling` for the bound.
        left_out: methods that could not run, and why.

    Raises:
        DataError: the runs share no metric, or no prompt that every policy answered.
    """
    metric = shared_metric([run.summary for run in runs])
    columns = _columns(runs[0].summary, metric, kinds)
    parts = [_kept(run.scores, columns) for run in runs]
    tables = [Clusters.of(values, clusters) for values, _, clusters in parts]
    place = {column.name: index for index, column in enumerate(columns)}
    naive, method = place[NAIVE], place.get(METHOD, place[NAIVE])
    scores = hierarchical(tables, the_means)
    sides = [(method, i) if column.kind == "ablation" else (i, naive) for i, column in enumerate(columns)]
    compared = [i for i, column in enumerate(columns) if sides[i][0] != sides[i][1] and column.name != WEAK]
    changes = dict(zip(compared, _changes(parts, [sides[i] for i in compared]), strict=True))
    decided = [i for i in compared if changes[i] is not None]
    adjusted = dict(zip(decided, holm([_p(changes[i]) for i in decided]), strict=True))
    equal: dict[int, Estimate | None] = {}
    if metric not in OF_PAIRS:  # which look at no generated response
        equal = dict(zip(compared, _at_equal_length(parts, [sides[i] for i in compared]), strict=True))
    gap, recovered = _recovered(tables, columns, place)
    words = np.mean([lengths.mean(0) for _, lengths, _ in parts], 0)
    rows = [
        Row(
            column.name,
            column.kind,
            scores[i],
            changes.get(i),
            adjusted.get(i),
            recovered.get(column.name),
            None if column.name == WEAK else float(words[i]),
            equal.get(i),
            _by_iteration(runs, column, metric),
            ledgers.get(_arm(column)),
        )
        for i, column in enumerate(columns)
    ]
    rows += [Row(name, "method", left_out=why) for name, why in left_out.items()]
    order: tuple[Kind, ...] = ("method", "bound", "teachers", "ablation")
    rows.sort(key=lambda row: order.index(row.kind))
    seeds = tuple(run.summary["seed"] for run in runs)
    curve = _curve(tables, columns, teachers)
    return Results(metric, seeds, sum(len(part[0]) for part in parts), gap, tuple(rows), curve)


NAIVE, METHOD, WEAK, CEILING = "naive-sft", "macpo", "mean initial teacher", "ceiling"


def _arm(column: _Column) -> str:
    """Whose ledger a row shows; there is none of the teachers' name."""
    return column.name if column.name in (NAIVE, CEILING, WEAK) else column.policies[0].arm


def _columns(summary: Mapping[str, Any], metric: str, kinds: Mapping[str, Kind]) -> list[_Column]:
    """What is compared: the method's last student, the naive one, every arm's last student, and both bounds."""
    (student, history), *_ = of_role(summary["agents"], "student").items()
    first, last = _ends(history, metric)
    found = [_Column(NAIVE, "method", (Policy("", student, first),))]
    if last != first:
        found.append(_Column(METHOD, "method", (Policy("", student, last),)))
    for arm, members in summary.get("arms", {}).items():
        if arm != NAIVE and student in members:
            policy = Policy(arm, student, _ends(members[student], metric)[1])
            found.append(_Column(arm, kinds.get(arm, "ablation"), (policy,)))
    for weak in weak_supervisors(summary, metric)[:1]:
        found.append(_Column(WEAK, "bound", tuple(Policy("", name, i) for name, i in weak.teachers)))
    for name, agent in of_role(summary["agents"], "ceiling").items():
        if first_and_last(agent, metric) is not None:
            found.append(_Column(CEILING, "bound", (Policy("", name, 0),)))
    return found


def _ends(agent: Mapping[str, Any], metric: str) -> tuple[int, int]:
    having = [row["iteration"] for row in agent["scores"] if row.get(metric) is not None]
    if not having:
        raise DataError(f"a student has no {metric}", "evaluate every run to its end")
    return having[0], having[-1]


def _values(read: Any, columns: Sequence[_Column]) -> Floats:
    """Means [n, k] over each column's policies."""
    return np.stack([read(column.policies).mean(1) for column in columns], 1)


def _kept(scores: PromptScores | None, columns: Sequence[_Column]) -> _Part:
    """Scores and words [n, k] of the prompts that everybody has scores for, and their clusters."""
    if scores is None:
        raise DataError("a run has no scores by prompt", "evaluate every run to its end")
    scores.read([policy for column in columns for policy in column.policies])
    values = _values(scores.columns, columns)
    kept = np.isfinite(values).all(1)
    if not kept.any():
        raise DataError("no prompt has a score of every arm", "evaluate every arm on the same prompts")
    words = _values(scores.words, columns)
    return values[kept], words[kept], [scores.clusters[row] for row in np.flatnonzero(kept).tolist()]


def _changes(parts: Sequence[_Part], sides: Sequence[tuple[int, int]]) -> list[Estimate | None]:
    """The difference of each pair of columns: over prompts for one seed, else over seeds."""
    by_seed = [np.stack([values[:, one] - values[:, other] for one, other in sides], 1) for values, _, _ in parts]
    if len(parts) == 1:
        found = paired_differences(Clusters.of(by_seed[0], parts[0][2]))
        return list(found) if found else [None] * len(sides)
    means = np.stack([differences.mean(0) for differences in by_seed])
    return [t_interval(list(map(float, column))) for column in means.T]


def _p(estimate: Estimate | None) -> float:
    return 1.0 if estimate is None or estimate.p is None else estimate.p


def _at_equal_length(parts: Sequence[_Part], sides: Sequence[tuple[int, int]]) -> list[Estimate | None]:
    """The difference of each pair of columns where responses are equally long; None where no length differs."""
    blocks: list[list[Floats]] = [[] for _ in parts]
    varies = []
    for one, other in sides:
        deviation = float(np.std(np.concatenate([words[:, one] - words[:, other] for _, words, _ in parts])))
        varies.append(deviation > 0)
        for block, (values, words, _) in zip(blocks, parts, strict=True):
            score, length = values[:, one] - values[:, other], words[:, one] - words[:, other]
            block.append(length_columns(score, length, deviation))
    tables = [Clusters.of(np.concatenate(b, 1), clusters) for b, (*_, clusters) in zip(blocks, parts, strict=True)]

    def intercepts(means: Floats) -> Floats:
        return at_equal_length(means.reshape(*means.shape[:-1], -1, 4))[..., 0]

    found = hierarchical(tables, intercepts)
    return [each if has else None for each, has in zip(found, varies, strict=True)]


def _recovered(
    tables: Sequence[Clusters], columns: Sequence[_Column], place: Mapping[str, int]
) -> tuple[Estimate | None, dict[str, Estimate]]:
    if WEAK not in place or CEILING not in place:
        return None, {}
    students = [i for i, column in enumerate(columns) if column.kind != "bound"]
    order = [place[WEAK], place[CEILING], *students]
    found = gap_recovered([replace(table, sums=table.sums[:, order]) for table in tables])
    shares = {} if found.recovered is None else dict(zip(students, found.recovered, strict=True))
    return found.gap, {columns[i].name: share for i, share in shares.items()}


def _by_iteration(runs: Sequence[ScoredRun], column: _Column, metric: str) -> tuple[tuple[int, float], ...]:
    """The mean over seeds of an arm's student, by iteration."""
    if column.kind == "bound":
        return ()
    (policy,) = column.policies
    lists: dict[int, list[float]] = {}
    for run in runs:
        agents = run.summary["arms"][policy.arm] if policy.arm else run.summary["agents"]
        for row in agents[policy.agent]["scores"]:
            if row.get(metric) is not None and row["iteration"] <= policy.iteration:
                lists.setdefault(row["iteration"], []).append(row[metric])
    return tuple((t, float(np.mean(values))) for t, values in sorted(lists.items()))


def _curve(
    tables: Sequence[Clusters], columns: Sequence[_Column], teachers: Mapping[str, int]
) -> tuple[tuple[int, int, Estimate], ...]:
    """The mean score of the arms with each number of teachers, the method's own with all of them."""
    groups: dict[int, list[int]] = {}
    for i, column in enumerate(columns):
        count = teachers.get(column.name)
        if count is not None:
            groups.setdefault(count, []).append(i)
    if len(groups) < 2:
        return ()
    counts = sorted(groups)

    def mean_of_each(means: Floats) -> Floats:
        return np.stack([means[:, groups[count]].mean(1) for count in counts], 1)

    found = hierarchical(tables, mean_of_each)
    return tuple((count, len(groups[count]), each) for count, each in zip(counts, found, strict=True))
