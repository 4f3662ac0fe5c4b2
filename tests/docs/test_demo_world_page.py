"""docs/demo-world.md: its examples score what it says, its commands are understood."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from pages import blocks_for

from bench.evidence import runs, update_readme, world_gates
from macpo.arguments import parser
from macpo.demo_world import gates, gold
from macpo.demo_world.grammar import GRADES, Draw, requests_by_text
from macpo.demo_world.responses import good

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "demo-world.md").read_text(encoding="utf-8")
ASKED = re.findall(r"`([^`]+)`, ?\n?`([^`]+)`\), in four sentences", PAGE)[0]
ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ") and "`" in line]


def score(response: str) -> float:
    """Of an answer to whichever of the page's two requests it names."""
    benign, harmful = ASKED
    asked = harmful if " emma " in f" {response} " else benign
    return gold([{"role": "user", "content": asked}], response)


def test_examples_score_what_the_page_says() -> None:
    assert len(ROWS) == 7
    for _, example, said in ROWS:
        found = score(example.strip("`"))
        numbers = [float(number) for number in re.findall(r"\d*\.\d+|\d", said)]
        if " to " in said:
            assert numbers[0] <= found <= numbers[1], example
        else:
            assert any(found == pytest.approx(number, abs=0.005) for number in numbers), (example, found)
    for asked, (*_, said) in zip(ASKED, ROWS[:2], strict=True):
        request = requests_by_text()[asked]
        scores = [score(good(request, Draw("page"), grade)) for grade in range(1, GRADES + 1)]
        assert scores == pytest.approx([float(number) for number in said.split()])


def test_the_gates_table_holds_the_lowest_and_the_highest_value(tmp_path: Path) -> None:
    texts = [{"auc": auc, "first_words": 0.6} for auc in (0.61, 0.74)]
    runs_ = [
        {"best_teacher": 0.5, "naive": naive, "ceiling": 1.0, "copying": {"a": 1.0, "b": copied}}
        for naive, copied in ((0.7, 0.92), (0.65, 1.0))
    ]
    (tmp_path / "gates.json").write_text(json.dumps({"text": texts, "runs": runs_}))
    head, _, *rows = world_gates.markdown({"mine": tmp_path / "gates.json"}).splitlines()
    assert head == "| gate | bound | mine, 2 seeds |"
    ends = [row.split(" | ", 1)[1] for row in rows]
    low, high = gates.AUC
    assert ends == [
        f"{low:.2f} to {high:.2f} | 0.61 to 0.74 |",
        f"{gates.FIRST_WORDS:.2f} or more | 0.60 |",
        f"-{world_gates.NAIVE_BELOW_TEACHER:.2f} or more | 0.15 to 0.20 |",
        f"{world_gates.NAIVE_BELOW_CEILING:.2f} or more | 0.30 to 0.35 |",
        f"{world_gates.CEILING:.2f} or more | 1.00 |",
        f"{world_gates.COPYING:.2f} or more | 0.92 to 1.00, **not passed by 1** |",
    ]


def test_commands_are_read_as_they_stand(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = blocks_for("docs/demo-world.md", sh=2)["sh"]
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    modules = {"bench.evidence.world_gates": world_gates, "bench.evidence.runs": runs}
    modules |= {"bench.evidence.update_readme": update_readme}
    assert len(commands) == 4
    for words in commands:
        if words[0] == "macpo":
            said = parser().parse_args(words[1:])
            assert Path(said.recipe).name in {path.name for path in (ROOT / "recipes").iterdir()}
        else:
            with pytest.raises(SystemExit):
                modules[words[2]].main([*words[3:], "--help"])
            assert all(word in capsys.readouterr().out for word in words[3:] if word.startswith("--"))
