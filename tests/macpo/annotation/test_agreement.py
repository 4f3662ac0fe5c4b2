"""What is counted: against published examples, by hand, and from a study that was judged from end to end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import macpo

from macpo.annotation.agreement import (
    alpha,
    alpha_interval,
    cohen_kappa,
    compared,
    counts_of,
    majority,
    mean_interval,
    share_with_interval,
)
from macpo.annotation.design import Item
from macpo.annotation.judgements import Session, all_judgements
from macpo.annotation.results import write_result
from macpo.annotation.study import begin
from macpo.engine.errors import ConfigError, DataError
from macpo.engine.files import read_json, write_json, write_jsonl
from macpo.evaluation.summary import build_summary
from macpo.evaluation.uncertainty import sign_test
from macpo.report.page import write_report

Responses = Callable[..., Path]

# Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011, section C: four observers, twelve units, the values
# 1 to 5, nominal alpha 0.743. Each row has how often a unit got each value.
KRIPPENDORFF = [[3, 0, 0, 0, 0], [0, 3, 1, 0, 0], [0, 0, 4, 0, 0], [0, 0, 4, 0, 0], [0, 4, 0, 0, 0], [1, 1, 1, 1, 0]]
KRIPPENDORFF += [[0, 0, 0, 4, 0], [3, 1, 0, 0, 0], [0, 4, 0, 0, 0], [0, 0, 0, 0, 3], [2, 0, 0, 0, 0], [0, 0, 1, 0, 0]]


def test_krippendorffs_alpha_of_his_own_example() -> None:
    assert alpha(np.array(KRIPPENDORFF)) == pytest.approx(0.743, abs=5e-4)


def test_alpha_from_its_definition() -> None:
    """1 - D_o / D_e with D_o over the pairs of judgements of the same item, D_e over all pairs."""
    rng = np.random.default_rng(0)
    given = [[int(x) for x in rng.choice([1, 0, -1], size=rng.integers(1, 5), p=[0.5, 0.2, 0.3])] for _ in range(40)]
    pairable = [item for item in given if len(item) > 1]
    values = [value for item in pairable for value in item]
    observed = sum(
        sum(a != b for i, a in enumerate(item) for j, b in enumerate(item) if i != j) / (len(item) - 1)
        for item in pairable
    ) / len(values)
    expected = sum(a != b for i, a in enumerate(values) for j, b in enumerate(values) if i != j)
    expected /= len(values) * (len(values) - 1)
    assert alpha(counts_of(given)) == pytest.approx(1 - observed / expected, abs=1e-12)


def test_alpha_is_not_defined_without_disagreement_to_expect() -> None:
    assert alpha(counts_of([[1], [0], [-1]])) is None  # nobody shares an item
    assert alpha(counts_of([[1, 1], [1, 1]])) is None
    assert alpha(counts_of([[1, 1], [-1, -1]])) == 1


def half_agree(rng: np.random.Generator) -> Any:
    """Two people who agree on half of 120 items and else draw at random from two outcomes: alpha is about 0.5."""
    first = rng.choice([1, -1], size=120)
    second = np.where(rng.random(120) < 0.5, first, rng.choice([1, -1], size=120))
    return counts_of([[int(a), int(b)] for a, b in zip(first, second, strict=True)])


def test_the_interval_of_alpha_is_as_wide_as_alpha_varies() -> None:
    rng = np.random.default_rng(3)
    low, high = alpha_interval(half_agree(rng), 0) or (0, 0)
    assert low < 0.5 < high
    fresh = [found for _ in range(400) if (found := alpha(half_agree(rng))) is not None]
    assert high - low == pytest.approx(2 * 1.96 * np.std(fresh), rel=0.15)
    assert alpha_interval(counts_of([[1, 1]] * 5), 0) is None


def test_cohens_kappa_by_hand() -> None:
    # Of 50 items both say yes to 20 and no to 15: p_o = 0.7, p_e = 0.5 * 0.6 + 0.5 * 0.4.
    table = [((1, 1), 20), ((1, -1), 5), ((-1, 1), 10), ((-1, -1), 15)]
    first, second = zip(*[pair for pair, count in table for _ in range(count)], strict=True)
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa([1, 0, -1], [1, 0, -1]) == 1
    assert cohen_kappa([1, 1, 0, 0], [1, 0, 1, 0]) == pytest.approx(0)
    assert cohen_kappa([1, 1], [1, 1]) is None and cohen_kappa([], []) is None


# Newcombe, Statistics in Medicine 17, 1998, table I, method 3 (score without continuity correction).
@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval_of_published_examples(count: int, of: int, low: float, high: float) -> None:
    assert share_with_interval(count, of)["interval"] == pytest.approx([low, high], abs=5e-5)


def test_interval_of_a_mean() -> None:
    values = [1.0] * 60 + [0.5] * 20 + [0.0] * 40
    low, high = mean_interval(values, 0) or (0, 0)
    error = np.std(values) / np.sqrt(len(values))
    assert (low, high) == pytest.approx((np.mean(values) - 1.96 * error, np.mean(values) + 1.96 * error), abs=0.01)
    assert mean_interval([1.0] * 20, 0) == tuple(share_with_interval(20, 20)["interval"])
    assert mean_interval([0.5] * 20, 0) is None and mean_interval([1.0], 0) is None and mean_interval([], 0) is None


def test_majority() -> None:
    cases = [[1], [1, 1, -1], [1, -1], [1, 0, -1], [0, 0, 1], [1, 1, -1, -1], [-1, -1, 0, 1], [-1, -1, -1, 1, 0]]
    assert [majority(case) for case in cases] == [1, 1, 0, 0, 0, 0, 0, -1]


def test_compared_counts_winners_where_both_decide() -> None:
    found = compared({"a": 1, "b": -1, "c": 0, "d": 1}, {"a": 1, "b": 1, "c": 1, "d": 0, "e": 1})
    assert found["items"] == 4 and (found["decided"]["count"], found["decided"]["of"]) == (1, 2)


def say(study: Any, name: str, outcomes: Callable[[Item], str]) -> None:
    """One person's judgements; `outcomes` says which response: first, second, or a verdict without a side."""
    with Session(study, name) as session:
        while showing := session.current:
            said = outcomes(session.item(showing))
            if said in ("first", "second"):
                said = "left" if (said == "first") != showing.swapped else "right"
            session.judge(
                showing, said, comment="because" if said == "both-bad" else "", seconds=float(3 + session.done)
            )


