"""`macpo.Run`: what the files of a run say, as DataFrames with the columns that docs/python.md lists."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from standalone_runs import unpack_runs
from tiny import ARMS, EVIL, LEVELS, make_run

import macpo
from macpo.engine.errors import DataError
from macpo.engine.files import write_json, write_jsonl
from macpo.notebook import frames

FRAMES = ("scores", "responses", "pairs", "candidates", "steps", "stages")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("results") / "run")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> macpo.Run:
    return macpo.Run(unpack_runs(tmp_path_factory.mktemp("real")) / "macpo")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_are_those_of_the_summary(folder: Path) -> None:
    found = macpo.Run(folder).scores()
    assert len(found) == 4 * 4 + 1 + (1 + 4 + 4 + 4)
    summary = json.loads((folder / "summary.json").read_text())
    student = found[(found.arm == "") & (found.agent == "student")]
    assert student.gold.tolist() == [row["gold"] for row in summary["agents"]["student"]["scores"]]
    assert student.iteration.tolist() == [0, 1, 2, 3] and set(student.role) == {"student"}
    assert set(found.arm) == {"", *ARMS} and set(found[found.arm == ""].agent) == set(LEVELS)


def test_responses_stand_beside_their_prompts_and_scores(folder: Path) -> None:
    run = macpo.Run(folder)
    found = run.responses()
    assert len(found) == 60 * len(run.scores())
    (path,) = (each for each in folder.glob("*-eval-student-iter2/evaluation.jsonl") if "." not in each.parent.name)
    written = rows(path)
    mine = found[(found.arm == "") & (found.agent == "student") & (found.iteration == 2)]
    assert mine.response.tolist() == [row["answer"] for row in written]
    assert mine.messages.tolist() == [row["prompt"] for row in written]
    assert mine.prompt.tolist() == [row["prompt"][0]["content"] for row in written]
    scores = run.scores().set_index(["arm", "agent", "iteration"])
    assert mine.gold.mean() == pytest.approx(scores.gold["", "student", 2])


def test_a_scorers_scores_stand_beside_the_responses_that_it_scored(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_test=4)
    scored = next(run.glob("*-eval-student-iter3"))
    (run / "90-eval-my-student-iter3").mkdir()
    write_json(run / "90-eval-my-student-iter3" / "evaluation.json", {"iteration": 3})
    stages = ("91-score-length-student-iter3", "92-score-length-my-student-iter3", "93-score-b-teacher0-iter0")
    for value, name in enumerate(stages):
        (run / name).mkdir()
        told = [{"prompt_id": row["prompt_id"], "score": value} for row in rows(scored / "evaluation.jsonl")]
        write_jsonl(run / name / "scores.jsonl", told)
    found = macpo.Run(run).responses()
    mine = found[(found.arm == "") & (found.agent == "student") & (found.iteration == 3)]
    assert mine.score_length.tolist() == [0] * 4
    assert found[found.agent == "teacher0"].score_b.count() == 4 and found.score_length.count() == 4


def test_pairs_and_candidates_of_a_run(real: macpo.Run) -> None:
    pairs, candidates = real.pairs(), real.candidates()
    (stage,) = real.folder.glob("*[0-9]-iter1-student-select")
    mine = pairs[(pairs.arm == "") & (pairs.agent == "student")]
    written = rows(stage / "pairs.jsonl")
    assert mine.chosen.tolist() == [row["chosen"] for row in written] and set(mine.iteration) == {1}
    assert set(pairs[pairs.arm == ""].agent) == {"student", "teacher0", "teacher1"}
    assert set(pairs[pairs.arm == "own-positives"].chosen_by) <= {"student", "teacher0", "teacher1"}

    asked = candidates[candidates.arm == ""]
    assert len(asked) == sum(len(row["candidates"]) for row in rows(stage / "scores.jsonl"))
    assert asked.groupby("prompt_id").kept.sum().eq(1).all()
    kept = asked[asked.kept].merge(mine, on="prompt_id", suffixes=("", "_pair"))
    assert len(kept) == len(mine) and (kept.response == kept.chosen).all() and (kept.prompt == kept.prompt_pair).all()
    best = asked.groupby("prompt_id").perplexity.min()
    assert (asked[asked.kept].set_index("prompt_id").perplexity == best).all()


def test_steps_and_stages_of_a_run(real: macpo.Run) -> None:
    steps, stages = real.steps(), real.stages()
    (path,) = real.folder.glob("27-iter1-student-train/metrics.jsonl")
    mine = steps[(steps.arm == "") & (steps.stage == "iter1-student-train")]
    assert mine.loss.tolist() == [row["loss"] for row in rows(path)] and set(mine.agent) == {"student"}
    assert len(stages) == 50 and stages.seconds.gt(0).any()
    trained = stages[(stages.arm == "") & (stages.stage == "iter1-student-train")].iloc[0]
    assert trained.tokens == json.loads((path.parent / "timing.json").read_text())["counts"]["tokens"]
    assert stages[stages.stage == "eval-teacher1-iter1"].iteration.tolist() == [1, 1]


def test_an_unfinished_run_shows_what_is_committed(tmp_path: Path) -> None:
    run = macpo.Run(make_run(tmp_path / "run", finished=False))
    assert not run.finished and set(run.scores()[lambda s: s.agent == "student"].iteration) == {0, 1}
    assert repr(run).endswith("stages, not finished")
    (tmp_path / "empty").mkdir()
    nothing = macpo.Run(tmp_path / "empty")
    for name in FRAMES:
        assert list(getattr(nothing, name)().columns) == list(getattr(frames, name.upper())) and nothing.stages().empty
    assert "0 stages" in nothing._repr_html_()


def test_a_notebook_shows_the_headline_score_by_iteration_and_nothing_that_it_would_run(tmp_path: Path) -> None:
    page = macpo.Run(make_run(tmp_path / "run", evil=True))._repr_html_()
    assert "gold score" in page and page.count("<tr") > 10 and "<img" not in page and EVIL not in page


def test_there_is_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such run folder"):
        macpo.Run(tmp_path / "nowhere")


def test_a_file_that_was_changed_is_refused(real: macpo.Run) -> None:
    path = real.folder / "35-eval-student-iter1" / "evaluation.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"door", b"roof", 1))
    try:
        with pytest.raises(macpo.MacpoError, match=r"evaluation\.jsonl"):
            real.responses()
    finally:
        path.write_bytes(whole)


PAGE = (Path(__file__).parents[3] / "docs" / "python.md").read_text()


@pytest.mark.parametrize("name", FRAMES)
def test_the_page_lists_the_columns_of(name: str, real: macpo.Run) -> None:
    frame: Callable[[], pd.DataFrame] = getattr(real, name)
    (row,) = re.findall(rf"^\| `{name}\(\)` \| (.*?) \| (.*?) \|", PAGE, flags=re.M)
    always, further = (re.findall(r"`(\w+)`", cell) for cell in row)
    assert always == list(getattr(frames, name.upper())) == list(frame().columns)[: len(always)]
    assert set(further) <= set(frame().columns) | {"gold", "gold_se", "score_NAME"}, "the demo world's and scorers' own"
