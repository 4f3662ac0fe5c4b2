"""Which responses the report shows, with which scores, and how much of a run that is too large for one page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from macpo.engine.data.records import Pair
from macpo.engine.files import write_json, write_jsonl
from macpo.report import responses
from macpo.report.browser import embedded
from macpo.report.page import write_report
from macpo.report.responses import Collection, collections
from macpo.report.run_reader import RunReader

Pairs = tuple[list[Pair], list[Pair]]


def of(run: Path) -> dict[str, Collection]:
    return {each.name: each for each in collections(RunReader(run))}


def test_a_larger_run_is_a_seeded_sample_by_prompt(
    response_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = response_run(tmp_path / "run")
    whole = of(run)["test"]
    assert not whole.sampled and whole.total == 60
    monkeypatch.setitem(responses.MOST_CHARS, "test", 12_000)
    some = of(run)["test"]
    assert some.sampled and some.total == 60 and 5 < len(some.prompts) < 30
    assert [p.id for p in of(run)["test"].prompts] == [p.id for p in some.prompts]
    by_id = {prompt.id: prompt for prompt in whole.prompts}
    assert all(by_id[prompt.id] == prompt for prompt in some.prompts)  # every response to it
    text = write_report(run).read_text(encoding="utf-8")
    assert f"<b>{len(some.prompts)} of 60</b> prompts are shown, a seeded sample by prompt" in text
    write_json(run / "summary.json", RunReader(run).summary | {"seed": 1})
    assert [p.id for p in of(run)["test"].prompts] != [p.id for p in some.prompts]
    monkeypatch.setitem(responses.MOST_CHARS, "test", 1)
    assert len(of(run)["test"].prompts) == 1  # never an empty page


def test_scores_of_scorers_stand_beside_gold(response_run: Callable[..., Path], pairs: Pairs, tmp_path: Path) -> None:
    run = response_run(tmp_path / "run")
    _, test = pairs
    scored, checked = run / "07-score-judge-a-student-iter1", run / "08-check-judge-a"
    for folder in (scored, checked):
        folder.mkdir()
    ids = sorted(pair.prompt.id for pair in test)
    write_jsonl(scored / "scores.jsonl", [{"prompt_id": i, "score": n / 8} for n, i in enumerate(ids)])
    human = [{"prompt_id": pair.prompt.id, "chosen": n + 0.5, "rejected": -n} for n, pair in enumerate(test)]
    write_jsonl(checked / "scores.jsonl", human)
    found = of(run)["test"]
    assert found.scores == ["gold", "judge-a"] and found.judged_by is None
    place = {pair.prompt.id: n for n, pair in enumerate(test)}
    for number, prompt in enumerate(found.prompts):
        for row in prompt.rows:
            expected = {("student", 1, ""): number / 8}.get(
                (row.source.agent, row.source.iteration or 0, row.source.arm)
            )
            if row.source.role == "human":
                n = place[prompt.id]
                expected = n + 0.5 if row.source.kind == "chosen" else -n
            assert row.scores.get("judge-a") == expected


def test_rewards_of_human_pairs_are_shown_where_a_reward_model_was_trained(pairs: Pairs, tmp_path: Path) -> None:
    _, test = pairs
    data, evaluation = tmp_path / "01-data", tmp_path / "02-eval-policy-iter1"
    for folder in (data, evaluation):
        folder.mkdir()
    write_jsonl(data / "test.jsonl", [pair.to_json() for pair in test])
    write_jsonl(data / "train.jsonl", [pair.to_json() for pair in test[:3]])
    write_json(evaluation / "evaluation.json", {"role": "policy", "iteration": 1, "reward_accuracy": 0.5})
    rewards = [{"prompt_id": pair.prompt.id, "chosen": 2.0, "rejected": -1.0} for pair in test[1:]]  # one was too long
    write_jsonl(evaluation / "rewards.jsonl", rewards)
    (tmp_path / "recipe.yaml").write_text("recipe: reward\n")
    found = of(tmp_path)
    assert found["test"].scores == ["reward"] and len(found["train"].prompts) == 3
    told = {prompt.id: [row.scores.get("reward") for row in prompt.rows] for prompt in found["test"].prompts}
    assert told.pop(test[0].prompt.id) == [None, None] and set(map(tuple, told.values())) == {(2.0, -1.0)}
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "One reward model, trained on preference pairs and compared with people" in text


def test_embedded_json_cannot_end_its_element() -> None:
    value = ["</script>", "<!--<script>", "&lt;", "]]>", "\u2028"]
    text = str(embedded(value))
    assert not re.search(r"[<>&]", text) and json.loads(text) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        embedded(float("nan"))
