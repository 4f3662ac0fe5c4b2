"""The numbers of a run: every agent's scores by iteration, the headline metric, the gap recovered."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

Role: TypeAlias = Literal["teacher", "student", "baseline", "ceiling", "policy"]  # policy: of a standalone recipe


Scores: TypeAlias = dict[str, Any]  # {"iteration": int, metric: number, ...}


Agents: TypeAlias = Mapping[str, Mapping[str, Any]]  # name -> {"role", "scores"} of a summary


LABELS: dict[str, str] = {
    "gold": "gold score",
    "gold_se": "gold, standard error",
    "gold_answers": "answers scored",
    "preference_accuracy": "preference accuracy",
    "preference_accuracy_se": "preference accuracy, standard error",
    "preference_pairs": "human pairs",
    "loss": "held-out loss",
    "perplexity": "held-out perplexity",
    "reward_margin": "implicit reward margin",
    "logp_margin": "log-prob margin (nats)",
    "logp_margin_per_token": "log-prob margin per token (nats)",
    "answers": "answers",
    "mean_words": "words per answer",
    "finished": "share that ended by itself",
    "empty": "share empty",
    "distinct_1": "distinct 1-grams",
    "distinct_2": "distinct 2-grams",
    "distinct_3": "distinct 3-grams",
    "resampled": "answers drawn again",
    "dropped_long_prompt": "prompts too long",
}
"""Plain names of the metrics, in the order in which tables show them."""


HEADLINE_METRICS = ("gold", "preference_accuracy", "perplexity")
"""Headline, table and claims use the first of these that every agent has."""


def pgr(weak: float, student: float, ceiling: float) -> float | None:
    """Return the performance gap recovered, (student - weak) / (ceiling - weak) (arXiv 2312.09390, section 3).

    1 is the ceiling, 0 no gain over the weak supervisor, below 0 a loss. None when the ceiling is not above the weak
    supervisor: there is no gap to recover.
    """
    return (student - weak) / (ceiling - weak) if ceiling > weak else None


@dataclass
class AgentHistory:
    """One agent's scores by iteration; iteration 0 is the agent after its initialisation."""

    role: Role
    scores: list[Scores] = field(default_factory=list)

    def add(self, iteration: int, metrics: Mapping[str, Any]) -> None:
        """Add one iteration's metrics (numbers; None where a metric could not be computed)."""
        self.scores.append({"iteration": iteration, **metrics})

    def to_json(self) -> dict[str, Any]:
        """Return the agent's entry of summary.json. Raises ValueError for an unknown role or a repeated iteration."""
        if self.role not in get_args(Role):
            raise ValueError(f"role {self.role!r} is not one of {get_args(Role)}")
        rows = sorted(self.scores, key=lambda row: row["iteration"])
        iterations = [row["iteration"] for row in rows]
        if len(set(iterations)) != len(iterations):
            raise ValueError(f"an iteration is given twice: {iterations}")
        for row in rows:
            for name, value in row.items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise ValueError(f"{name} of iteration {row['iteration']} is {value}")
        return {"role": self.role, "scores": [dict(row) for row in rows]}


def build_summary(
    agents: Mapping[str, AgentHistory],
    stages: Iterable[Mapping[str, Any]],
    seed: int,
    versions: Mapping[str, str],
    *,
    arms: Mapping[str, Mapping[str, AgentHistory]] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """Return the content of `summary.json`.

    `agents` holds teachers, the student, baselines and the ceiling of the main run; `arms` the agents of each
    ablation, under its name; `stages` rows of {"name", "seconds", "tokens", ...}. `extra` goes in as it is; the
    report knows `title`, `models` (agent -> text), `counts` (name -> number), `warnings` (texts), `descriptions`
    (agent or arm -> one plain sentence). Adds `metric` (the headline metric) and `pgr` where it is defined.
    """
    summary: dict[str, Any] = {
        "agents": {name: history.to_json() for name, history in agents.items()},
        "stages": [dict(stage) for stage in stages],
        "seed": seed,
        "versions": dict(versions),
        **extra,
    }
    if arms:
        summary["arms"] = {arm: {name: h.to_json() for name, h in members.items()} for arm, members in arms.items()}
    summary["metric"] = headline_metric(summary)
    gaps = gaps_recovered(summary)
    if gaps is not None:
        summary["pgr"] = gaps
    return summary


def headline_metric(summary: Mapping[str, Any]) -> str | None:
    """Return the metric that every agent of the main run has; None when there is none."""
    rows = [row for agent in summary["agents"].values() for row in agent["scores"]]
    for name in HEADLINE_METRICS:
        if rows and all(row.get(name) is not None for row in rows):
            return name
    return None


def first_and_last(agent: Mapping[str, Any], metric: str) -> tuple[float, float] | None:
    """Return an agent's values at its first and at its last iteration; None without scores."""
    values = [row[metric] for row in agent["scores"] if row.get(metric) is not None]
    return (values[0], values[-1]) if values else None


def of_role(agents: Agents, role: Role) -> dict[str, Mapping[str, Any]]:
    """Return the agents of one role, in the summary's order."""
    return {name: agent for name, agent in agents.items() if agent["role"] == role}


def best_initial_teacher(agents: Agents, metric: str) -> tuple[str, float] | None:
    """Return name and value of the teacher that scores best before any iteration: the `weak` of PGR."""
    starts = {name: first_and_last(agent, metric) for name, agent in of_role(agents, "teacher").items()}
    values = {name: value[0] for name, value in starts.items() if value is not None}
    return max(values.items(), key=lambda item: item[1]) if values else None


def gaps_recovered(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the student's PGR by iteration and both ends of the gap; None without teachers, student or ceiling."""
    agents, metric = summary["agents"], headline_metric(summary)
    if metric is None:
        return None
    weak = best_initial_teacher(agents, metric)
    tops = [first_and_last(agent, metric) for agent in of_role(agents, "ceiling").values()]
    students = list(of_role(agents, "student").values())
    if weak is None or not students or not tops or tops[0] is None:
        return None
    ceiling = tops[0][1]
    rows = [
        {"iteration": row["iteration"], "value": pgr(weak[1], row[metric], ceiling)} for row in students[0]["scores"]
    ]
    return {"metric": metric, "weak": weak[1], "weak_agent": weak[0], "ceiling": ceiling, "student": rows}
