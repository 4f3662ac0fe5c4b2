"""README's own commands: a recipe from `init` whose lines are then filled in, and the one changed import."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from pages import blocks_for, lines_of, run
from tiny import tiny

from macpo.integrations.trl import FusedDPOTrainer


def test_the_commands_for_ones_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first the recipe is filled in, here with a tiny run; the comparison is planned."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    first, *others = lines_of(blocks_for("README.md", sh=1, python=1)["sh"][0])
    said = run(first, "README.md")
    assert any("data.path" in line for line in said), "it says which lines to fill in"
    recipe = tiny(tmp_path / "runs" / "mine").model_dump(mode="json", exclude_unset=True)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    for command in others:
        compared = command.startswith("macpo compare")
        run(command.partition("#")[0] + " --plan" * compared, "README.md")
    assert [command.split()[1] for command in others] == ["check", "plan", "run", "compare"]
    assert (tmp_path / "runs" / "mine" / "report.html").exists()


def test_the_changed_import() -> None:
    names: dict[str, object] = {}
    exec(blocks_for("README.md", sh=1, python=1)["python"][0], names)
    assert names["DPOTrainer"] is FusedDPOTrainer
