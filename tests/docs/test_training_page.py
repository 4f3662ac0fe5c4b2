"""Every command of docs/training.md, in order, in a folder that holds what the page speaks of."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from commands import macpo
from pages import blocks_for
from standalone_runs import make_base

from macpo.engine import train
from macpo.engine.run.folder import folder_of
from macpo.kernels.pair_loss.losses import DESENSITISED, LOSSES, SMOOTHED
from macpo.standalone.config import ExampleData, PairData

ROOT = Path(__file__).parents[2]
PAGE, DATA_PAGE = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("training", "data"))
SMALL = {"student_documents: 6000": "student_documents: 120", "student_prompts: 512": "student_prompts: 24"}
SMALL |= {"test_prompts: 200": "test_prompts: 10", "hidden_size: 64": "hidden_size: 16"}


def test_every_command_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    for name in ("sft", "preference"):  # the recipes that are shipped, on less text
        text = (ROOT / "recipes" / f"{name}.yaml").read_text()
        for long, short in SMALL.items():
            assert long in text
            text = text.replace(long, short)
        (tmp_path / "recipes" / f"{name}.yaml").write_text(text)
    blocks = blocks_for("docs/training.md", sh=4, yaml=1)
    (recipe,) = blocks["yaml"]
    (tmp_path / "mine.yaml").write_text(recipe)
    make_base(tmp_path / "model", context=512)
    rows = [{"prompt": f"how do i sit {i} ?", "chosen": f"thanks {i} .", "rejected": "no"} for i in range(220)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    commands = [line for block in blocks["sh"] for line in block.splitlines()]
    assert len(commands) == 11
    for command in commands:
        program, *words = shlex.split(command)
        if program == "torchrun":  # tests/macpo/test_standalone.py runs it
            assert words[2] == "engine/train.py" and train.parse(words[3:]).config == Path("mine.yaml")
            continue
        assert program == "macpo" and macpo(*words) == 0, f"{command}\n{capsys.readouterr().err}"
    assert "reference_model: null" in capsys.readouterr().out
    for run_dir, files in {"mine": 2, "preference": 2}.items():
        assert len(list((tmp_path / "runs" / run_dir / "cache").iterdir())) == files
    assert len(list((tmp_path / "cache").iterdir())) == 2 and (tmp_path / "exported" / "README.md").exists()
    assert (folder_of(tmp_path / "runs" / "mine", "train-policy") / "policy" / "adapter_config.json").exists()


def table(page: str, first: str) -> list[list[str]]:
    """Cells of a page's table whose first heading is this."""
    block = page[page.index(f"| {first} ") :].partition("\n\n")[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in block.splitlines()[2:]]


def test_the_tables_name_what_there_is() -> None:
    losses = {row[0].strip("`"): row[1] for row in table(PAGE, "`training.loss`")}
    assert set(losses) == set(LOSSES)
    for name, options in losses.items():
        assert ("`label_smoothing`" in options) == (name in SMOOTHED)
        assert ("`ld_alpha`" in options) == (name in DESENSITISED)
        assert ("`gamma`" in options) == (name == "simpo")
    for kind, data in (("preference", PairData), ("sft", ExampleData)):
        named = {word for row in table(DATA_PAGE, f"`recipe: {kind}`") for word in re.findall(r"`(\w+)`", row[0])}
        assert named | {"auto"} == set(data.model_fields["format"].annotation.__args__)  # type: ignore[union-attr]
