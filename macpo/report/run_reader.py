"""Reads a run's folder: committed stages, evaluation rows, selections, pairs and training curves.

It returns only what the files say, also of an unfinished run. Nothing here loads a model.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from macpo.engine.errors import DataError, MacpoError
from macpo.engine.files import read_bytes, read_json, read_jsonl
from macpo.engine.recipe import kind_of
from macpo.engine.run.folder import read_timing
from macpo.engine.run.manifest import STEP_TIMES, unchanged
from macpo.evaluation.gap import gaps_recovered
from macpo.evaluation.prompt_scores import Policy, PromptScores, ScoredRun
from macpo.evaluation.summary import AgentHistory, Role, build_summary, headline_metric
from macpo.evaluation.written import checked_row, checked_summary, is_number

log = logging.getLogger(__name__)

_FOLDER = re.compile(r"(\d+)-(.+)")
_EVALUATION = re.compile(r"eval-(?P<agent>.+)-iter(?P<iteration>\d+)")
_DEVELOPMENT = re.compile(r"dev-(?P<agent>.+)-iter(?P<iteration>\d+)")
_SELECTION = re.compile(r"iter(?P<iteration>\d+)-.+-select")


@dataclass(frozen=True)
class StageFolder:
    """One committed stage: folder `NN-name`, or `NN-arm.name` for an ablation."""

    number: int
    name: str
    path: Path

    @property
    def arm(self) -> str:
        """The ablation that the stage belongs to; empty for the main run."""
        return self.name.rpartition(".")[0]

    @property
    def base(self) -> str:
        """The name without the arm."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Evaluation:
    """One agent's held-out evaluation at one iteration."""

    agent: str
    iteration: int
    folder: StageFolder
    writer: StageFolder | None = None
    """The stage that wrote the responses, where it is another one, as in recipes of one model."""

    def metrics(self) -> dict[str, Any]:
        """Return the content of `evaluation.json`. Raises DataError for one that no table can show."""
        found: dict[str, Any] = {}
        for folder in filter(None, (self.writer, self.folder)):
            path = unchanged(folder.path, "evaluation.json")
            told = read_object(path)
            try:
                if told.get("role") not in (None, *get_args(Role)):
                    raise ValueError("there is no such role")
                found |= checked_row(told)
            except (ValueError, TypeError) as error:
                raise DataError(str(error), f"run again with --from {folder.name}", file=path) from None
        return found

    @property
    def responses(self) -> Path:
        """The file `evaluation.jsonl` with the policy's responses; absent where it wrote none."""
        return (self.writer or self.folder).path / "evaluation.jsonl"

    def rows(self) -> Iterator[dict[str, Any]]:
        path = unchanged(self.responses.parent, self.responses.name)
        return (row for _, row in read_jsonl(path)) if path.exists() else iter(())


@dataclass(frozen=True)
class Spike:
    """A loss far above its running mean (engine/training/spikes.py)."""

    step: int
    loss: float
    deviations: float


@dataclass(frozen=True)
class Curves:
    """One training stage's metrics by optimiser step."""

    folder: StageFolder
    agent: str
    columns: Mapping[str, list[float]]
    spikes: tuple[Spike, ...] = ()

    @property
    def preference(self) -> bool:
        """Whether this was a preference stage (it has margins), not SFT."""
        return "margin" in self.columns


