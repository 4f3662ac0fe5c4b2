"""What one run or several seeds say about each claim: change, interval, p value, verdict. No row is ever left out.

A seed fixes data, models and sampling, so the two values of a claim are compared inside each seed. One seed is compared
prompt by prompt (paired bootstrap and permutation test): this says what holds for these weights. Several seeds are
compared by Student's t over seeds: this says what holds for the recipe. A verdict needs its interval, and its p value
by Holm over all claims of the table, to exclude 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from macpo.engine.errors import DataError
from macpo.evaluation.prompt_scores import OF_PAIRS, Policy, PromptScores, ScoredRun
from macpo.evaluation.summary import (
    LABELS,
    MEAN_TEACHER,
    Agents,
    first_and_last,
    headline_metric,
    of_role,
    weak_supervisors,
)
from macpo.evaluation.uncertainty import (
    LEVEL,
    Clusters,
    Estimate,
    Floats,
    at_equal_length,
    hierarchical,
    holm,
    length_columns,
    paired_differences,
    t_interval,
)

Verdict: TypeAlias = Literal["holds", "inconclusive", "contradicted"]
HOLDS: Verdict = "holds"
INCONCLUSIVE: Verdict = "inconclusive"
CONTRADICTED: Verdict = "contradicted"
LEAST_SEEDS = 3
"""For the hierarchical bootstrap: two seeds have three draws that differ."""


@dataclass(frozen=True)
class Claim:
    """One claim, "`better` is above `worse`", with the values of both by seed."""

    kind: str
    """teacher | naive | mean-teacher | best-teacher | baseline | ablation."""
    better: str
    worse: str
    seeds: tuple[int, ...]
    better_values: tuple[float, ...]
    worse_values: tuple[float, ...]
    estimate: Estimate | None = None
    """The mean change with interval and p value: over seeds where there are several, else over prompts."""
    over: Literal["seeds", "prompts"] = "seeds"
    adjusted_p: float | None = None
    """The p value by Holm over the claims of the table."""
    over_both: Estimate | None = None
    """The mean change over seeds and prompts by hierarchical bootstrap; decides nothing."""
    equal_length: Estimate | None = None
    """The change at equal length of the responses, for metrics of responses; decides nothing."""

    @property
    def changes(self) -> tuple[float, ...]:
        return tuple(b - w for b, w in zip(self.better_values, self.worse_values, strict=True))

    @property
    def mean(self) -> float:
        return sum(self.changes) / len(self.changes)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval that decides; None where nothing was measured that could give one."""
        return (self.estimate.low, self.estimate.high) if self.estimate else None

    @property
    def verdict(self) -> Verdict:
        """`holds` or `contradicted` where interval and adjusted p value say so together, else `inconclusive`."""
        sign = self.estimate.sign if self.estimate else 0
        if sign == 0 or self.adjusted_p is None or self.adjusted_p > 1 - LEVEL:
            return INCONCLUSIVE
        return HOLDS if sign > 0 else CONTRADICTED

    def to_json(self) -> dict[str, Any]:
        estimates = {"over_seeds_and_prompts": self.over_both, "at_equal_length": self.equal_length}
        return {
            **{name: getattr(self, name) for name in ("kind", "better", "worse", "seeds")},
            "better_values": self.better_values,
            "worse_values": self.worse_values,
            "changes": self.changes,
            "mean": self.mean,
            "interval": self.interval,
            "interval_over": self.over,
            "p": self.estimate.p if self.estimate else None,
            "adjusted_p": self.adjusted_p,
            **{name: each and [each.value, each.low, each.high] for name, each in estimates.items()},
            "verdict": self.verdict,
        }


def claims(runs: Sequence[ScoredRun]) -> list[Claim]:
    """Return every claim that the runs allow, one run per seed.

    In this order: each teacher's last iteration against its start; the final student against the naive weak-label
    student (its iteration 0), the mean initial teacher, the best one on development prompts where there are any, and
    every baseline agent; and against the final student of every ablation arm. A claim that only some seeds can answer
    has only those seeds.

    Raises DataError without runs, for a seed given twice, or when the runs share no metric.
    """
    if not runs:
        raise DataError("no run to compare", "run at least one seed to the end")
    seeds = [run.summary["seed"] for run in runs]
    if len(set(seeds)) != len(seeds):
        raise DataError(f"a seed appears twice among {seeds}", "give every run a seed of its own")
    metric = shared_metric([run.summary for run in runs])
    found: dict[tuple[str, str, str], list[tuple[ScoredRun, _Statement]]] = {}
    for run in runs:
        for statement in _statements(run.summary, metric):
            found.setdefault(statement.key, []).append((run, statement))
    order = {"teacher": 0, "naive": 1, "mean-teacher": 2, "best-teacher": 3, "baseline": 4, "ablation": 5}
    rows = sorted(found.values(), key=lambda stated: order[stated[0][1].key[0]])
    table = [_claim(stated) for stated in rows]
    decided = _over_prompts(table, rows)
    adjusted = iter(holm([claim.estimate.p for claim in decided if claim.estimate and claim.estimate.p is not None]))
    return [
        replace(claim, adjusted_p=next(adjusted)) if claim.estimate and claim.estimate.p is not None else claim
        for claim in decided
    ]