@pytest.fixture
def study(responses: Responses, tmp_path: Path) -> Any:
    """Twenty items: for two people 10 wins, 5 losses, 5 ties; a third always says first, and skips one of five."""
    run = responses(tmp_path / "run", 20)
    study = begin(run, {"repeats": 0.25, "gold_checks": 0.2})
    number = {item.id: at for at, item in enumerate(study.items.values())}

    def honest(item: Item) -> str:
        at = number[item.id]
        if item.kind == "gold":
            return "first"
        return "first" if at < 10 else "second" if at < 15 else "both-bad" if at == 19 else "tie"

    say(study, "anna", honest)
    say(study, "ben", honest)
    say(study, "cas", lambda item: "skip" if number[item.id] % 5 == 4 else "second" if item.kind == "gold" else "first")
    return study


def test_a_study_counted_by_hand(study: Any) -> None:
    path, found = write_result(study)
    assert read_json(path) == json.loads(json.dumps(found)) and path.name == "annotation.json"
    (pair,) = found["pairs"]
    assert (pair["items"], pair["win"], pair["tie"], pair["lose"], pair["both_bad"]) == (20, 10, 5, 5, 1)
    # cas skips items 4, 9, 14 and 19; else a loss is (0 + 0 + 1) / 3, a tie (.5 + .5 + 1) / 3
    rates = [1.0] * 10 + [1 / 3] * 4 + [0.0] + [2 / 3] * 4 + [0.5]
    assert pair["win_rate"] == pytest.approx(sum(rates) / 20)
    assert pair["interval"][0] < pair["win_rate"] < pair["interval"][1]
    assert pair["sign_test"] == sign_test(10, 5) and pair["judgements"] == 20 * 3 - 4
    assert pair["verdict"] == "better"
    kappas = {tuple(row["people"]): (row["kappa"], row["items"]) for row in found["agreement"]["kappa"]}
    assert kappas[("anna", "ben")] == (1, 20) and kappas[("anna", "cas")] == (0, 16)
    by_hand = [[2 + (at % 5 != 4), 0, 0] for at in range(10)]
    by_hand += [[at % 5 != 4, 0, 2] for at in range(10, 15)] + [[at % 5 != 4, 2, 0] for at in range(15, 20)]
    assert found["agreement"]["alpha"] == pytest.approx(alpha(np.array(by_hand, int)))
    anna, cas = found["people"]["anna"], found["people"]["cas"]
    assert anna["judgements"] == 20 + 5 + 4 and anna["median_seconds"] == 3 + 14
    assert (anna["repeats_same"]["count"], anna["repeats_same"]["of"]) == (5, 5)
    assert anna["gold_right"]["share"] == 1 and cas["gold_right"]["share"] == 0 and cas["gold_right"]["of"] == 4
    assert cas["skipped"] >= 4 and cas["repeats_same"]["share"] == 1
    assert found["judges"] == found["scorers"] == [] and found["changed"] == []


