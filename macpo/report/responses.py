"""Every response of a run that the report lets one browse: to the test prompts, and in the pairs that it trained on.

Nothing is scored by a model here. Scores are those that stages wrote, and the demo world's, which are exact and free.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from macpo import demo_world
from macpo.engine.errors import DataError, MacpoError
from macpo.engine.files import read_json, read_jsonl
from macpo.engine.run.manifest import MANIFEST, unchanged
from macpo.evaluation.written import is_number
from macpo.report.run_reader import Evaluation, RunReader, StageFolder

Kind: TypeAlias = Literal["response", "kept", "lost", "chosen", "rejected"]
Turns: TypeAlias = list[tuple[str, str]]
Gold: TypeAlias = Callable[[Turns, str], dict[str, float]]
GOLD, REWARD, PERPLEXITY = "gold", "reward", "perplexity"
MOST_CHARS = {"test": 12_000_000, "train": 8_000_000}
"""Characters of a collection in one page; of a larger one a sample of its prompts is shown."""
ROW_CHARS = 40
"""Of a row beside its text."""
_ROLES = ("student", "policy", "teacher", "ceiling", "baseline", "human")
_TRAINING = re.compile(r"iter(?P<iteration>\d+)-(?P<agent>.+)-[^-]+")
_SCORED = re.compile(r"score-(?P<scorer>.+)-(?P<label>.+-iter\d+)")
_CHECKED = re.compile(r"check-(?P<scorer>.+)")


class Source(NamedTuple):
    """Who wrote a response, and what became of it. `group`: what it is compared with, in words."""

    group: str
    agent: str
    kind: Kind = "response"
    iteration: int | None = None
    arm: str = ""
    role: str = ""


class Row(NamedTuple):
    """One response; `scores`: name -> number."""

    source: Source
    text: str
    finished: bool
    scores: dict[str, float]


class Entry(NamedTuple):
    """Some rows of a prompt; `turns` is empty where the file that has them does not repeat the prompt."""

    prompt_id: str
    turns: Turns
    rows: list[Row]


@dataclass
class Prompt:
    """A prompt with all its responses."""

    id: str
    turns: Turns = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def lost_better(self, score: str) -> dict[str, bool]:
        """Group -> whether a candidate that was not kept has a higher score than the kept one."""
        kept: defaultdict[str, list[float]] = defaultdict(list)
        lost: defaultdict[str, list[float]] = defaultdict(list)
        for row in self.rows:
            if row.source.kind in ("kept", "lost") and score in row.scores:
                (kept if row.source.kind == "kept" else lost)[row.source.group].append(row.scores[score])
        return {group: max(lost[group], default=-1e300) > max(given) for group, given in kept.items()}


@dataclass(frozen=True)
class Collection:
    """Prompts of one kind, all or a seeded sample of `total`."""

    name: Literal["test", "train"]
    title: str
    total: int
    prompts: list[Prompt]

    @property
    def sampled(self) -> bool:
        return len(self.prompts) < self.total

    @property
    def scores(self) -> list[str]:
        """The scores that some row has: gold, scorers, a reward model's own, perplexity."""
        found = {name for prompt in self.prompts for row in prompt.rows for name in row.scores}
        place = {GOLD: 0, REWARD: 2, PERPLEXITY: 3}
        return sorted(found, key=lambda name: (place.get(name, 1), name))

    @property
    def judged_by(self) -> str | None:
        """The score by which a kept candidate is compared with the others; None where candidates have none."""
        have = {
            name for prompt in self.prompts for row in prompt.rows if row.source.kind == "lost" for name in row.scores
        }
        return next((name for name in self.scores if name in have and name != PERPLEXITY), None)


def collections(run: RunReader) -> list[Collection]:
    """The test prompts and the training prompts of a run, those that have responses."""
    found = []
    gold = _gold_of(run)
    for name, title, entries in (
        ("test", "Test prompts", _test_entries),
        ("train", "Training pairs", _training_entries),
    ):
        total, prompts = _bounded(partial(entries, run), gold, MOST_CHARS[name], run.summary.get("seed") or 0)
        if prompts:
            found.append(Collection(name, title, total, prompts))  # type: ignore[arg-type]
    return found