def shared_metric(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Return the headline metric that all runs share. Raises DataError when they differ or have none."""
    metrics = {headline_metric(summary) for summary in summaries}
    metric = metrics.pop()
    if metrics or metric is None:
        raise DataError("the runs do not share one metric", "compare runs of one recipe that were all evaluated")
    return metric


@dataclass(frozen=True)
class _Statement:
    """A claim in one run: names, values, and the policies whose mean each value is."""

    key: tuple[str, str, str]
    values: tuple[float, float]
    better: tuple[Policy, ...]
    worse: tuple[Policy, ...]

    def differences(self, scores: PromptScores, words: bool = False) -> Floats:
        """Better minus worse [n] by row; NaN where a policy has no score."""
        read = scores.words if words else scores.columns
        found: Floats = read(self.better).mean(1) - read(self.worse).mean(1)
        return found


_Stated: TypeAlias = Sequence[tuple[ScoredRun, _Statement]]
"""One claim's statement in every run that can answer it."""


def _statements(summary: Mapping[str, Any], metric: str) -> list[_Statement]:
    agents: Agents = summary["agents"]
    rows: list[_Statement] = []

    def state(kind: str, better: str, worse: str, *sides: tuple[float, tuple[Policy, ...]]) -> None:
        (high, one), (low, other) = sides
        rows.append(_Statement((kind, better, worse), (high, low), one, other))

    for name, agent in of_role(agents, "teacher").items():
        ends = _ends(agent, metric, name)
        if ends and len(agent["scores"]) > 1:  # a ready teacher that does not train has no change to claim
            state("teacher", f"final {name}", f"initial {name}", ends[1], ends[0])
    for name, agent in of_role(agents, "student").items():
        ends = _ends(agent, metric, name)
        if ends is None:
            continue
        final = f"final {name}"
        if len(agent["scores"]) > 1:
            state("naive", final, f"naive weak-label {name}", ends[1], ends[0])
        for weak in weak_supervisors(summary, metric):
            kind = "mean-teacher" if weak.name == MEAN_TEACHER else "best-teacher"
            policies = tuple(Policy("", teacher, iteration) for teacher, iteration in weak.teachers)
            state(kind, final, weak.name, ends[1], (weak.value, policies))
        for other, baseline in of_role(agents, "baseline").items():
            theirs = _ends(baseline, metric, other)
            if theirs:
                state("baseline", final, f"baseline {other}", ends[1], theirs[1])
        for arm, members in summary.get("arms", {}).items():
            theirs = _ends(members[name], metric, name, arm) if name in members else None
            if theirs:
                state("ablation", final, f"ablation {arm}", ends[1], theirs[1])
    return rows


def _ends(
    agent: Mapping[str, Any], metric: str, name: str, arm: str = ""
) -> tuple[tuple[float, tuple[Policy, ...]], tuple[float, tuple[Policy, ...]]] | None:
    """An agent's value and policy at its first and at its last iteration that has a value."""
    ends = first_and_last(agent, metric)
    if ends is None:
        return None
    having = [row["iteration"] for row in agent["scores"] if row.get(metric) is not None]
    return (ends[0], (Policy(arm, name, having[0]),)), (ends[1], (Policy(arm, name, having[-1]),))


def _claim(stated: _Stated) -> Claim:
    """The claim of the runs that can answer it, with what several seeds say of it."""
    seeds = tuple(run.summary["seed"] for run, _ in stated)
    better, worse = zip(*(statement.values for _, statement in stated), strict=True)
    claim = Claim(*stated[0][1].key, seeds, better, worse)
    return replace(claim, estimate=t_interval(claim.changes))


@dataclass(frozen=True)
class _Group:
    """Claims whose policies have scores of the same prompts in the same runs; they share the draws."""

    scores: tuple[PromptScores, ...]
    """By seed."""
    kept: tuple[NDArray[np.bool_], ...]
    """By seed, which rows have scores."""
    members: list[int] = field(default_factory=list)
    """Places of the claims in the table."""

    def clusters(self, seed: int, columns: Floats) -> Clusters:
        """Columns [n, k] of one seed, added up by cluster."""
        clusters, kept = self.scores[seed].clusters, self.kept[seed]
        return Clusters.of(columns[kept], [clusters[row] for row in np.flatnonzero(kept).tolist()])


def _groups(rows: Sequence[_Stated]) -> list[_Group]:
    for run, statement in (each for stated in rows for each in stated):
        if run.scores is not None:
            run.scores.read((*statement.better, *statement.worse))
    found: dict[tuple[tuple[int, bytes], ...], _Group] = {}
    for index, stated in enumerate(rows):
        scores = [run.scores for run, _ in stated if run.scores is not None]
        if len(scores) < len(stated):
            continue
        kept = [np.isfinite(each.differences(own)) for (_, each), own in zip(stated, scores, strict=True)]
        if all(each.any() for each in kept):
            key = tuple((id(own), each.tobytes()) for own, each in zip(scores, kept, strict=True))
            found.setdefault(key, _Group(tuple(scores), tuple(kept))).members.append(index)
    return list(found.values())


def _over_prompts(table: Sequence[Claim], rows: Sequence[_Stated]) -> list[Claim]:
    """Add what scores by prompt say: one seed's interval, that over seeds and prompts, the change at equal length."""
    found = list(table)
    for group in _groups(rows):
        num_seeds = len(group.scores)
        if num_seeds == 1:
            columns = [rows[index][0][1].differences(group.scores[0]) for index in group.members]
            estimates = paired_differences(group.clusters(0, np.stack(columns, 1))) or []
            for index, estimate in zip(group.members, estimates, strict=False):
                found[index] = replace(found[index], estimate=estimate, over="prompts")
        of_responses = group.scores[0].metric not in OF_PAIRS
        if num_seeds < LEAST_SEEDS and not of_responses:
            continue
        parts = [_length_parts(rows[index], group) for index in group.members]
        blocks = [np.concatenate([columns[seed] for columns, _ in parts], 1) for seed in range(num_seeds)]
        both = hierarchical([group.clusters(seed, block) for seed, block in enumerate(blocks)], _plain_and_equal)
        for place, (index, (_, varies)) in enumerate(zip(group.members, parts, strict=True)):
            plain, equal = both[2 * place : 2 * place + 2]
            found[index] = replace(
                found[index],
                over_both=plain if num_seeds >= LEAST_SEEDS else None,
                equal_length=equal if of_responses and varies else None,
            )
    return found


def _length_parts(stated: _Stated, group: _Group) -> tuple[list[Floats], bool]:
    """A claim's columns [n, 4] of `length_columns` by seed, and whether any length differs."""
    words = [each.differences(own, words=True) for (_, each), own in zip(stated, group.scores, strict=True)]
    deviation = float(np.std(np.concatenate([each[kept] for each, kept in zip(words, group.kept, strict=True)])))
    scores = [each.differences(own) for (_, each), own in zip(stated, group.scores, strict=True)]
    return [length_columns(*pair, deviation) for pair in zip(scores, words, strict=True)], deviation > 0


def _plain_and_equal(means: Floats) -> Floats:
    """From means [b, 4 m] of m claims to their mean changes and changes at equal length [b, 2 m], in turn."""
    by_claim = means.reshape(*means.shape[:-1], -1, 4)
    return np.concatenate([by_claim[..., :1], at_equal_length(by_claim)], -1).reshape(*means.shape[:-1], -1)


def claims_json(found: Sequence[Claim], summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the content of `claims.json`."""
    return {
        "metric": shared_metric(summaries),
        "seeds": [summary["seed"] for summary in summaries],
        "level": LEVEL,
        "adjustment": "holm",
        "claims": [claim.to_json() for claim in found],
    }


def claims_table(found: Sequence[Claim], metric: str) -> str:
    """Format the claims as plain text, one per line."""
    head = ["claim", "from", "to", "change", "95% interval", "over", "Holm p", "seeds up", "verdict"]
    rows = [head]
    for claim in found:
        count = len(claim.changes)
        interval = claim.interval
        rows.append(
            [
                f"{claim.better} > {claim.worse}",
                f"{sum(claim.worse_values) / count:.3f}",
                f"{sum(claim.better_values) / count:.3f}",
                f"{claim.mean:+.3f}",
                f"[{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else "none",
                claim.over if interval else "one seed",
                "none" if claim.adjusted_p is None else f"{claim.adjusted_p:.3f}",
                f"{sum(change > 0 for change in claim.changes)}/{count}",
                claim.verdict,
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    seeds = sorted({seed for claim in found for seed in claim.seeds})
    title = f"{LABELS.get(metric, metric)}, mean over seeds {', '.join(map(str, seeds))}"
    return "\n".join([title, lines[0], "-" * len(lines[0]), *lines[1:]])
