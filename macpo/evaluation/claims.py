"""What several seeds say about each claim: mean paired change, 95% interval, verdict. No row is ever left out.

A seed fixes data, models and sampling, so the two values of a claim are compared inside each seed (paired) and the
interval is over seeds. The intervals are not corrected for the number of claims.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from macpo.engine.errors import DataError
from macpo.evaluation.intervals import t_interval
from macpo.evaluation.summary import Agents, best_initial_teacher, first_and_last, headline_metric, label_of, of_role

HOLDS, MEAN_ONLY, FAILS = "holds", "mean only", "does not hold"


@dataclass(frozen=True)
class Claim:
    """One claim, "`better` is above `worse`", with the values of both by seed."""

    kind: str
    """teacher | naive | best-teacher | baseline | ablation."""
    better: str
    worse: str
    seeds: tuple[int, ...]
    better_values: tuple[float, ...]
    worse_values: tuple[float, ...]

    @property
    def changes(self) -> tuple[float, ...]:
        return tuple(b - w for b, w in zip(self.better_values, self.worse_values, strict=True))

    @property
    def mean(self) -> float:
        return sum(self.changes) / len(self.changes)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% t interval of the mean change; None for one seed."""
        found = t_interval(self.changes)
        return found[1:] if found else None

    @property
    def verdict(self) -> str:
        """`holds` if the whole interval is above 0, `mean only` if just the mean is, else `does not hold`."""
        if self.interval is not None and self.interval[0] > 0:
            return HOLDS
        return MEAN_ONLY if self.mean > 0 else FAILS

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "changes": self.changes,
            "mean": self.mean,
            "interval": self.interval,
            "verdict": self.verdict,
        }


def claims(summaries: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Return every claim that the runs allow, from their summaries, one per seed.

    In this order: each teacher's last iteration against its start; the final student against the naive weak-label
    student (its iteration 0), against the best initial teacher (of that seed) and against every baseline agent; and
    against the final student of every ablation arm. A claim that only some seeds can answer has only those seeds.

    Raises DataError without summaries, for a seed given twice, or when the runs share no metric.
    """
    if not summaries:
        raise DataError("no run to compare", "run at least one seed to the end")
    seeds = [summary["seed"] for summary in summaries]
    if len(set(seeds)) != len(seeds):
        raise DataError(f"a seed appears twice among {seeds}", "give every run a seed of its own")
    metric = shared_metric(summaries)
    found: dict[tuple[str, str, str], list[tuple[int, float, float]]] = {}
    for summary in summaries:
        for key, values in _statements(summary, metric):
            found.setdefault(key, []).append((summary["seed"], *values))
    order = {"teacher": 0, "naive": 1, "best-teacher": 2, "baseline": 3, "ablation": 4}
    rows = sorted(found.items(), key=lambda item: order[item[0][0]])
    return [Claim(*key, *(tuple(column) for column in zip(*values, strict=True))) for key, values in rows]


def shared_metric(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Return the headline metric that all runs share. Raises DataError when they differ or have none."""
    metrics = {headline_metric(summary) for summary in summaries}
    metric = metrics.pop()
    if metrics or metric is None:
        raise DataError("the runs do not share one metric", "compare runs of one recipe that were all evaluated")
    return metric


def _statements(summary: Mapping[str, Any], metric: str) -> list[tuple[tuple[str, str, str], tuple[float, float]]]:
    agents: Agents = summary["agents"]
    rows: list[tuple[tuple[str, str, str], tuple[float, float]]] = []
    for name, agent in of_role(agents, "teacher").items():
        ends = first_and_last(agent, metric)
        if ends and len(agent["scores"]) > 1:  # a ready teacher that does not train has no change to claim
            rows.append((("teacher", f"final {name}", f"initial {name}"), (ends[1], ends[0])))
    for name, agent in of_role(agents, "student").items():
        ends = first_and_last(agent, metric)
        if ends is None:
            continue
        final = f"final {name}"
        if len(agent["scores"]) > 1:
            rows.append((("naive", final, f"naive weak-label {name}"), (ends[1], ends[0])))
        weak = best_initial_teacher(agents, metric)
        if weak:
            rows.append((("best-teacher", final, "best initial teacher"), (ends[1], weak[1])))
        for other, baseline in of_role(agents, "baseline").items():
            theirs = first_and_last(baseline, metric)
            if theirs:
                rows.append((("baseline", final, f"baseline {other}"), (ends[1], theirs[1])))
        for arm, members in summary.get("arms", {}).items():
            theirs = first_and_last(members[name], metric) if name in members else None
            if theirs:
                rows.append((("ablation", final, f"ablation {arm}"), (ends[1], theirs[1])))
    return rows


def claims_json(found: Sequence[Claim], summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the content of `claims.json`."""
    return {
        "metric": shared_metric(summaries),
        "seeds": [summary["seed"] for summary in summaries],
        "level": 0.95,
        "claims": [claim.to_json() for claim in found],
    }


def claims_table(found: Sequence[Claim], metric: str) -> str:
    """Format the claims as plain text, one per line."""
    head = ["claim", "from", "to", "change", "95% interval", "seeds up", "verdict"]
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
                f"[{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else "one seed",
                f"{sum(change > 0 for change in claim.changes)}/{count}",
                claim.verdict,
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    seeds = sorted({seed for claim in found for seed in claim.seeds})
    title = f"{label_of(metric)}, mean over seeds {', '.join(map(str, seeds))}"
    return "\n".join([title, lines[0], "-" * len(lines[0]), *lines[1:]])
