"""A run's folder with two iterations of a student and a ceiling, whose responses all differ, and human test pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from macpo.engine.files import write_json, write_jsonl

POLICIES = ("student@0", "student@3", "ceiling@0")


def make_responses(folder: Path, count: int, response: Callable[[str, int], str] | None = None) -> Path:
    """`response(policy, number)`: what a policy says to a prompt."""
    response = response or (lambda policy, number: f"{policy} says {number}")
    prompts = []
    for number in range(count):
        text = f"question {number}"
        prompt_id = hashlib.sha256(text.encode()).hexdigest()[:16]
        prompts.append({"prompt_id": prompt_id, "prompt": [{"role": "user", "content": text}]})
    (folder / "01-data").mkdir(parents=True)
    human = [row | {"chosen": f"right {i}", "rejected": f"wrong {i}"} for i, row in enumerate(prompts)]
    shape: dict[str, Any] = {"chosen_finished": True, "rejected_finished": True, "ref_chosen_logp": None}
    shape |= {"chosen_by": "human", "rejected_by": "human"}
    write_jsonl(folder / "01-data" / "test.jsonl", [row | shape for row in human])
    for place, policy in enumerate(POLICIES, 2):
        agent, _, iteration = policy.partition("@")
        path = folder / f"{place:02d}-eval-{agent}-iter{iteration}"
        path.mkdir()
        rows = [row | {"answer": response(policy, i), "finished": i % 7 != 3} for i, row in enumerate(prompts)]
        write_jsonl(path / "evaluation.jsonl", sorted(rows, key=lambda row: row["prompt_id"]))
        write_json(path / "evaluation.json", {"role": agent, "iteration": int(iteration), "answers": count})
    return folder


@pytest.fixture
def responses() -> Callable[..., Path]:
    return make_responses
