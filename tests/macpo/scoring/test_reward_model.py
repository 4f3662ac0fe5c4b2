"""`recipe: reward` from the command line, and what is said of how a reward model agrees with people."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import macpo
from scipy import stats
from standalone_runs import COMPUTE, make_base
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from macpo.data.preferences import load_preferences
from macpo.engine.data.messages import Message
from macpo.engine.data.records import Pair, Prompt, read_records, write_records
from macpo.engine.errors import DataError
from macpo.engine.files import read_jsonl
from macpo.engine.run.folder import folder_of
from macpo.evaluation.agreement import agreement, in_words, may_be_headline


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("model"))


def write_pairs(path: Path, count: int, *, seed: int = 0, fair: bool = True) -> Path:
    """Polite against rude responses; or, unfair, ones that nothing tells apart. Two prompts are harder by a margin."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        better, worse = "sure , happy to help you . good luck !", rng.choice(["go away .", "no , you silly person ."])
        if not fair:
            better, worse = rng.sample(["the car and the cat .", "the cat and the car ."], 2)
        rows.append({"prompt": f"how do i paint the kitchen number {i} ?", "chosen": better, "rejected": worse})
        rows[-1]["score_difference"] = 0.5 + (i % 2)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_recipe(path: Path, base: Path, data: dict[str, Any], **changes: Any) -> Path:
    recipe = {
        "recipe": "reward",
        "output": str(path.with_suffix("")),
        "data": data,
        "model": str(base),
        "template": "vicuna",
        "context_tokens": 64,
        "tuning": {"type": "lora", "rank": 4, "target_modules": "all-linear"},
        "training": {"learning_rate": 5e-3, "batch": 8, "epochs": 3},
        "compute": COMPUTE,
    }
    path.write_text(json.dumps(recipe | changes))  # JSON is YAML
    return path