class RunReader:
    """The files of a run's folder that the report shows."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._scores: dict[str, PromptScores] = {}
        if not self.path.is_dir():
            raise DataError("no such run folder", "give the folder that `macpo run` wrote", file=str(path))

    @cached_property
    def stages(self) -> list[StageFolder]:
        """Committed stages in order; folders being written (`.tmp`) or deleted (`.trash`) are not among them."""
        found = []
        for folder in self.path.iterdir():
            match = _FOLDER.fullmatch(folder.name)
            if match and folder.is_dir() and not folder.is_symlink() and folder.suffix not in (".tmp", ".trash"):
                found.append(StageFolder(int(match[1]), match[2], folder))
        return sorted(found, key=lambda stage: (stage.number, stage.name))

    @cached_property
    def running(self) -> list[str]:
        """Names of stages in progress: started and not committed."""
        names = (folder.name.removesuffix(".tmp") for folder in self.path.glob("*.tmp") if folder.is_dir())
        return sorted(match[2] for name in names if (match := _FOLDER.fullmatch(name)))

    @cached_property
    def finished(self) -> bool:
        """Whether the run has written its summary, which it does last."""
        return self._written is not None

    @cached_property
    def _written(self) -> dict[str, Any] | None:
        """`summary.json`; None where there is none, or one that cannot be used while there are stages to look at."""
        path = self.path / "summary.json"
        if not os.path.lexists(path):
            return None
        try:
            return checked_summary(read_object(path))
        except (MacpoError, ValueError) as error:
            why = error.problems[0].message if isinstance(error, MacpoError) else str(error)
            if not self.stages:
                raise error if isinstance(error, MacpoError) else DataError(why, "run again", file=path) from None
            log.warning("%s is ignored: %s; the stages' own scores are shown, and a run writes it again", path, why)
            return None

    @cached_property
    def summary(self) -> dict[str, Any]:
        """`summary.json`, or a summary of the committed evaluations while the run is unfinished; PGR made again."""
        if self._written is not None:
            return self.with_gaps(self._written)
        agents: dict[str, AgentHistory] = {}
        for evaluation in self.evaluations:
            metrics = evaluation.metrics()
            role: Role = metrics.pop("role", None) or _role(evaluation.agent)
            metrics.pop("agent", None), metrics.pop("iteration", None)
            agents.setdefault(evaluation.agent, AgentHistory(role)).add(evaluation.iteration, metrics)
        stages = [{"name": stage.name, **self.timing(stage)} for stage in self.stages]
        found = build_summary(agents, stages, seed=0, versions={}, development=self.development) | {"seed": None}
        return self.with_gaps(found)

    @cached_property
    def scored(self) -> ScoredRun:
        """The summary with the scores by prompt that stand behind it."""
        return self._scored(self.summary)

    def with_gaps(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Return a summary of this run with `pgr`, where it has teachers, student and ceiling."""
        gaps = gaps_recovered([self._scored(summary)])
        return {**summary, "pgr": gaps} if gaps else dict(summary)

    def _scored(self, summary: Mapping[str, Any]) -> ScoredRun:
        metric = headline_metric(summary)
        if metric is None or not self.all_evaluations:
            return ScoredRun(summary)
        return ScoredRun(summary, self.prompt_scores(metric, summary.get("evaluations", ())))

    def prompt_scores(self, metric: str, evaluations: Iterable[Mapping[str, Any]] = ()) -> PromptScores:
        """Return the scores by prompt under a metric; rows are read when they are asked for.

        `evaluations`: those of the run's summary, which say what stage evaluated which policy. Without them, as in
        summaries of earlier versions, it goes by the names of stages.
        """
        if metric in self._scores:
            return self._scores[metric]
        folders = {evaluation.folder.name: evaluation for evaluation in self.all_evaluations}
        stages = {Policy(each["arm"], each["agent"], each["iteration"]): each["stage"] for each in evaluations}

        def rows(policy: Policy) -> Iterator[dict[str, Any]] | None:
            name = f"eval-{policy.agent}-iter{policy.iteration}"
            tried = (stages.get(policy, ""), f"{policy.arm}.{name}", name)
            found = next((folders[stage] for stage in tried if stage in folders), None)
            return None if found is None else self._rows(found, metric)

        return self._scores.setdefault(metric, PromptScores(metric, rows))

    def _rows(self, evaluation: Evaluation, metric: str) -> Iterator[dict[str, Any]]:
        """The rows of an evaluation; under the metric `score_NAME` with what the scorer NAME gave their responses."""
        scorer = metric.removeprefix("score_")
        return evaluation.rows() if scorer == metric else self.scored_rows(evaluation, scorer)

    def scored_rows(self, evaluation: Evaluation, scorer: str | None = None) -> Iterator[dict[str, Any]]:
        """The rows of an evaluation, with `score_NAME` of each scorer NAME of its responses, or of one of them."""
        folder, which = evaluation.folder, ".+" if scorer is None else re.escape(scorer)
        policy = folder.base.removeprefix("eval-")
        name = re.compile(f"score-({which})-{re.escape(policy)}")
        others = (each.folder.base.removeprefix("eval") for each in self.all_evaluations)
        longer = tuple(other for other in others if other.endswith(f"-{policy}") and other != f"-{policy}")
        scores: dict[str, dict[str, Any]] = {}
        for stage in self.stages:
            match = name.fullmatch(stage.base)
            if match and stage.arm == folder.arm and not stage.base.endswith(longer):
                told = read_jsonl(unchanged(stage.path, "scores.jsonl"))
                scores[f"score_{match[1]}"] = {row["prompt_id"]: row["score"] for _, row in told}
        for row in evaluation.rows():
            yield row | {metric: found.get(row["prompt_id"]) for metric, found in scores.items()}

    @staticmethod
    def agent_of(stage: StageFolder, agents: Iterable[str]) -> str:
        """The one of these agents whose name the stage's contains; empty where none is, the longest of several."""
        names = sorted(agents, key=len, reverse=True)  # `student-2` before `student`
        return next((name for name in names if f"-{name}-" in f"-{stage.base}-"), "")

    def timing(self, stage: StageFolder) -> dict[str, Any]:
        """Return `seconds`, `tokens` and further counts of `timing.json` in one dict; empty when there is none."""
        found = read_timing(stage.path)
        return {"seconds": found.get("seconds")} | found.get("counts", {}) if found else {}

    def speed(self, stage: StageFolder) -> dict[str, float]:
        """Return a training stage's mean rates, weighted by step time, and its peak memory, from `timing.jsonl`."""
        rows = _step_times(stage.path / STEP_TIMES)
        found: dict[str, float] = {}
        for name in ("tokens_per_s", "pairs_per_s", "sequences_per_s", "mfu"):
            have = [(row[name], row["seconds"]) for row in rows if name in row and "seconds" in row]
            if have and (seconds := sum(time for _, time in have)) > 0:
                found[name] = sum(rate * time for rate, time in have) / seconds
        peaks = [row["peak_memory_bytes"] for row in rows if "peak_memory_bytes" in row]
        return found | ({"peak_memory_bytes": max(peaks)} if peaks else {})

    def counts(self) -> dict[str, int]:
        """Return the data stage's counts of rows, and how many rows all stages together dropped or drew again."""
        total: dict[str, int] = {}
        for stage in self.stages:
            path = stage.path / "counts.json"
            if path.exists():
                for group, found in read_object(path).items():
                    if isinstance(found, dict):
                        total |= {f"{stage.name}, {group}: {name}": n for name, n in found.items()}
            for name, value in self.timing(stage).items():
                if isinstance(value, int) and (name.startswith("dropped") or name in ("empty", "resampled")):
                    total[f"all stages: {name}"] = total.get(f"all stages: {name}", 0) + value
        return {name.replace("_", " "): value for name, value in total.items()}

    @cached_property
    def recipe(self) -> str:
        """The resolved recipe's text; empty when there is none."""
        try:
            return read_bytes(self.path / "recipe.yaml").decode(errors="replace")
        except MacpoError:
            return ""

    @cached_property
    def kind(self) -> str:
        """The kind of the run's recipe."""
        return kind_of(self.path)[0] or "macpo"

    @cached_property
    def all_evaluations(self) -> list[Evaluation]:
        """Held-out evaluations of the main run and of every ablation."""
        stages = {stage.name: stage for stage in self.stages}
        return [
            Evaluation(match["agent"], int(match["iteration"]), stage, stages.get(_writer_of(stage)))
            for stage in self.stages
            if (match := _EVALUATION.fullmatch(stage.base)) and (stage.path / "evaluation.json").exists()
        ]

    @cached_property
    def development(self) -> dict[str, dict[str, Any]]:
        """Each initial teacher's metrics on the development prompts; empty where there are none."""
        found = {}
        for stage in self.stages:
            match = None if stage.arm else _DEVELOPMENT.fullmatch(stage.base)
            if match and (stage.path / "evaluation.json").exists():
                found[match["agent"]] = Evaluation(match["agent"], int(match["iteration"]), stage).metrics()
        return found

    @property
    def evaluations(self) -> list[Evaluation]:
        """Held-out evaluations of the main run."""
        return [evaluation for evaluation in self.all_evaluations if not evaluation.folder.arm]

    def selections(self) -> list[tuple[int, StageFolder]]:
        """Return the main run's perplexity filters, by iteration."""
        return [
            (int(match["iteration"]), stage)
            for stage in self.stages
            if not stage.arm and (match := _SELECTION.fullmatch(stage.base)) and (stage.path / "scores.jsonl").exists()
        ]

    def pair_files(self) -> list[StageFolder]:
        """Return the main run's stages that wrote training pairs."""
        return [stage for stage in self.stages if not stage.arm and (stage.path / "pairs.jsonl").exists()]

    def curves(self, agents: Iterable[str]) -> list[Curves]:
        """Return the training curves of every stage of the main run, each with the agent that its name contains."""
        names = list(agents)
        found = []
        for stage in self.stages:
            path = stage.path / "metrics.jsonl"
            if stage.arm or not path.exists():
                continue
            columns: dict[str, list[float]] = {}
            rows = [row for _, row in read_jsonl(path)]
            for key in ("step", "loss", "margin", "accuracy", "lr", "grad_norm"):
                if rows and all(is_number(row.get(key)) for row in rows):
                    columns[key] = [float(row[key]) for row in rows]
            agent = self.agent_of(stage, names)
            if "step" in columns and "loss" in columns:
                spikes = tuple(
                    Spike(row["step"], row["loss"], row["spike"]) for row in rows if is_number(row.get("spike"))
                )
                found.append(Curves(stage, agent, columns, spikes))
        return found


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; raise DataError when it is something else."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError("not a JSON object", "run the stage again", file=str(path))
    return content