def test_agreement_with_judges_and_scorers(study: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = study.folder.parent
    items = [item for item in study.items.values() if item.kind == "pair"]
    rows: list[dict[str, Any]] = []
    for at, item in enumerate(
        items
    ):  # student@0 wins 0 to 11 and loses 12 to 15; place A wins 16 and 17; then failures
        verdicts = ("A", "B") if at < 12 else ("B", "A") if at < 16 else ("A", "A") if at < 18 else ("A", None)
        for shown, verdict in zip((("student@0", "student@3"), ("student@3", "student@0")), verdicts, strict=True):
            row = {"prompt_id": item.prompt_id, "opponent": "student@3", "first": shown[0], "second": shown[1]}
            rows.append(row | {"verdict": verdict, "seconds": 0.1})
    # Rows of another pair, without a verdict, and of no comparison
    other = [{**rows[0], "second": "ceiling@0"}, {**rows[0], "verdict": ["A"]}, {"something": "else"}]
    (run / "judging" / "gpt").mkdir(parents=True)
    write_jsonl(run / "judging" / "gpt" / "student@0-vs-student@3.jsonl", [*rows, *other])
    for agent, sign in (("iter0", -1), ("iter3", 1)):
        folder = run / f"09-score-rm-hh-student-{agent}"
        folder.mkdir()
        scores = [
            {"prompt_id": item.prompt_id, "score": sign * (14.5 - at), "tokens": 3} for at, item in enumerate(items)
        ]
        write_jsonl(folder / "scores.jsonl", scores)
    _, found = write_result(study)
    (gpt,) = found["judges"]
    # To people student@0 wins items 10 to 14; 15 to 19 are ties. Of 0 to 15 without 15 they agree on 10 and 11 alone.
    assert (gpt["name"], gpt["items"]) == ("gpt", 18)
    assert (gpt["decided"]["count"], gpt["decided"]["of"]) == (2, 15)
    (rm,) = found["scorers"]
    assert rm["name"] == "rm-hh" and rm["items"] == 20
    assert (rm["decided"]["count"], rm["decided"]["of"]) == (10, 15)
    assert macpo("annotate", run, "--report") == 0
    out = capsys.readouterr().out
    for text in (
        "judge gpt, student@3 : student@0: the same winner in 2 of 15 that both decide",
        "scorer rm-hh, student@3 : student@0: the same winner in 10 of 15 that both decide",
        "Cohen's kappa 1.000: anna and ben, 20 items",
        "student@3 : student@0: 1 called both bad by somebody",
    ):
        assert text in out
    assert out.splitlines()[1].split()[:6] == ["student@3", "student@0", "20", "10", "5", "5"]


def test_the_report_shows_what_people_said(study: Any, caplog: pytest.LogCaptureFixture) -> None:
    run = study.folder.parent
    write_json(run / "summary.json", build_summary({}, [], 0, {}))
    assert "Judged by people" not in write_report(run).read_text()
    path, found = write_result(study)
    assert read_json(path)["sources"] == study.content.sources
    text = re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", write_report(run).read_text()))
    rate, (low, high) = found["pairs"][0]["win_rate"], found["pairs"][0]["interval"]
    assert f"student@3 student@0 20 10 5 5 {rate:.3f} [{low:.3f}, {high:.3f}] better" in text
    assert "3 people compared" in text and "choice on gold checks: 8 of 12" in text and "anna" not in text
    assert "have changed" not in text
    responses = run / "02-eval-student-iter0" / "evaluation.jsonl"
    responses.write_text(responses.read_text().replace("student@0 says", "now says"))
    assert "the run’s responses of student@0 have changed since people saw them" in write_report(run).read_text()
    path.write_text('{"pairs": 3}')
    assert "Judged by people" not in write_report(run).read_text()
    assert "annotation.json is ignored: it has another shape" in caplog.text


def test_without_judgements_there_is_nothing_to_count(responses: Responses, tmp_path: Path) -> None:
    study = begin(responses(tmp_path / "run", 4), {})
    with Session(study, "anna"):
        pass
    with pytest.raises(DataError, match="there are no judgements"):
        write_result(study)


def test_label_studio_there_and_back(study: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, file = study.folder.parent, tmp_path / "tasks.json"
    assert macpo("annotate", run, "--export", "label-studio", file) == 0
    assert '<Pairwise name="comparison" toName="response1,response2"/>' in capsys.readouterr().out
    tasks = read_json(file)
    assert len(tasks) == 24 and {tuple(task["data"]) for task in tasks} == {
        ("item", "prompt", "response1", "response2")
    }
    assert {task["data"]["response1"].split()[0] for task in tasks} > {"student@0", "student@3"}  # sides are drawn

    for at, task in enumerate(tasks):  # as labelstud.io/guide/task_format and its Pairwise and Choices tags have it
        item = study.items[task["data"]["item"]]
        side = "left" if task["data"]["response1"] == item.answers[0] else "right"
        chosen = {
            "type": "pairwise",
            "from_name": "comparison",
            "to_name": "response1,response2",
            "value": {"selected": side},
        }
        tie = {"type": "choices", "from_name": "verdict", "value": {"choices": ["both-bad"]}}
        result = [chosen] if at % 2 == 0 else [tie]
        by: Any = 7 if at < 20 else {"id": 7, "email": "x@y.z"}
        task["annotations"] = [{"completed_by": by, "result": result, "was_cancelled": False, "lead_time": 4.5}]
        task["annotations"] += [{"completed_by": 8, "result": [], "was_cancelled": at < 3, "lead_time": 1}]
    write_json(file, tasks)
    assert macpo("annotate", run, "--import", file) == 0
    assert "24 judgements as label-studio-7\nimported: 3 judgements as label-studio-8" in capsys.readouterr().out
    found = all_judgements(study)
    assert [each.outcome for each in found["label-studio-7"]] == [1, 0] * 12
    assert [each.verdict for each in found["label-studio-8"]] == ["skip"] * 3
    with pytest.raises(ConfigError, match="holds judgements from label-studio"):
        Session(study, "label-studio-7")
    assert macpo("annotate", run, "--import", file) == 2
    assert "label-studio-7.jsonl: these judgements are here already" in capsys.readouterr().err
    assert write_result(study)[1]["people"]["label-studio-7"]["median_seconds"] == 4.5

    for broken, problem in [
        ({"tasks": []}, "not a list of tasks"),
        ([{"data": {"item": "x"}, "annotations": []}], "no task has a judgement of this study"),
        ([{"id": 3}], "task 1 is not as Label Studio exports it"),
        ([{**tasks[0], "annotations": [{"completed_by": 9, "result": [{"type": "pairwise", "value": 3}]}]}], "task 1"),
    ]:
        write_json(file, broken)
        assert macpo("annotate", run, "--import", file) == 3
        assert problem in capsys.readouterr().err


def test_argilla_records(study: Any, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    assert macpo("annotate", study.folder.parent, "--export", "argilla", file) == 0
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert {record["id"] for record in records} == study.items.keys()
    for record in records:
        item = study.items[record["id"]]
        assert set(record) == {"id", "prompt", "response1", "response2"} and record["prompt"].startswith(
            "user: question "
        )
        assert {record["response1"], record["response2"]} == set(item.answers)