def test_a_reward_model_from_pairs_to_its_export(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a margin of the data; what transformers alone computes from the export is what the run reports."""
    data = {"path": str(write_pairs(tmp_path / "pairs.jsonl", 60)), "test_prompts": 20, "margin": "score_difference"}
    path = write_recipe(tmp_path / "run.yaml", base, data)
    assert macpo("check", path, "--examples", 0) == 0
    assert "40 to train on, 20 held out" in capsys.readouterr().out
    assert macpo("plan", path) == 0
    assert macpo("train-reward", path) == 0
    said = capsys.readouterr().out
    assert "agreement with people by iteration, 20 held-out prompts" in said and "cannot be the headline" not in said
    run = tmp_path / "run"
    assert {pair.margin for pair in read_records(folder_of(run, "data") / "train.jsonl", Pair)} == {0.5, 1.5}
    (row,) = json.loads((run / "summary.json").read_text())["agents"]["policy"]["scores"]
    assert row["reward_accuracy"] == 1.0 and row["loss"] < math.log(2) and row["reward_pairs"] == 20
    page = (run / "report.html").read_text()
    assert "Reward model: run" in page and "agrees with people on 100.0% of 20 held-out pairs" in page

    assert macpo("export", run, "--out", tmp_path / "out", "--merge") == 2
    assert "a reward model is exported as it was saved" in capsys.readouterr().err
    assert macpo("export", run, "--out", tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "Bradley-Terry" in card and "`</s>` if the response" in card
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")

    def reward(messages: tuple[Message, ...], text: str) -> float:
        prompt = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        ids = tokenizer(f"{prompt} {text}{tokenizer.eos_token}", add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            return model(**ids).logits[0, 0].item()

    evaluation = folder_of(run, "eval-policy-iter1")
    rewards = {row["prompt_id"]: row for _, row in read_jsonl(evaluation / "rewards.jsonl")}
    for pair in read_records(folder_of(run, "data") / "test.jsonl", Pair)[:5]:
        found = rewards[pair.prompt.id]
        assert found["chosen"] == pytest.approx(reward(pair.prompt.messages, pair.chosen), abs=1e-5)
        assert found["rejected"] == pytest.approx(reward(pair.prompt.messages, pair.rejected), abs=1e-5)

    assert macpo("status", run) == 0 and macpo("train-reward", run) == 0
    assert "nothing to do" in capsys.readouterr().err


def test_a_scorer_that_tells_nothing_apart_says_so(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"path": str(write_pairs(tmp_path / "pairs.jsonl", 40, fair=False)), "test_prompts": 20}
    tuning = {"type": "full"}
    path = write_recipe(tmp_path / "run.yaml", base, data, tuning=tuning, training={"learning_rate": 1e-4})
    assert macpo("run", path) == 0
    assert "an interval that covers one half, so its scores cannot be the headline" in capsys.readouterr().out
    assert "so its scores cannot be the headline" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recipe": "sft", "tuning": {"type": "full"}}, "recipe: a recipe of kind 'sft', where 'reward' is asked for"),
        ({"tuning": {"type": "lora", "quantization": "nf4"}}, "set quantization to none"),
        ({"compute": COMPUTE | {"parallel": {"tensor": 2}}}, "set tensor to 1 and sharding to shard"),
        (
            {"data": {"margin": "gap"}},
            "gap: data.margin names it, but it is missing",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(
    changes: dict[str, Any], said: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data: dict[str, Any] = {"path": str(write_pairs(tmp_path / "pairs.jsonl", 10)), "test_prompts": 4}
    data |= changes.pop("data", {})
    path = write_recipe(tmp_path / "run.yaml", base, data, **changes)
    assert macpo("train-reward", path) in (2, 3)
    assert said in capsys.readouterr().err


def test_margins_are_numbers(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "m": value} for value in (1, 2.5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected,m\np,a,b,1\np,a,c,2.5\n")
    for name in ("a.jsonl", "a.csv"):
        assert [pair.margin for pair in load_preferences(tmp_path / name, margin="m")[0]] == [1.0, 2.5]
        assert [pair.margin for pair in load_preferences(tmp_path / name)[0]] == [None, None]
    (tmp_path / "b.jsonl").write_text(json.dumps(rows[0] | {"m": "much"}) + "\n")
    with pytest.raises(DataError, match=r'b.jsonl:1: m: must be a number, got "much"'):
        load_preferences(tmp_path / "b.jsonl", margin="m")
    pairs = [Pair(Prompt.of("p"), "a", "b"), Pair(Prompt.of("q"), "a", "b", margin=2.0)]
    write_records(tmp_path / "kept.jsonl", pairs)
    assert read_records(tmp_path / "kept.jsonl", Pair) == pairs
    assert ["margin" in row for _, row in read_jsonl(tmp_path / "kept.jsonl")] == [False, True]


def test_agreement_against_its_definitions() -> None:
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(0.4, 1.0, 200), rng.normal(0.0, 1.0, 200)
    chosen[:3] = rejected[:3]  # ties
    long, short = rng.integers(5, 50, 200), rng.integers(5, 50, 200)
    found = agreement(chosen, rejected, long, short)
    difference = chosen - rejected
    wins = int((difference > 0).sum())
    z, n, p = stats.norm.ppf(0.975), 200, wins / 200
    middle, half = (
        (p + z * z / (2 * n)) / (1 + z * z / n),
        z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)),
    )
    assert found["reward_accuracy"] == p  # Wilson 1927, by hand
    assert (found["reward_accuracy_low"], found["reward_accuracy_high"]) == pytest.approx(
        (middle - half, middle + half)
    )
    assert found["loss"] == pytest.approx(np.mean([math.log1p(math.exp(-d)) for d in difference]))
    longer = [d > 0 for d, a, b in zip(difference, long, short, strict=True) if a > b]
    assert found["reward_accuracy_longer"] == pytest.approx(sum(longer) / len(longer))
    assert found["reward_pairs_longer"] == len(longer)
    assert found["reward_pairs_longer"] + found["reward_pairs_shorter"] <= 200
    expected = stats.spearmanr([*chosen, *rejected], [*long, *short]).statistic
    assert found["reward_length_correlation"] == pytest.approx(expected)
    error = 0.0
    for k in range(10):  # bins of stated chance, by brute force
        inside = [
            (s, right)
            for d in difference
            for s, right in [(1 / (1 + math.exp(-abs(d))), 1.0 if d > 0 else 0.5 if d == 0 else 0.0)]
            if 0.5 + k / 20 <= s < 0.5 + (k + 1) / 20 or (k == 9 and s == 1.0)
        ]
        error += abs(sum(right - s for s, right in inside)) / 200
    assert found["reward_ece"] == pytest.approx(error)
    assert may_be_headline(found) == (middle - half > 0.5)


def test_agreement_at_its_ends() -> None:
    one = agreement([1.0], [0.0], [3], [3])
    assert one["reward_accuracy"] == 1.0 and not may_be_headline(one)  # one pair says nothing
    assert one["reward_accuracy_shorter"] is None and one["reward_length_correlation"] is None
    assert "covers one half" in in_words("It", one)
    wrong = agreement([0.0] * 50, [1.0] * 50, [3] * 50, [4] * 50)
    assert "lies below one half" in in_words("It", wrong) and not may_be_headline(wrong)
    right = agreement([50.0] * 50, [-50.0] * 50, [3] * 50, [4] * 50)
    assert may_be_headline(right) and right["reward_ece"] < 1e-9
    for columns in (([], [], [], []), ([1.0], [0.0, 1.0], [1], [1]), ([math.nan], [0.0], [1], [1])):
        with pytest.raises(ValueError):
            agreement(*columns)