def _bounded(entries: Callable[[Gold], Iterator[Entry]], gold: Gold, most: int, seed: int) -> tuple[int, list[Prompt]]:
    """How many prompts there are, and those that fit: all, or the first in an order that the seed decides.

    The files are read twice, so that a large run is never in memory as a whole.
    """
    sizes: Counter[str] = Counter()
    seen: set[str] = set()
    for entry in entries(lambda *_: {}):
        sizes[entry.prompt_id] += sum(len(row.text) + ROW_CHARS for row in entry.rows)
        if entry.turns and entry.prompt_id not in seen:  # files of responses repeat their prompts, the page does not
            seen.add(entry.prompt_id)
            sizes[entry.prompt_id] += sum(len(said) for _, said in entry.turns)
    chosen, room = set(sizes), most
    if sum(sizes.values()) > most:
        chosen = set()
        for prompt_id in sorted(sizes, key=lambda each: hashlib.sha256(f"{seed}/{each}".encode()).digest()):
            room -= sizes[prompt_id]
            if room < 0 and chosen:
                break
            chosen.add(prompt_id)
    prompts: dict[str, Prompt] = {}
    for entry in entries(gold):
        if entry.prompt_id in chosen:
            prompt = prompts.setdefault(entry.prompt_id, Prompt(entry.prompt_id))
            prompt.turns = prompt.turns or entry.turns
            prompt.rows += entry.rows
    return len(sizes), [prompt for _, prompt in sorted(prompts.items()) if prompt.rows]


# --- test prompts ---------------------------------------------------------------------------------------------------


def _gold_of(run: RunReader) -> Gold:
    """The demo world's score of any response; of another run nothing, and of a prompt that is not of the world."""
    data = next((stage.path for stage in run.stages if stage.name == "data"), None)
    try:
        settings = read_json(data / MANIFEST)["settings"] if data is not None else {}
        known = settings["data"]["world"] is not None
    except (MacpoError, OSError, KeyError, TypeError):
        known = False

    def gold(turns: Turns, text: str) -> dict[str, float]:
        if not known:
            return {}
        try:
            return {GOLD: demo_world.gold([{"role": role, "content": said} for role, said in turns], text)}
        except DataError:
            return {}

    return gold


def _test_entries(run: RunReader, gold: Gold) -> Iterator[Entry]:
    roles = _roles(run)
    evaluations = sorted(
        run.all_evaluations,
        key=lambda e: (
            bool(e.folder.arm),
            e.folder.arm,
            _ROLES.index(roles.get(e.agent, "baseline")),
            e.agent,
            e.iteration,
        ),
    )
    any_response = False
    for evaluation in evaluations:
        source = _policy(evaluation, roles)
        scores = _scores_of(run, evaluation)
        for row in evaluation.rows():
            any_response = True
            found: dict[str, Any] = {
                name: by_prompt[row["prompt_id"]] for name, by_prompt in scores.items() if row["prompt_id"] in by_prompt
            }
            if GOLD in row:
                found = {GOLD: row[GOLD], **found}
            shown = _row(source, row["answer"], row.get("finished"), found)
            yield Entry(row["prompt_id"], turns_of(row["prompt"]), [shown])
    rewards = _human_scores(run)
    if any_response or rewards:
        yield from _human_entries(run, "test.jsonl", "Human responses", gold, rewards)


def _roles(run: RunReader) -> dict[str, str]:
    members = [run.summary["agents"], *run.summary.get("arms", {}).values()]
    return {name: agent["role"] for agents in reversed(members) for name, agent in agents.items()}


def _policy(evaluation: Evaluation, roles: dict[str, str]) -> Source:
    arm = evaluation.folder.arm
    group = f"Arm {arm}" if arm else "Policy" if roles.get(evaluation.agent) == "policy" else "Main run"
    return Source(group, evaluation.agent, "response", evaluation.iteration, arm, roles.get(evaluation.agent, ""))


