"""Every script and notebook of examples/ runs offline, and notebooks are committed without outputs."""

from __future__ import annotations

import re
import runpy
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import macpo

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = {
    "demo_run": r"(?s)teacher teacher0 .*student@0: .*student@1: .*report: .*report\.html",
    "score_and_generate": r"(perplexity +\d+\.\d\d  .+\n){4}\n(perplexity +\d+\.\d\d  .+\n){4}",
    "own_loop": r"epoch 0: loss .*\n.*\nepoch 2: loss 0\.[56]\d+, reward margin 0\.[1-9]",
    "drop_in_trl": r"reward margin: -?0\.0000 at the first step, 0\.[0-9]*[1-9]",
}
NOTEBOOKS = ("first_run", "compare_policies")
TRL_WARNS = ("ignore::FutureWarning", "ignore:.*pin_memory.*")


@pytest.mark.filterwarnings(*TRL_WARNS)
def test_every_script_and_notebook_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one folder, so that the run that all of them work on is made once."""
    folder = Path(shutil.copytree(EXAMPLES, tmp_path / "examples"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name, wanted in SCRIPTS.items():
        monkeypatch.setattr(sys, "argv", [f"{name}.py"])
        runpy.run_path(f"{name}.py", run_name="__main__")
        said = capsys.readouterr().out
        assert re.search(wanted, said), f"{name}: {said}"
    for name in NOTEBOOKS:
        notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
        shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ())]
        assert sum("image/png" in data for data in shown) >= 1, f"{name} shows a plot"
        assert sum("<table" in data.get("text/html", "") for data in shown) >= 2, f"{name} shows tables"
    assert macpo.Run("runs/small-demo").finished
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        {*(path.name for path in EXAMPLES.iterdir()), "runs"} - {"__pycache__"}
    ), "nothing but runs/ is written"


def test_this_module_and_the_page_know_every_example() -> None:
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert files == {*(f"{name}.py" for name in SCRIPTS), *(f"{name}.ipynb" for name in NOTEBOOKS)}
    linked = set(re.findall(r"^\| \[`([\w.]+)`\]\(\1\)", (EXAMPLES / "README.md").read_text(), flags=re.M))
    assert linked == files


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_committed_without_outputs(name: str) -> None:
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}, "nothing of the machine that it was written on"
