"""What a command imports before it has anything to compute: nothing that takes seconds."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import macpo
from macpo.engine import config
from macpo.engine.run.lock import RunLock
from macpo.kernels.pair_loss import losses

HEAVY = {"torch", "transformers", "peft", "scipy", "matplotlib", "datasets", "pandas"}
PROGRAM = """
import sys
from macpo.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
print("imported:", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "words", [["init", "--like", "demo", "new.yaml"], ["status", "old.yaml"], ["check", "old.yaml", "--print-config"]]
)
def test_a_command_that_computes_nothing_imports_no_torch(words: list[str], tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "demo-compare.yaml"
    (tmp_path / "old.yaml").write_text(recipe.read_text())
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, line = done.stderr.splitlines()
    assert not HEAVY & set(line.split())


def test_a_folder_in_use_is_said_before_torch_is_imported(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "demo.yaml"
    (tmp_path / "run").mkdir()
    words = ["run", str(recipe), "--set", f"output={tmp_path / 'run'}"]
    with RunLock(tmp_path / "run", print):
        program = PROGRAM.replace("not end.code", "end.code == 2")
        done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, said, line = done.stderr.splitlines()
    assert "the run folder is in use by process" in said
    assert not HEAVY & set(line.split())


@pytest.mark.parametrize(
    ("program", "imported"),
    [
        ("import macpo; dir(macpo)", set()),
        ("from macpo import MacpoError, SamplingParams", set()),
        ("import macpo, tempfile; macpo.Run(tempfile.mkdtemp()).responses()", {"pandas"}),
    ],
)
def test_a_notebook_waits_for_nothing_that_it_does_not_use(program: str, imported: set[str]) -> None:
    shown = "; import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program + shown], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert HEAVY & set(done.stdout.split()) == imported


def test_what_macpo_offers_is_there_for_programs_editors_and_type_checkers() -> None:
    tree = ast.parse(Path(macpo.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    shown = {alias.name for node in ast.walk(block) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert shown | {"__version__"} == set(macpo.__all__) == set(dir(macpo))
    for name in macpo.__all__:
        assert getattr(macpo, name).__doc__, name
    with pytest.raises(AttributeError, match="module 'macpo' has no attribute 'nothing'"):
        _ = macpo.nothing


def test_recipes_know_what_the_kernels_say_of_each_loss() -> None:
    assert set(get_args(config.LossName)) == set(losses.LOSSES)
    assert config.REFERENCE_FREE == losses.REFERENCE_FREE
    assert config.SMOOTHED == losses.SMOOTHED
    assert config.DESENSITISED == losses.DESENSITISED
