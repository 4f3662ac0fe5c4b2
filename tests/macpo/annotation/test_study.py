"""What is shown to whom, and what the files keep of it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from commands import macpo

from macpo.annotation.design import Design, Item, deal, share, showings
from macpo.annotation.judgements import Session, all_judgements
from macpo.annotation.server import state
from macpo.annotation.study import Study, begin, open_study
from macpo.engine.errors import ConfigError, DataError, IntegrityError
from macpo.engine.files import write_jsonl
from macpo.report.run_reader import RunReader

Responses = Callable[..., Path]
PAIR = ("student@3", "student@0")


def design(**settings: Any) -> Design:
    return Design.model_validate({"pairs": [PAIR], **settings})


def items(count: int, kind: str = "pair") -> list[Item]:
    return [
        Item.model_validate(
            {
                "id": f"{kind}{i}",
                "kind": kind,
                "policies": PAIR,
                "prompt_id": str(i),
                "prompt": [],
                "answers": ["a", "b"],
            }
        )
        for i in range(count)
    ]


# One person, all of three, all pairs of people (3, 5), the smallest projective plane (7), what no plan divides (8).
@pytest.mark.parametrize(("people", "judges"), [(1, 1), (3, 3), (3, 2), (5, 2), (7, 3), (8, 5), (10, 1)])
def test_items_are_dealt_out_evenly(people: int, judges: int) -> None:
    count = 210
    settings = design(annotators=people, overlap=judges / people, seed=5)
    assert settings.judges == judges
    dealt = deal([*items(count), *items(4, "gold")], settings)
    assert {tuple(each[-4:]) for each in dealt} == {("gold0", "gold1", "gold2", "gold3")}
    sets = [set(each[:-4]) for each in dealt]
    loads = [len(each) for each in sets]
    assert max(loads) - min(loads) <= 1 and sum(loads) == count * judges
    assert set(Counter(item for each in sets for item in each).values()) == {judges}
    shared = [len(a & b) for a, b in combinations(sets, 2)]
    assert not shared or max(shared) - min(shared) <= 3


def test_overlap_is_rounded_to_whole_people() -> None:
    found = [design(annotators=3, overlap=overlap).judges for overlap in (0.1, 0.34, 0.5, 0.67, 1)]
    assert found == [1, 1, 2, 2, 3]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"overlap": 0}, "greater than 0"),
        ({"pairs": [("student@3", "student")]}, "paired with itself"),
        ({"pairs": [PAIR, PAIR[::-1]]}, "named twice"),
        ({"prompts": 0}, "greater than or equal to 1"),
    ],
)
def test_a_design_that_makes_no_sense_is_refused(
    settings: dict[str, Any], problem: str, responses: Responses, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=problem):
        begin(responses(tmp_path / "run", 3), settings)


def test_repeats_come_half_of_the_way_later_with_the_sides_swapped() -> None:
    names, gold = [f"i{i}" for i in range(200)], frozenset({"i3", "i4", "i5"})
    orders = []
    for person in range(3):
        shown = showings(names, gold, person, design(seed=2))
        first = {showing.item: at for at, showing in enumerate(shown) if not showing.repeat}
        again = {showing.item: at for at, showing in enumerate(shown) if showing.repeat}
        assert first.keys() == set(names) and len(again) == share(197, 0.1) == 20 and not again.keys() & gold
        assert len({showing.id for showing in shown}) == len(shown)
        for item, at in again.items():
            assert at - first[item] >= 100 and shown[at].swapped is not shown[first[item]].swapped
        assert 70 <= sum(showing.swapped for showing in shown if not showing.repeat) <= 130
        assert shown == showings(list(reversed(names)), gold, person, design(seed=2))
        orders.append([showing.item for showing in shown])
    assert orders[0] != orders[1] != orders[2]


def test_the_study_is_fixed_when_it_is_begun(responses: Responses, tmp_path: Path) -> None:
    run = responses(tmp_path / "run", 30, lambda policy, i: f"{policy if i > 3 else 'nobody'} {i}")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    study = begin(run, {"prompts": 20, "pairs": [PAIR, ("ceiling", "student")], "gold_checks": 0.1, "seed": 4})
    kinds = Counter((item.kind, item.policies) for item in study.items.values())
    equal = len(study.equal["student@3:student@0"])
    assert equal and study.equal["student@3:student@0"] == study.equal["ceiling@0:student@3"]
    assert kinds[("pair", PAIR)] == kinds[("pair", ("ceiling@0", "student@3"))] == 20 - equal
    prompts = [
        {item.prompt_id for item in study.items.values() if item.policies == pair} for pair in study.design.pairs
    ]
    assert prompts[0] == prompts[1]  # every pair is judged on the same prompts
    gold = [item for item in study.items.values() if item.kind == "gold"]
    assert len(gold) == share(2 * (20 - equal), 0.1) and not {item.prompt_id for item in gold} & prompts[0]
    assert all(item.answers[0].startswith("right") and item.answers[1].startswith("wrong") for item in gold)
    assert {path: path.read_bytes() for path in before} == before and len(RunReader(run).stages) == 4

    assert study.extent() == f"20 prompts, {2 * (20 - equal)} pairs of responses that differ"
    few = begin(responses(tmp_path / "few", 3), {})
    assert few.extent() == "3 prompts (of 100: the run has no more), 3 pairs of responses that differ"
    content = (run / "annotation" / "items.json").read_bytes()
    assert begin(run, {}).digest == begin(run, {"prompts": 20, "seed": 4}).digest == study.digest
    with pytest.raises(ConfigError, match=r"--prompts: the study was begun with 20\. Fix: leave the option out"):
        begin(run, {"prompts": 21})
    with pytest.raises(ConfigError, match=r"begun with student@3:student@0,ceiling@0:student@3"):
        begin(run, {"pairs": [PAIR]})
    assert (run / "annotation" / "items.json").read_bytes() == content
    other = responses(tmp_path / "moved", 30, lambda policy, i: f"{policy if i > 3 else 'nobody'} {i}")
    assert (
        begin(other, {"prompts": 20, "pairs": study.design.pairs, "gold_checks": 0.1, "seed": 4}).digest == study.digest
    )

    path = run / "03-eval-student-iter3" / "evaluation.jsonl"
    write_jsonl(path, [json.loads(line) | {"answer": "new"} for line in path.read_text().splitlines()])
    with pytest.raises(ConfigError, match="the run has other responses of student@3 now"):
        begin(run, {})
    assert open_study(run).changed() == ["student@3"]
    for damaged in (b"{}", content.replace(b'"version": 1', b'"version": 2'), content[:-20]):
        (run / "annotation" / "items.json").write_bytes(damaged)
        with pytest.raises(IntegrityError, match=r"items.json: not what `macpo annotate` wrote"):
            open_study(run)


def test_runs_that_cannot_be_judged_are_refused_by_name(responses: Responses, tmp_path: Path) -> None:
    same = responses(tmp_path / "same", 5, lambda policy, i: f"response {i}")
    with pytest.raises(DataError, match="--pairs: no two responses differ"):
        begin(same, {})
    with pytest.raises(ConfigError, match=r"no evaluated policy 'student@2'\. Fix: use one of ceiling@0, student@0"):
        begin(same, {"pairs": [("student@2", "student@0")]})
    with pytest.raises(DataError, match="nobody has been asked about this run"):
        open_study(same)
    without = responses(tmp_path / "without", 5)
    (without / "01-data" / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"no human test pairs\. Fix: leave out --gold-checks"):
        begin(without, {"gold_checks": 0.5})
    (without / "02-eval-student-iter0" / "evaluation.jsonl").unlink()  # as of a standalone recipe
    with pytest.raises(
        DataError, match=r"student@0 has no responses that can be compared\. Fix: name policies of a run"
    ):
        begin(without, {})
    for stage in ("02-eval-student-iter0", "03-eval-student-iter3"):
        (without / stage).rename(tmp_path / stage)
    with pytest.raises(ConfigError, match=r"--pairs: the run has no student at two iterations\. Fix: name policies"):
        begin(without, {})


def judge_all(study: Study, name: str, verdict: Callable[[Item, bool], str], most: int = 1000) -> None:
    """`verdict(item, whether the second policy is on the left)`."""
    with Session(study, name) as session:
        while (showing := session.current) and session.done < most:
            session.judge(showing, verdict(session.item(showing), showing.swapped), seconds=2.0)


def test_every_person_has_a_file_and_a_place(responses: Responses, tmp_path: Path) -> None:
    study = begin(responses(tmp_path / "run", 12), {"annotators": 2, "overlap": 0.5, "repeats": 0.25})
    judge_all(study, "anna", lambda item, swapped: "left", most=3)
    judge_all(study, "ben", lambda item, swapped: "right")
    judge_all(study, "anna", lambda item, swapped: "tie")
    found = all_judgements(study)
    assert [j.verdict for j in found["anna"]] == ["left"] * 3 + ["tie"] * 5
    assert [len(each) for each in found.values()] == [8, 8]  # 6 items and 2 repeats each
    assert not {j.item for j in found["anna"]} & {j.item for j in found["ben"]}
    with pytest.raises(ConfigError, match="--annotator: the study has anna, ben as its people"):
        Session(study, "cas")
    for name in ("../anna", "", "a b", "-x", "a" * 65):
        with pytest.raises(ConfigError, match="use letters, digits"):
            Session(study, name)
    assert {path.name for path in study.folder.iterdir()} == {"items.json", "anna.jsonl", "ben.jsonl", "cas.jsonl"}


def test_a_file_cut_at_any_byte_goes_on_after_its_last_whole_row(responses: Responses, tmp_path: Path) -> None:
    study = begin(responses(tmp_path / "run", 6), {"repeats": 0})
    with Session(study, "anna") as session:
        for verdict in ("left", "tie", "both-bad"):
            showing = session.current
            assert showing
            session.judge(showing, verdict, comment="Größe \u2028 1", seconds=1.5)
        assert session.undo() and session.done == 2
        assert showing == session.current
    path = study.folder / "anna.jsonl"
    content = path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(content) if byte == 10]
    standing = [0, 1, 2, 3, 2]  # judgements after each row
    for cut in sorted({*ends, *range(ends[0], len(content), 11)}):
        path.write_bytes(content[:cut])
        rows = sum(end <= cut for end in ends)
        assert len(all_judgements(study)["anna"]) == standing[rows - 1]  # read while somebody writes
        assert path.read_bytes() == content[:cut]
        with Session(study, "anna") as session:
            assert session.done == standing[rows - 1]
        assert path.read_bytes() == content[: ends[rows - 1]]


def test_the_page_gets_texts_and_no_names(responses: Responses, tmp_path: Path) -> None:
    run = responses(tmp_path / "run", 3, lambda policy, i: f"{'blue' if policy == 'student@3' else 'red'}\u202e {i}")
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    for path in run.glob("*-eval-*/evaluation.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        write_jsonl(path, [row | {"prompt": [*row["prompt"], call]} for row in rows])
    with Session(begin(run, {"repeats": 0, "gold_checks": 0.3}), "anna") as session:
        seen = []
        while showing := session.current:
            seen.append(state(session))
            session.judge(showing, "left")
    assert not re.search("student|ceiling|chosen|gold|swapped|repeat|pair", json.dumps(seen))
    shown = [each["showing"] for each in seen if "right 0" not in json.dumps(each) and "wrong" not in json.dumps(each)]
    assert len(shown) == 3 and {frozenset((s["left"]["text"][:4], s["right"]["text"][:4])) for s in shown} == {
        frozenset(("blue", "red\ufffd"))
    }
    assert [turn["role"] for turn in shown[0]["turns"]] == ["user", "assistant"]
    assert shown[0]["turns"][1]["text"] == '{"tool_calls": [{"name": "look"}]}'


def test_rows_that_do_not_fit_are_named(responses: Responses, tmp_path: Path) -> None:
    study = begin(responses(tmp_path / "run", 6), {})
    judge_all(study, "anna", lambda item, swapped: "left", most=2)
    path = study.folder / "anna.jsonl"
    content = path.read_text()
    head, first, second = content.splitlines()
    for changed, problem in [
        (content.replace(study.digest, "0" * 64), "belongs to another study"),
        (f"{head}\n{first}\n{first}\n", r"anna.jsonl:3: not a row"),
        (f"{head}\n{first.replace('left', 'above')}\n", r"anna.jsonl:2: not a row"),
        (f"{first}\n{second}\n", r"anna.jsonl:1: not a row"),
        (f"{head}\nnonsense\n", r"a line is not JSON"),
        (f'{head}\n{{"row": "undo", "showing": "none"}}\n', r"anna.jsonl:2: not a row"),
    ]:
        path.write_text(changed)
        with pytest.raises(IntegrityError, match=problem):
            all_judgements(study)


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["--pairs", "student@3"], 2, "--pairs: got 'student@3'. Fix: write two policies like student@3:student@0"),
        (["--report", "--annotator", "x"], 2, "--annotator does not go with --report"),
        (["--report", "--prompts", "3"], 2, "--prompts does not go with --report"),
        (["--import", "x.json", "--seed", "3"], 2, "--seed does not go with --import"),
        (["--export", "csv", "x"], 2, "--export: got 'csv'. Fix: use label-studio or argilla"),
        (["--report"], 3, "nobody has been asked about this run. Fix: start `macpo annotate RUN` first"),
        (["--overlap", "1.5"], 2, "--overlap: Input should be less than or equal to 1"),
        (["--port", "70000"], 2, "--port: port 70000 cannot be used"),
        (["--annotator", "a/b"], 2, "--annotator: got 'a/b'"),
    ],
)
def test_the_command_names_what_is_wrong(
    words: list[str], code: int, line: str, responses: Responses, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert macpo("annotate", responses(tmp_path / "run", 3), *words) == code
    err = capsys.readouterr().err
    (problem,) = [each for each in err.splitlines() if not each.startswith("3 prompts")]
    assert line in problem and problem.startswith("error: ")
