"""Run folders of the demo world for the browser of responses, made without a run: every score is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from macpo import demo_world
from macpo.engine.data.records import Pair
from macpo.engine.files import write_json, write_jsonl
from macpo.engine.run.manifest import Manifest

WORLD = {
    "teacher_documents": 1,
    "student_documents": 1,
    "teacher_pairs": 1,
    "teacher_prompts": 1,
    "student_prompts": 80,
    "test_prompts": 60,
}


def world_pairs() -> tuple[list[Pair], list[Pair]]:
    """Training and test pairs whose chosen response scores above the rejected one."""
    made = demo_world.build(demo_world.WorldSettings(**WORLD), 0, num_teachers=1)
    return [_right(pair) for pair in made.student], [_right(pair) for pair in made.test]


def _right(pair: Pair) -> Pair:
    messages = pair.prompt.messages
    if demo_world.gold(messages, pair.chosen) > demo_world.gold(messages, pair.rejected):
        return pair
    return Pair(pair.prompt, pair.rejected, pair.chosen)


def make_response_run(folder: Path, *, worse_every: int = 3, hostile: str = "") -> Path:
    """A student at two iterations, a teacher, an arm, and one selection among two teachers' candidates.

    The filter keeps the worse candidate of every `worse_every`-th prompt. `hostile` is the student's last response to
    the first prompt.
    """
    train, test = world_pairs()
    data = _stage(folder, 1, "data")
    write_jsonl(data / "student.jsonl", [pair.prompt.to_json() for pair in train])
    write_jsonl(data / "test.jsonl", [pair.to_json() for pair in test])
    settings = {"data": {"world": WORLD}, "files": {"/somewhere/pairs.jsonl": "ab" * 32}}
    Manifest.of(data, "data", "split_prompts", settings, {}).write(data)

    scores, pairs = [], []
    for index, pair in enumerate(train):
        kept = int(index % worse_every == 0)  # candidate 1 is the worse one
        texts = [("teacher0", pair.chosen, 8.0 + kept), ("teacher1", pair.rejected, 8.5)]
        candidates = [{"by": by, "text": text, "finished": True, "perplexity": p} for by, text, p in texts]
        scores.append({"prompt_id": pair.prompt.id, "candidates": candidates, "kept": kept, "why": ""})
        row = Pair(pair.prompt, texts[kept][1], "go away .", chosen_by=texts[kept][0], rejected_by="student")
        pairs.append(row.to_json())
    select = _stage(folder, 2, "iter1-student-select")
    write_jsonl(select / "scores.jsonl", scores)
    write_jsonl(select / "pairs.jsonl", pairs)

    policies = [("student", 0, "", "rejected"), ("student", 1, "", "chosen"), ("teacher0", 0, "", "rejected")]
    policies.append(("student", 1, "other", "rejected"))
    for number, (agent, iteration, arm, side) in enumerate(policies, 3):
        rows = []
        for pair in sorted(test, key=lambda each: each.prompt.id):
            text = getattr(pair, side)
            if hostile and not rows and (agent, iteration, arm) == ("student", 1, ""):
                text = hostile
            rows.append(_row(pair.prompt.to_json(), text, demo_world.gold(pair.prompt.messages, text)))
        _evaluation(folder, number, agent, iteration, rows, arm)
    return folder


def make_large_run(folder: Path, prompts: int, policies: int, words: int) -> Path:
    """A student at `policies` iterations, with a response of so many words to each prompt, all of them different."""
    for iteration in range(policies):
        rows = []
        for number in range(prompts):
            prompt = {"prompt_id": f"{number:016x}", "prompt": [{"role": "user", "content": f"question {number}"}]}
            text = " ".join(f"w{number * words + word + iteration}" for word in range(words))
            rows.append(_row(prompt, text, number / prompts))
        _evaluation(folder, iteration + 1, "student", iteration, rows)
    return folder


def _row(prompt: dict[str, Any], text: str, gold: float) -> dict[str, Any]:
    return {**prompt, "answer": text, "finished": True, "gold": gold}


def _evaluation(
    folder: Path, number: int, agent: str, iteration: int, rows: Sequence[dict[str, Any]], arm: str = ""
) -> None:
    path = _stage(folder, number, f"{arm}.eval-{agent}-iter{iteration}" if arm else f"eval-{agent}-iter{iteration}")
    write_jsonl(path / "evaluation.jsonl", rows)
    mean = sum(row["gold"] for row in rows) / len(rows)
    write_json(path / "evaluation.json", {"iteration": iteration, "gold": mean, "answers": len(rows)})


def _stage(folder: Path, number: int, name: str) -> Path:
    path = folder / f"{number:02d}-{name}"
    path.mkdir(parents=True)
    return path


@pytest.fixture(scope="session")
def response_run() -> Callable[..., Path]:
    return make_response_run


@pytest.fixture(scope="session")
def large_run() -> Callable[..., Path]:
    return make_large_run


@pytest.fixture(scope="session")
def pairs() -> tuple[list[Pair], list[Pair]]:
    """Training and test pairs of `response_run`."""
    return world_pairs()
