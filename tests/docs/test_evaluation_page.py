"""The commands of docs/evaluation.md on a small recipe; its tables name every arm, and its links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from commands import macpo
from pages import blocks_for
from tiny import tiny

from macpo.comparison.arms import named_arms
from macpo.engine.recipe import dump

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "evaluation.md").read_text()


def test_the_commands_work_and_add_to_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(dump(tiny(Path("out"), iterations=1)))
    (block,) = blocks_for("docs/evaluation.md", sh=1)["sh"]
    plan, small, large = (shlex.split(line.partition("#")[0])[1:] for line in block.splitlines())
    assert macpo(*plan) == 0 and not Path("out").exists()
    said = capsys.readouterr().out
    assert "are shared" in said and "rlaif" in said and "left out: it asks a model in words" in said
    assert small[3] == "0-1" and large[: len(small)] == small
    one_seed = [word if word != "0-1" else "0" for word in large]
    assert macpo(*(word if word != "0-1" else "0" for word in small)) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("manifest.json")}
    assert macpo(*one_seed) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before, "nothing ran again"
    names = [row["name"] for row in json.loads(Path("out/compare.json").read_text())["rows"]]
    assert {"macpo", "naive-sft", "spin", "filtered-sft", "k1-teacher0", *named_arms("ablations")} <= set(names)
    assert "does not hold" in Path("out/compare.html").read_text()
    assert macpo(*one_seed, "--methods", "spinn") == 2


def test_the_table_has_every_arm_and_links_lead_somewhere() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|", PAGE, flags=re.M)
    assert set(rows) == {*named_arms("methods"), "ceiling"}
    for link in re.findall(r"\]\(([\w.-]+)\)", PAGE):
        assert (DOCS / link).is_file(), link