def _scores_of(run: RunReader, evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Scorer -> prompt id -> the score of the evaluated policy's response."""
    found = {}
    label = evaluation.folder.base.removeprefix("eval-")
    for stage in run.stages:
        match = _SCORED.fullmatch(stage.base)
        if match and stage.arm == evaluation.folder.arm and match["label"] == label:
            rows = read_jsonl(unchanged(stage.path, "scores.jsonl"))
            found[match["scorer"]] = {row["prompt_id"]: row["score"] for _, row in rows}
    return found


def _human_scores(run: RunReader) -> dict[str, Path]:
    """Scorer -> the file with its scores of both sides of the human test pairs, in their order."""
    found = {}
    for stage in run.stages:
        match = None if stage.arm else _CHECKED.fullmatch(stage.base)
        if match and (stage.path / "scores.jsonl").exists():
            found[match["scorer"]] = unchanged(stage.path, "scores.jsonl")
        elif not stage.arm and (stage.path / "rewards.jsonl").exists():
            found[REWARD] = unchanged(stage.path, "rewards.jsonl")
    return found


def _human_entries(run: RunReader, file: str, group: str, gold: Gold, scored: dict[str, Path]) -> Iterator[Entry]:
    """The rows of a file of the data stage that hold a pair, or a prompt with one response."""
    stage = next((stage for stage in run.stages if stage.name == "data" and (stage.path / file).exists()), None)
    if stage is None:
        return
    scores = {name: _by_prompt(path) for name, path in scored.items()}
    for _, row in read_jsonl(unchanged(stage.path, file)):
        turns, rows = turns_of(row["prompt"]), []
        told = {name: given.pop(0) for name, by in scores.items() if (given := by.get(row["prompt_id"]))}
        sides: dict[str, Kind] = {"chosen": "chosen", "rejected": "rejected", "answer": "chosen"}
        for side, kind in sides.items():
            if side in row:
                source = Source(group, row.get(f"{side}_by") or "human", kind, role="human")
                found = gold(turns, row[side]) | {name: each[side] for name, each in told.items() if side in each}
                rows.append(_row(source, row[side], row.get(f"{side}_finished"), found))
        yield Entry(row["prompt_id"], turns, rows)


def _by_prompt(path: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for _, row in read_jsonl(path):
        found.setdefault(row["prompt_id"], []).append(row)
    return found


# --- training pairs -------------------------------------------------------------------------------------------------


def _training_entries(run: RunReader, gold: Gold) -> Iterator[Entry]:
    known = _training_prompts(run)
    for stage in run.stages:
        if (stage.path / "pairs.jsonl").exists():
            yield from _stage_entries(stage, known, gold)
    yield from _human_entries(run, "train.jsonl", "Training data", gold, {})


def _training_prompts(run: RunReader) -> dict[str, Turns]:
    """The prompts of the student half, which files of candidates do not repeat."""
    found: dict[str, Turns] = {}
    for stage in run.stages:
        if stage.name == "data" and (stage.path / "student.jsonl").exists():
            for _, row in read_jsonl(unchanged(stage.path, "student.jsonl")):
                found[row["prompt_id"]] = turns_of(row["prompt"])
    return found


def _stage_entries(stage: StageFolder, known: dict[str, Turns], gold: Gold) -> Iterator[Entry]:
    """The pairs that a stage wrote; where one side was kept among candidates, all of these instead of that side."""
    match = _TRAINING.fullmatch(stage.base)
    iteration = int(match["iteration"]) if match else None
    group = f"pairs of {match['agent']}, iteration {iteration}" if match else stage.base
    group = f"{stage.arm}: {group}" if stage.arm else group

    def row_of(by: Any, kind: Kind, turns: Turns, text: str, finished: Any, **scores: Any) -> Row:
        source = Source(group, str(by or ""), kind, iteration, stage.arm)
        return _row(source, text, finished, gold(turns, text) | scores)

    candidates = stage.path / "scores.jsonl"
    with_candidates = set()
    if candidates.exists():
        for _, row in read_jsonl(unchanged(stage.path, candidates.name)):
            if "kept" not in row:
                continue
            with_candidates.add(row["prompt_id"])
            turns, rows = known.get(row["prompt_id"], []), []
            for index, each in enumerate(row["candidates"]):
                kind: Kind = "kept" if index == row["kept"] else "lost"
                perplexity = {PERPLEXITY: each.get("perplexity")}
                rows.append(row_of(each["by"], kind, turns, each["text"], each.get("finished"), **perplexity))
            yield Entry(row["prompt_id"], turns, rows)
    for _, row in read_jsonl(unchanged(stage.path, "pairs.jsonl")):
        turns, rows = turns_of(row["prompt"]), []
        sides: Iterable[Kind] = ("rejected",) if row["prompt_id"] in with_candidates else ("chosen", "rejected")
        for side in sides:
            rows.append(row_of(row.get(f"{side}_by"), side, turns, row[side], row.get(f"{side}_finished")))
        yield Entry(row["prompt_id"], turns, rows)


def turns_of(prompt: Any) -> Turns:
    """A prompt's turns as (role, text), also where it is one string; of a turn without text, such as a tool call, all
    that it holds."""
    if isinstance(prompt, str):
        return [("user", prompt)]
    return [(str(turn["role"]), _said(turn)) for turn in prompt]


def _said(turn: Mapping[str, Any]) -> str:
    content = turn.get("content")
    if isinstance(content, str) and content:
        return content
    return json.dumps({key: value for key, value in turn.items() if key != "role"}, ensure_ascii=False)


def _row(source: Source, text: Any, finished: Any, scores: Mapping[str, Any]) -> Row:
    numbers = {name: float(value) for name, value in scores.items() if is_number(value)}
    return Row(source, str(text), finished is not False, numbers)
