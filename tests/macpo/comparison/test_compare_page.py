"""The page of `macpo compare`: what judges found stands there with their biases, whatever the seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from macpo.comparison.ledger import Ledger
from macpo.comparison.results import METHOD, NAIVE, Results, Row
from macpo.evaluation.uncertainty import Estimate
from macpo.judging.questions import Comparison
from macpo.judging.results import Judging, result_of
from macpo.judging.verdicts import Judgement, Order
from macpo.report.comparison import write_comparison
from macpo.report.judged import shown_of

FOUND = Results(
    metric="gold",
    seeds=(3, 4),
    num_prompts=8,
    gap=None,
    rows=(
        Row(NAIVE, "method", Estimate(0.5, 0.4, 0.6)),
        Row(METHOD, "method", Estimate(0.7, 0.6, 0.8), Estimate(0.2, 0.1, 0.3, 0.01), 0.01),
    ),
    curve=(),
)


def page(folder: Path, judges: dict[int, list[Judging]]) -> str:
    shown = {seed: [shown_of(f"judge-{seed}", each) for each in found] for seed, found in judges.items()}
    return write_comparison(folder, FOUND, {3: [], 4: []}, shown).read_text()


def test_judges_stand_under_their_seed_with_place_and_length(tmp_path: Path) -> None:
    longer_first = [Judgement(Comparison(f"p{n}", (), "a b c", "a"), Order("A"), Order("A")) for n in range(6)]
    longer_first += [Judgement(Comparison(f"q{n}", (), "a b c", "a"), Order("A"), Order("B")) for n in range(2)]
    judging = Judging(judge={"model": "m"}, title="m by log-probs", results=(result_of(longer_first, "x", "y"),))
    text = page(tmp_path, {3: [], 4: [judging]})
    section = text[text.index('id="judging"') : text.index('id="why"')]
    assert "judge-4" in section and "<h3>Seed 4</h3>" in section and "<h3>Seed 3</h3>" not in section
    cells = section.split("<tbody>")[1].replace("</td>", "").split("<td")
    assert [cell.partition(">")[2] for cell in cells[3:6]] == ["2", "6", "0"], "a judge that prefers the first place"
    assert any("0.875" in cell for cell in cells), "the first place wins 14 of 16"
    assert "not validated" in section


def test_a_comparison_without_a_judge_says_how_to_ask_one(tmp_path: Path) -> None:
    text = page(tmp_path, {3: [], 4: []})
    assert "No judge was asked" in text and "macpo evaluate" in text


def test_what_an_arm_takes_and_the_length_of_its_responses_stand_beside_its_score(tmp_path: Path) -> None:
    ledger = Ledger(human_labels=1200, generated=34_567, scored=89, trained=1_234_567, student_steps=252, flop=6.16e11)
    row = Row(
        METHOD, "method", Estimate(0.7, 0.6, 0.8), Estimate(0.2, 0.1, 0.3, 0.01), 0.01, words=23.44, ledger=ledger
    )
    found = replace(FOUND, rows=(FOUND.rows[0], row, Row("rlaif", "method", left_out="it asks in words")))
    text = write_comparison(tmp_path, found, {3: [], 4: []}, {}).read_text()
    section = text[text.index('id="methods"') : text.index('id="judging"')]
    scores, _, taken = section.partition("What each takes")
    assert "left out: it asks in words" in scores and NAIVE in scores
    cells = [cell.partition(">")[2] for cell in taken.split("<tbody>")[1].replace("</td>", "").split("<td")[1:]]
    assert [cell.split("</tr>")[0].strip() for cell in cells] == [
        "0.700", "23.4", "1,200", "34,567", "89", "1,234,567", "252", "6.2e+11",
    ]  # fmt: skip
