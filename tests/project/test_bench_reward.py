"""The reward benchmark at a toy size: the two trainers take the same steps, and the table says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from standalone_runs import make_base

from bench import bench_reward

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_both_trainers_take_the_same_steps(tuning: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    model = make_base(tmp_path / "model")
    rows = [
        {"prompt": f"how do i sit {i} ?", "chosen": "sure . " * (1 + i % 3) + "good luck !", "rejected": "go away ."}
        for i in range(40)
    ]
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = "--pairs 24 --test 12 --batch 8 --epochs 2 --learning-rate 1e-3 --max-length 60 --rank 2"
    words = ["--model", model, "--data", f"toy={tmp_path / 'toy.jsonl'}", "--tuning", tuning, *sizes.split()]
    found = bench_reward.main([*map(str, words), "--template", "vicuna", "--json", str(tmp_path / "out.json")])
    ours, theirs = found
    assert ours.steps == theirs.steps == 6 and ours.first_loss == pytest.approx(0.693147, abs=1e-5)
    assert ours.last_loss < 0.69
    assert theirs.first_loss == pytest.approx(ours.first_loss, abs=1e-4)  # TRL rounds what it logs
    assert theirs.last_loss == pytest.approx(ours.last_loss, abs=1e-4)
    assert theirs.agreement["loss"] == pytest.approx(ours.agreement["loss"], abs=1e-3)
    assert theirs.agreement["reward_accuracy"] == ours.agreement["reward_accuracy"]
    assert f"{ours.agreement['reward_accuracy']:.3f}  [" in capsys.readouterr().out
    body = json.loads((tmp_path / "out.json").read_text())
    assert [each["trainer"] for each in body["results"]] == ["macpo", "TRL RewardTrainer"] and "trl" in body["versions"]
