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
    "gold_answers": "responses scored",
    "preference_accuracy": "preference accuracy",
    "preference_accuracy_se": "preference accuracy, standard error",
    "preference_pairs": "human pairs",
    "loss": "held-out loss",
    "perplexity": "held-out perplexity",
    "reward_accuracy": "agreement with people",
    "reward_accuracy_low": "agreement, lower end of its 95% interval",
    "reward_accuracy_high": "agreement, upper end of its 95% interval",
    "reward_pairs": "human pairs scored",
    "reward_ece": "calibration error (ECE)",
    "reward_accuracy_shorter": "agreement where chosen is shorter",
    "reward_accuracy_longer": "agreement where chosen is longer",
    "reward_pairs_shorter": "pairs where chosen is shorter",
    "reward_pairs_longer": "pairs where chosen is longer",
    "reward_length_correlation": "rank correlation of reward and length",
    "reward_margin": "implicit reward margin",
    "logp_margin": "log-prob margin (nats)",
    "logp_margin_per_token": "log-prob margin per token (nats)",
    "answers": "answers",
    "mean_words": "words per response",
    "finished": "share that ended by itself",
    "empty": "share empty",
    "distinct_1": "distinct 1-grams",
    "distinct_2": "distinct 2-grams",
    "distinct_3": "distinct 3-grams",
    "resampled": "responses drawn again",
    "dropped_long_prompt": "prompts too long",
}
"""Plain names of the metrics, in the order in which tables show them."""


HEADLINE_METRICS = ("gold", "preference_accuracy", "reward_accuracy", "perplexity")
"""Headline, table and claims use the first of these that every agent has; the scorers of a recipe come after gold."""


def score_metric(scorer: str) -> str:
    """Return the name of the metric that a scorer of `evaluation.scorers` gives."""
    return f"score_{scorer}"


def label_of(metric: str) -> str:
    """Return a metric's plain name."""
    by_scorer = f"score by {metric.removeprefix('score_')}" if metric.startswith("score_") else metric
    return LABELS.get(metric, by_scorer)


MEAN_TEACHER = "mean initial teacher"
"""How the mean of all initial teachers is called, the `weak` of the headline PGR."""
BEST_TEACHER = "initial teacher that is best on development prompts"
"""How the other `weak` is called, in every seed, whichever teacher it is."""


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
    (agent or arm -> one plain sentence), `scorers` (name -> its agreement with people and whether it may be the
    headline), `development` (teacher -> metrics on the development prompts), `evaluations` (rows of {"arm", "agent",
    "iteration", "stage"}). Adds `metric`, the headline metric.
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
    return summary


def headline_metric(summary: Mapping[str, Any]) -> str | None:
    """Return the metric that every agent of the main run has; None when there is none."""
    rows = [row for agent in summary["agents"].values() for row in agent["scores"]]
    scorers = [score_metric(name) for name, each in summary.get("scorers", {}).items() if each["headline"]]
    for name in (HEADLINE_METRICS[0], *scorers, *HEADLINE_METRICS[1:]):
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


@dataclass(frozen=True, slots=True)
class Weak:
    """A `weak` supervisor of PGR: one initial teacher, or the mean of all."""

    name: str
    value: float
    teachers: tuple[tuple[str, int], ...]
    """The teachers whose mean it is, each with its first iteration."""


def weak_supervisors(summary: Mapping[str, Any], metric: str) -> list[Weak]:
    """Return the mean initial teacher, and the one that is best on the development prompts where there are any.

    The best one on the test prompts would be no fair choice: its score there is partly luck that the student is then
    compared with. `development` of a summary holds teacher -> its metrics on the development prompts.
    """
    starts: dict[str, tuple[int, float]] = {}
    for name, agent in of_role(summary["agents"], "teacher").items():
        first = next((row for row in agent["scores"] if row.get(metric) is not None), None)
        if first is not None:
            starts[name] = (first["iteration"], first[metric])
    if not starts:
        return []
    mean = math.fsum(value for _, value in starts.values()) / len(starts)
    found = [Weak(MEAN_TEACHER, mean, tuple((name, iteration) for name, (iteration, _) in starts.items()))]
    chosen = summary.get("development", {})
    tried = {name: chosen[name][metric] for name in starts if chosen.get(name, {}).get(metric) is not None}
    if len(tried) == len(starts):
        best = max(tried, key=lambda name: tried[name])
        iteration, value = starts[best]
        found.append(Weak(BEST_TEACHER, value, ((best, iteration),)))
    return found
