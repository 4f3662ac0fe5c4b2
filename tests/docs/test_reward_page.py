"""Every recipe and command of docs/evaluation-reward.md, in a folder that holds what the page speaks of."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import macpo
from pages import blocks_for
from standalone_runs import make_base
from tiny import init, tiny
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from macpo.config import Recipe
from macpo.evaluation.summary import LABELS
from macpo.recipe_kinds import plan_of

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "evaluation-reward.md").read_text()
SMALL = {"student_documents: 6000": "student_documents: 120", "student_prompts: 512": "student_prompts: 24"}
SMALL |= {"test_prompts: 200": "test_prompts: 10", "hidden_size: 64": "hidden_size: 16"}


def test_every_block_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    blocks = blocks_for("docs/evaluation-reward.md", sh=1, yaml=2)
    (commands,), (own, scoring) = blocks["sh"], map(yaml.safe_load, blocks["yaml"])
    base = make_base(tmp_path / "base")
    rows = [{"prompt": f"how do i sit {i} ?", "chosen": f"sure {i} .", "rejected": "go away ."} for i in range(90)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for command in commands.splitlines():
        program, *words = shlex.split(command)
        assert program == "macpo" and macpo(*words) == 0, f"{command}\n{capsys.readouterr().err}"
        if words[0] == "init":  # what it wrote, on less text
            text = Path("mine.yaml").read_text()
            for long, short in SMALL.items():
                assert long in text
                text = text.replace(long, short)
            Path("mine.yaml").write_text(text)
    assert AutoModelForSequenceClassification.from_pretrained("reward-model").config.num_labels == 1

    Path("own.yaml").write_text(yaml.safe_dump(own))
    assert macpo("check", "own.yaml") == 0  # the same stages, on data and a model of one's own

    labels: Any = {0: "rude", 1: "polite"}
    model = AutoModelForSequenceClassification.from_pretrained(base, id2label=labels)
    model.save_pretrained("others")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained("others")
    make_base(tmp_path / "tuned")
    plain = tiny(tmp_path / "run", iterations=0, teachers=[{"init": init(16), "tuning": {"type": "full"}}])
    tree = plain.model_dump(mode="json") | {"evaluation": scoring["evaluation"] | {"ceiling": False}}
    sizes = {"teacher_prompts": 16, "student_prompts": 12, "test_prompts": 16}
    tree["data"] = {"path": "pairs.jsonl", **sizes, **scoring["data"]}
    recipe = Recipe.model_validate(tree)
    names = {stage.name for stage in plan_of(recipe).graph.stages}
    for scorer in ("rm", "polite", "own", "dpo"):
        assert {f"check-{scorer}", f"score-{scorer}-student-iter0"} <= names
    Path("scored.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert macpo("plan", "scored.yaml") == 0, capsys.readouterr().err
    assert "check-polite" in capsys.readouterr().out


def test_the_numbers_are_those_of_the_tables() -> None:
    for name in ("reward_accuracy", "reward_ece", "reward_length_correlation"):
        assert f"| {LABELS[name]}" in PAGE