def _step_times(path: Path) -> list[dict[str, Any]]:
    """The numbers of each step of `timing.jsonl`, which is not hashed: up to a line that is torn, which is said."""
    rows: list[dict[str, Any]] = []
    if os.path.lexists(path):
        try:
            for _, row in read_jsonl(path):
                rows.append({name: value for name, value in row.items() if is_number(value)})
        except MacpoError as error:
            log.warning("%s is ignored after %d steps: %s", path, len(rows), error.problems[0].message)
    return rows


def sample(rows: Iterable[dict[str, Any]], count: int, keep: Callable[[str], bool] = lambda _: True) -> list[dict]:
    """Return `count` rows, the same ones for every file over the same prompts.

    Prompt ids are content hashes, so the smallest ids are an arbitrary choice that nobody made by reading responses.
    """
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        if keep(row["prompt_id"]):
            first.setdefault(row["prompt_id"], row)
    return [row for _, row in islice(sorted(first.items()), count)]


def _writer_of(evaluation: StageFolder) -> str:
    """The name of the stage that wrote an evaluated policy's responses in a recipe of one model."""
    name = evaluation.base.replace("eval-", "responses-", 1)
    return f"{evaluation.arm}.{name}" if evaluation.arm else name


def _role(agent: str) -> Role:
    """Guess an agent's role from its usual name, for an unfinished run, which has no summary yet."""
    if agent in ("student", "ceiling"):
        return agent  # type: ignore[return-value]
    return "teacher" if agent.startswith("teacher") else "baseline"
