"""A run's folder as pandas DataFrames; docs/python.md lists their columns.

Each function reads the files when it is called, also of a run in progress, whose committed stages it shows. The first
columns are always there, also of an empty frame; those that only some runs have follow.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from macpo.engine.data.messages import Message
from macpo.engine.files import read_jsonl
from macpo.engine.run.manifest import unchanged
from macpo.report.run_reader import RunReader, StageFolder

Row = dict[str, Any]
SCORES = ("arm", "agent", "role", "iteration")
RESPONSES = ("arm", "agent", "iteration", "prompt_id", "prompt", "messages", "response", "finished")
PAIRS = (
    *("arm", "stage", "agent", "iteration", "prompt_id", "prompt", "messages", "chosen", "rejected"),
    *("chosen_by", "rejected_by", "chosen_finished", "rejected_finished"),
)
CANDIDATES = (
    *("arm", "stage", "agent", "iteration", "prompt_id", "prompt", "messages", "by", "response", "finished"),
    *("sum_logp", "num_tokens", "perplexity", "kept"),
)
STEPS = ("arm", "stage", "agent", "iteration", "step", "loss")
STAGES = ("arm", "stage", "agent", "iteration", "seconds", "tokens")
_ITERATION = re.compile(r"iter(\d+)(?:-|$)")


def scores(run: RunReader) -> pd.DataFrame:
    """Every agent's metrics on the test prompts, a row for each iteration; as in the report."""
    rows = []
    for arm, agents in {"": run.summary["agents"], **run.summary.get("arms", {})}.items():
        for name, agent in agents.items():
            rows += [{"arm": arm, "agent": name, "role": agent["role"], **row} for row in agent["scores"]]
    return _frame(rows, SCORES)


def responses(run: RunReader) -> pd.DataFrame:
    """Every evaluated policy's response to every test prompt, with its scores.

    What arms of a run share is listed once, under the first of them.
    """
    rows = []
    for evaluation in run.all_evaluations:
        about = {"arm": evaluation.folder.arm, "agent": evaluation.agent, "iteration": evaluation.iteration}
        rows += [{**about, **_with_prompt(row)} for row in run.scored_rows(evaluation)]
    return _frame(rows, RESPONSES)


def pairs(run: RunReader) -> pd.DataFrame:
    """Every contrastive pair that a policy learns from: its positive and its negative response to a prompt."""
    rows: list[Row] = []
    for stage in _stages_with(run, "pairs.jsonl"):
        about = _about(run, stage)
        rows += [{**about, **_with_prompt(row)} for row in _rows(stage, "pairs.jsonl")]
    return _frame(rows, PAIRS)


def candidates(run: RunReader) -> pd.DataFrame:
    """The responses among which the perplexity filter chose, a row each, and whether it was kept."""
    prompts: dict[str, list[Message]] = {}
    for stage in _stages_with(run, "student.jsonl"):
        prompts |= {row["prompt_id"]: row["prompt"] for row in _rows(stage, "student.jsonl")}
    rows: list[Row] = []
    for stage in _stages_with(run, "scores.jsonl"):
        about = _about(run, stage)
        for row in _rows(stage, "scores.jsonl"):
            asked = {**about, "prompt_id": row["prompt_id"], "prompt": prompts.get(row["prompt_id"])}
            rows += [
                _with_prompt({**asked, **each, "kept": index == row["kept"]})
                for index, each in enumerate(row.get("candidates", ()))
            ]
    return _frame(rows, CANDIDATES)


def steps(run: RunReader) -> pd.DataFrame:
    """The metrics of every optimiser step of every training stage."""
    rows: list[Row] = []
    for stage in _stages_with(run, "metrics.jsonl"):
        about = _about(run, stage)
        rows += [{**about, **row} for row in _rows(stage, "metrics.jsonl")]
    return _frame(rows, STEPS)


def stages(run: RunReader) -> pd.DataFrame:
    """What every committed stage took: seconds, tokens, rates and memory of training, and its other counts."""
    rows = [{**_about(run, stage), **run.timing(stage), **run.speed(stage)} for stage in run.stages]
    return _frame(rows, STAGES)


def _stages_with(run: RunReader, name: str) -> Iterator[StageFolder]:
    return (stage for stage in run.stages if (stage.path / name).exists())


def _rows(stage: StageFolder, name: str) -> Iterator[Row]:
    return (row for _, row in read_jsonl(unchanged(stage.path, name)))


def _about(run: RunReader, stage: StageFolder) -> Row:
    """Arm, stage, agent (empty where it is nobody's) and iteration (0 before the first) of a stage."""
    found = _ITERATION.search(stage.base)
    agent = run.agent_of(stage, run.summary["agents"])
    return {"arm": stage.arm, "stage": stage.base, "agent": agent, "iteration": int(found[1]) if found else 0}


def _with_prompt(row: Mapping[str, Any]) -> Row:
    """A row whose dialogue is `messages` and, as people read it, `prompt`; its response is `response`."""
    messages = row.get("prompt")
    rest = {"response" if name in ("answer", "text") else name: value for name, value in row.items()}
    return {**rest, "prompt": _text(messages or ()), "messages": messages}


def _text(messages: Sequence[Message]) -> str:
    """A dialogue as a person reads it: the only turn's text, or all turns with their roles."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _frame(rows: Iterable[Row], first: Sequence[str]) -> pd.DataFrame:
    """The rows as a frame that begins with the columns `first`, whether rows have them or not."""
    found = pd.DataFrame(list(rows))
    return found.reindex(columns=[*first, *(name for name in found.columns if name not in first)])
