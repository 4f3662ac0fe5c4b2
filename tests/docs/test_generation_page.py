"""Every code block of docs/generation.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VOCAB, model_of
from forks import ranks
from generation_checks import character_tokenizer
from pages import named_blocks
from peft import LoraConfig, get_peft_model

from macpo.engine.distributed.world import World

BLOCKS = named_blocks("docs/generation.md")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # forks need a quiet parent


def given(**names: Any) -> dict[str, Any]:
    """What the page speaks of."""
    return {"model": model_of("llama"), "tokenizer": character_tokenizer(VOCAB), "texts": ["abc", "de", "fghi"]} | names


def test_every_block_is_run_here() -> None:
    assert set(BLOCKS) == {"responses", "adapters", "scores", "waves", "split"}


def test_responses_scores_and_waves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = given(folder=tmp_path)
    exec(BLOCKS["responses"], space)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 12 and all(line.split()[0] in ("stop", "length") for line in told)
    exec(BLOCKS["scores"], space)
    sums = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert sums == pytest.approx([float(line.split()[1]) for line in told], abs=1e-3)
    exec(BLOCKS["waves"], space)
    assert len(space["rows"]) == 12 and (tmp_path / "waves" / "0000.jsonl").exists()


def test_adapters() -> None:
    space = given()
    exec(BLOCKS["responses"], space)
    peft = get_peft_model(space["model"], LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="kind")
    peft.add_adapter("rude", LoraConfig(r=4, target_modules=["v_proj"]))
    for name, parameter in peft.named_parameters():
        if "lora_B.rude" in name:
            torch.nn.init.normal_(parameter.data)
    before = space["outputs"]
    space["peft_model"] = peft.eval()
    exec(BLOCKS["adapters"], space)
    ids = [[sample.token_ids for sample in output.samples] for output in (*space["outputs"], *before)]
    assert ids[0] == ids[3] and ids[1] != ids[4] and ids[2] == ids[5]


def test_split(tmp_path: Path) -> None:
    model_of("llama").bfloat16().save_pretrained(tmp_path / "model")

    def body(world: World) -> None:
        space = given(world=world, path=tmp_path / "model", device=torch.device("cpu"), folder=tmp_path)
        exec(BLOCKS["responses"], space)
        exec(BLOCKS["split"], space)
        outputs = space["generator"].generate(space["prompts"], space["params"])
        assert world.gather([s.token_ids for o in outputs for s in o.samples])[0] == [
            s.token_ids for o in outputs for s in o.samples
        ]
        exec(BLOCKS["waves"], space)
        assert len(space["rows"]) == 12

    assert ranks(2, body) == [0, 0]
