"""Every block of docs/evaluation-stats.md on a small recipe, seeds that were stopped, and the names of verdicts."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import macpo
from pages import blocks_for
from standalone_runs import make_base
from tiny import OPTIM, tiny

from macpo.config import Recipe
from macpo.engine.data.records import Pair, read_records
from macpo.engine.files import read_jsonl
from macpo.engine.recipe import dump
from macpo.engine.run.folder import folder_of
from macpo.evaluation.claims import CONTRADICTED, HOLDS, INCONCLUSIVE
from macpo.report.run_reader import RunReader

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation-stats.md").read_text()
BLOCKS = blocks_for("docs/evaluation-stats.md", sh=1, yaml=1, python=1)


def small() -> dict[str, Any]:
    """A teacher, a student and a ceiling on the page's data block; the page does not speak of iterations."""
    agent = {"model": "base", "tuning": {"type": "lora", "rank": 2}}
    tree = tiny(Path("runs/mine"), iterations=0, teachers=[agent], student=agent).model_dump(mode="json")
    training = {"positive": OPTIM, "negative": OPTIM}
    tree |= {"teacher_training": training, "student_training": training, "sampling": {"max_new_tokens": 6}}
    (block,) = BLOCKS["yaml"]
    return tree | yaml.safe_load(block)


def test_every_block_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"how do i sit {i} ?", "chosen": f"thanks {i} .", "rejected": "no"} for i in range(120)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_base(Path("base"), context=64)
    Path("mine.yaml").write_text(dump(Recipe.model_validate(small())))
    commands = [line.partition("#")[0].strip() for line in BLOCKS["sh"][0].splitlines()]
    alone, seeds, report = (shlex.split(line) for line in commands)
    assert alone == seeds[:3] and seeds[3] == "--seeds"
    assert macpo(*alone[1:]) == 0

    shutil.copytree("runs/mine", "runs/mine-seeds/seed-0")  # the seeds were stopped between the first and the second
    before = {path: path.stat().st_mtime_ns for path in Path("runs/mine-seeds").rglob("manifest.json")}
    assert macpo(*seeds[1:4], "0-1") == 0
    said = capsys.readouterr()
    assert "mean over seeds 0, 1" in said.out and "stages are done already" in said.err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert macpo(*report[1:]) == 0

    written = json.loads(Path("runs/mine-seeds/claims.json").read_text())
    assert written["seeds"] == [0, 1] and Path("runs/mine-seeds/report.html").exists()
    assert [claim["kind"] for claim in written["claims"]] == ["mean-teacher", "best-teacher"]
    assert {claim["interval_over"] for claim in written["claims"]} == {"seeds"}
    assert Path("runs/mine-seeds/claims.txt").read_text().splitlines()[3].startswith("final student > mean initial")

    summary = RunReader(Path("runs/mine")).summary
    assert summary["development"]["teacher0"]["preference_pairs"] == 8
    weak = [gap["weak_agent"] for gap in summary["pgr"]]
    assert weak == ["mean initial teacher", "initial teacher that is best on development prompts (teacher0)"]
    assert json.loads(Path("runs/mine/summary.json").read_text())["pgr"] == summary["pgr"]

    data = folder_of(Path("runs/mine"), "data")
    dev = {pair.prompt.id for pair in read_records(data / "dev.jsonl", Pair)}
    rows = read_jsonl(folder_of(Path("runs/mine"), "dev-teacher0-iter0") / "evaluation.jsonl")
    assert len(dev) == 8 and {row["prompt_id"] for _, row in rows} == dev

    (code,) = BLOCKS["python"]
    exec(compile(code, "docs/evaluation-stats.md", "exec"), {})
    assert re.search(r"[+-]\d\.\d{3} \[[+-]\d\.\d{3}, [+-]\d\.\d{3}\], p \d\.\d{3}", capsys.readouterr().out)


def test_seeds_of_a_recipe_without_claims_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "sft.yaml"
    assert macpo("run", recipe, "--seeds", "0-1") == 2
    assert "--set seed=N" in capsys.readouterr().err
    assert macpo("run", recipe, "--seeds", "x") == 2


def test_the_page_names_the_verdicts() -> None:
    assert all(f"`{verdict}`" in PAGE for verdict in (HOLDS, INCONCLUSIVE, CONTRADICTED))
