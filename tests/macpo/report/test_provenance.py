"""Where a report says that its numbers come from: of a run that noted it, of an older one, of one that was killed."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import macpo
from standalone_runs import make_base, recipe_of

from macpo.engine.files import write_json
from macpo.engine.recipe import dump
from macpo.engine.run.attempts import ATTEMPTS, read_attempts
from macpo.engine.run.manifest import Manifest
from macpo.report.page import write_report
from macpo.report.provenance import duration, flop_words


def text_of(page: Path) -> str:
    body = page.read_text(encoding="utf-8").partition('<script type="application/json"')[0]
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body.partition("</style>")[2])))


def test_an_sft_run_says_where_it_came_from_and_shows_its_responses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Responses are asked for after the run has finished: nothing of it is done again."""
    base = make_base(tmp_path / "model")
    recipe = recipe_of("sft", base, tmp_path / "run", prompt_tokens=40)
    (tmp_path / "recipe.yaml").write_text(dump(recipe, comments=True))
    assert macpo("run", tmp_path / "recipe.yaml") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("0*/manifest.json")}
    assert macpo("run", tmp_path / "recipe.yaml", "--set", "sampling={max_new_tokens: 16}") == 0
    assert {path: path.read_bytes() for path in before} == before
    assert macpo("run", tmp_path / "run") == 0  # finished: no attempt
    capsys.readouterr()

    first, second = read_attempts(tmp_path / "run")
    assert first.outcome == second.outcome == "finished" and set(first.versions) >= {"torch", "transformers", "macpo"}
    stages = {path.name.partition("-")[2] for path in (tmp_path / "run").glob("0*")}
    assert stages >= {"responses-policy-iter0", "responses-policy-iter1"}
    assert set(second.flop) == stages - {"data"} and all(number > 0 for number in second.flop.values())

    page = tmp_path / "run" / "report.html"
    text = text_of(page)
    assert "Supervised fine-tuning: run One policy, trained on one response to each prompt" in text
    assert f"Started {first.began.replace('T', ' ').replace('Z', ' UTC')}" in text
    assert f"Finished {(second.ended or '').replace('T', ' ').replace('Z', ' UTC')}" in text
    assert f"{duration((first.seconds or 0) + (second.seconds or 0))} in 2 attempts" in text
    assert "1 process, CPU:" in text and first.commit[:12] in text and f"torch {first.versions['torch']}" in text
    assert re.search(r"generation for evaluation 2 [\d.]+ s \d+% [\d,]+ [\d.,]+ [\d.]+ [kMG]FLOP", text)
    assert "before training" in text and "after training" in text
    (data,) = (tmp_path / "run").glob("*-data")
    for name, entry in Manifest.read(data).files.items():
        assert f"data/{name}" in text
        assert f'<code title="{entry["sha256"]}">{entry["sha256"][:12]}</code>' in page.read_text()

    shown = json.loads(page.read_text().partition('id="response-data">')[2].partition("</script>")[0])
    test = shown["collections"][0]
    assert len(test["prompts"]) == 12 and test["scores"] == ["gold score"]
    sources = [test["sources"][row[0]] for row in test["prompts"][0][2]]
    assert [(each["agent"], each["moment"], each["kind"]) for each in sources] == [
        ("policy", "before training", "response"),
        ("policy", "after training", "response"),
        ("human", "", "chosen"),
    ]
    scores = json.loads((tmp_path / "run" / "summary.json").read_text())["agents"]["policy"]["scores"]
    assert all({"loss", "perplexity", "gold", "mean_words"} <= set(row) for row in scores)


def test_a_run_that_noted_nothing_says_so(response_run: Callable[..., Path], tmp_path: Path) -> None:
    text = text_of(write_report(response_run(tmp_path / "run")))
    for name in ("Command", "Started", "Wall time", "Device", "Last ended"):
        assert f"{name} not recorded" in text
    assert "pairs.jsonl read – abababababab" in text and "/somewhere" not in text


def test_what_was_killed_counts_up_to_its_last_stage(response_run: Callable[..., Path], tmp_path: Path) -> None:
    run = response_run(tmp_path / "run")
    about = {"command": "macpo run <x>", "device": "CPU: some", "processes": 2}
    written = Manifest.read(run / "01-data").created["time"]
    year = int(written[:4])
    attempts = [
        {"began": f"{year - 1}{written[4:]}", "ended": None, "seconds": None, "outcome": None, **about},
        {"began": f"{year + 1}{written[4:]}", "ended": f"{year + 1}{written[4:]}", "seconds": 7200.0, **about},
    ]
    attempts[1]["outcome"] = "finished"
    write_json(run / ATTEMPTS, {"attempts": attempts})
    page = write_report(run)
    text = text_of(page)
    hours = re.search(r"Wall time at least ([\d,]+) h (\d+) min in 2 attempts", text)
    assert hours and int(hours[1].replace(",", "")) in (365 * 24 + 2, 366 * 24 + 2)
    assert "killed, or still running" in text and "macpo run <x>" in text and "<x>" not in page.read_text()
    assert "2 processes, CPU: some" in text


def test_numbers_in_words() -> None:
    assert [duration(each) for each in (None, 1.25, 61, 7261)] == ["–", "1.2 s", "1 min 1 s", "2 h 1 min"]
    assert [flop_words(each) for each in (None, 5.0, 1.234e12, 5e21)] == ["–", "5 FLOP", "1.23 TFLOP", "5e+03 EFLOP"]
