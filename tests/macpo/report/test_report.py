"""The report of a run and of several seeds, on a run folder written here in the contract's formats."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import make_run

from macpo.engine.errors import DataError, IntegrityError
from macpo.engine.files import write_json
from macpo.evaluation.claims import Claim, claims
from macpo.evaluation.prompt_scores import ScoredRun
from macpo.evaluation.summary import AgentHistory, build_summary
from macpo.evaluation.uncertainty import Estimate
from macpo.report.findings import MARKS, headline, table
from macpo.report.page import write_report, write_seeds_report
from macpo.report.run_reader import RunReader


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page; fails on a closing tag that closes nothing."""

    VOID = ("meta", "path", "use", "br", "rect", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts[-1] += data
        elif "style" not in self.open:
            self.text += data

    @property
    def collections(self) -> dict[str, dict[str, Any]]:
        """What the browser of responses shows, by name."""
        return {each["name"]: each for each in json.loads(self.scripts[0])["collections"]}


def page_of(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert not page.open
    return page


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "run", num_test=12)


@pytest.fixture(scope="module")
def page(run_dir) -> Page:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return page_of(path)


def test_report_says_what_was_found_and_what_does_not_hold(page):
    assert "The student rose from 0.689 (naive weak-label SFT) to 0.909 after 3 iterations" in page.text
    assert "3 of 3 teachers rose" in page.text and "(PGR)" in page.text
    assert "The final student is below the ablation filtered-sft" in page.text
    assert "best iteration was 2 (0.919), not the last" in page.text


def test_what_the_interval_leaves_open_has_a_neutral_mark(page, run_dir):
    found = claims([RunReader(run_dir).scored])
    kinds = [attrs["class"] for tag, attrs in page.tags if tag == "li" and attrs.get("class") in MARKS.values()]
    assert kinds == [MARKS[claim.verdict] for claim in found]
    assert kinds.count("good") == 2 and kinds.count("open") == 7  # twelve prompts show little
    for claim in found:
        low, high = claim.interval
        assert (low > 0 or high < 0) or MARKS[claim.verdict] == "open"
        assert f"95% interval {low:+.3f} to {high:+.3f} over prompts" in page.text
    assert page.text.count("which covers 0: inconclusive") == sum(claim.estimate.sign == 0 for claim in found)
    assert not [attrs for _, attrs in page.tags if attrs.get("class") == "down"]
    assert [attrs.get("class") for _, attrs in page.tags].count("up") == 2  # only what holds is green


def test_report_shows_every_part_of_the_run(page, run_dir):
    for part in ("Gold score by iteration", "Held-out metrics", "Responses", "Training pairs"):
        assert part in page.text
    summary = json.loads((run_dir / "summary.json").read_text())
    for agent in summary["agents"].values():
        for row in agent["scores"]:
            for metric in ("gold", "preference_accuracy", "reward_margin", "logp_margin", "distinct_2"):
                assert f"{row[metric]:.3f}" in page.text
    for stage in summary["stages"]:
        assert stage["name"] in page.text
    assert "median perplexity" in page.text and "not kept" in page.text and "rejected" in page.text
    text = re.sub(r"\s+", " ", page.text)
    assert re.search(r"data, input: identical ?17", text) and "all stages: resampled" in text
    assert "empty responses resampled" in page.text and "12 prompts appear in two rows" in page.text
    assert "seed 200" in page.text and "torch 2.13.0" in re.sub(r"\s+", " ", page.text)
    assert "iterations: 3" in page.text  # the recipe
    charts = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(charts) == 4 + 4 + 5 + 1  # scores, final, preference, style; DPO by agent; SFT by agent; time


def test_training_stages_have_their_speed_and_spikes_their_marks(page):
    """Half of the steps take 0.5 s and half 0.25 s, 900 tokens each: 2,400 tokens/s, not the mean of the rates."""
    text = re.sub(r"\s+", " ", page.text)
    head = "stage seconds tokens tokens/s pairs/s sequences/s MFU peak memory"
    assert head.replace(" ", "") in text.replace(" ", "")
    student = re.search(r"iter2-student-train ?([\d.]+) ?225,000 ?2,400 ?42\.7 ?33\.3% ?1\.25 GB", text)
    assert student and re.search(r"init-student-positive ?[\d.]+ ?54,000 ?2,400 ?42\.7 ?33\.3% ?1\.06 GB", text)
    assert "× marks a loss spike" in text and "iter2-student-train step 150 (9.3)." in text
    crosses = [attrs for tag, attrs in page.tags if tag == "use" and "stroke-width: 1.8" in (attrs.get("style") or "")]
    assert len(crosses) == 1


def test_every_response_to_every_test_prompt_is_there_with_its_score(page, run_dir):
    test = page.collections["test"]
    assert [prompt[0] for prompt in test["prompts"]] == sorted(prompt[0] for prompt in test["prompts"])
    assert "Test prompts: all 12 prompts are shown" in page.text and test["scores"] == ["gold score"]
    found = {
        (source["arm"], source["agent"], source["iteration"], prompt[0]): (prompt[1], row[1], row[2], row[3])
        for prompt in test["prompts"]
        for row in prompt[2]
        for source in [test["sources"][row[0]]]
    }
    evaluations = RunReader(run_dir).all_evaluations
    assert len(evaluations) == 4 * 4 + 1 + 1 + 3 * 4 and len(found) == 12 * len(evaluations)
    for evaluation in evaluations:
        for row in evaluation.rows():
            shown = found[evaluation.folder.arm, evaluation.agent, evaluation.iteration, row["prompt_id"]]
            turns = [[turn["role"], turn["content"]] for turn in row["prompt"]]
            assert shown == (turns, row["answer"], int(row["finished"]), [round(row["gold"], 4)])
    plain = page.text.split("Test prompts, the first 3")[1].split("Training pairs, the first 3")[0]
    assert plain.count("iteration 3") == 3 * (4 + 3) and plain.count("ceiling") == 3


def test_every_candidate_stands_beside_the_kept_one(page, run_dir):
    train = page.collections["train"]
    rows = [json.loads(line) for line in next(run_dir.glob("*-iter1-student-select/scores.jsonl")).open()]
    shown = {prompt[0]: prompt for prompt in train["prompts"]}
    assert len(shown) == 40 and train["scores"] == ["perplexity"] and train["judged"] == -1
    for row in rows:
        found = [
            (source["agent"], source["kind"], row_[1], row_[3][0])
            for row_ in shown[row["prompt_id"]][2]
            for source in [train["sources"][row_[0]]]
            if source["group"] == "pairs of student, iteration 1" and source["kind"] in ("kept", "lost")
        ]
        assert found == [
            (each["by"], "kept" if index == row["kept"] else "lost", each["text"], round(each["perplexity"], 4))
            for index, each in enumerate(row["candidates"])
        ]
    assert "No scorer scored the candidates of training prompts in this run" in page.text


def test_report_is_the_same_to_the_byte(page, run_dir):
    first = (run_dir / "report.html").read_bytes()
    assert write_report(run_dir).read_bytes() == first
    assert str(run_dir).encode() not in first  # no path of this machine


def test_report_needs_nothing_from_elsewhere(page, run_dir):
    text = (run_dir / "report.html").read_text()
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv"))
    assert policy.startswith("default-src 'none'") and "http" not in policy
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert re.findall("script-src ([^;]*);", policy) == [f"'sha256-{digest}'"]  # no other script runs
    assert [attrs for tag, attrs in page.tags if tag == "script"] == [
        {"type": "application/json", "id": "response-data"},
        {},
    ]
    assert not re.search(
        r"innerHTML|insertAdjacent|outerHTML|document\.write|eval|fetch|XMLHttp|import\(", page.scripts[1]
    )
    names = {tag for tag, _ in page.tags}
    assert not names & {"link", "iframe", "img", "object", "embed", "form", "base", "foreignobject"}
    for tag, attrs in page.tags:
        for name, value in attrs.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("href", "xlink:href", "src") or str(value).startswith("#"), (tag, name, value)
    assert not re.search(r"@import|url\((?!#)", text)
    ids = [attrs["id"] for tag, attrs in page.tags if "id" in attrs and tag not in ("path", "clippath")]
    assert len(ids) == len(set(ids))


def test_text_of_models_and_data_cannot_become_markup(tmp_path):
    run = make_run(tmp_path / "run", evil=True, num_test=6)
    text = write_report(run).read_text(encoding="utf-8")
    page = page_of(run / "report.html")
    assert [tag for tag, _ in page.tags if tag in ("img", "script")] == ["script"] * 2
    assert '<img src=x onerror="alert(1)">' in page.text and "{{ 7 * 7 }}" in page.text  # readable, as text
    assert "<img" not in text and text.count("<script") == text.count("</script") == 2
    assert not re.search("[\x00-\x08\x0b-\x1f\u061c\u200b\u2028-\u202e\u2060-\u206f\ufeff]", text)
    shown = "".join(json.dumps(each, ensure_ascii=False) for each in page.collections.values())
    assert "</script><script>alert(2)</script>" in shown and "\ufffdgnol\ufffd\ufffd\ufffd" in shown
    assert not re.search("[\x00-\x08\x0b-\x1f\u061c\u200b\u2028-\u202e\u2060-\u206f\ufeff]", shown)
    for part in ("responses", "run"):  # the attack stood in both
        section = text.split(f'<section id="{part}">')[1].split("</section>")[0]
        assert "&lt;img src=x onerror=" in section, part


def test_agent_names_in_charts_are_text(tmp_path):
    name = '<script>$\\frac{1}{0}$</script>" onload="x'
    summary = build_summary({name: AgentHistory("student", [{"iteration": 0, "gold": 0.5}])}, [], 0, {})
    write_json(tmp_path / "summary.json", summary)
    page = page_of(write_report(tmp_path))
    assert "script" not in {tag for tag, _ in page.tags} and not any("onload" in attrs for _, attrs in page.tags)
    assert page.text.count("\\frac{1}{0}") >= 2


def test_unfinished_run_says_what_is_missing(tmp_path):
    run = make_run(tmp_path / "run", finished=False, gold=False, num_test=6)
    write_report(run, planned=["iter1-student-select", "iter2-student-select", "iter2-student-train"])
    text = page_of(run / "report.html").text
    assert "This run is not finished." in text
    assert "In progress: iter2-student-select." in text and "Missing: iter2-student-train." in text
    assert "Preference accuracy by iteration" in text and "gold" not in text.lower().replace("gold labels", "")


def test_a_run_that_has_just_begun_has_a_report(tmp_path):
    (tmp_path / "01-data").mkdir()
    text = page_of(write_report(tmp_path)).text
    assert "1 stages are done" in text and "answers nothing yet" in text


def test_ready_teacher_without_ceiling_or_training(tmp_path):
    agents = {
        "ready": AgentHistory("teacher", [{"iteration": 0, "preference_accuracy": 0.6}]),
        "student": AgentHistory("student", [{"iteration": t, "preference_accuracy": 0.6 - t / 10} for t in range(2)]),
    }
    write_json(tmp_path / "summary.json", build_summary(agents, [], 3, {}))
    text = page_of(write_report(tmp_path)).text
    assert "The student fell from 0.600" in text and "teachers rose" not in text and "PGR" not in text


def test_broken_files_are_one_line_errors(tmp_path):
    with pytest.raises(DataError, match="no such run folder"):
        write_report(tmp_path / "none")
    (tmp_path / "summary.json").write_text('{"agents": ')
    with pytest.raises(DataError, match=r"summary.json:1"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(DataError, match="not a JSON object"):
        write_report(tmp_path)


ODD = {
    "torn": '{"agents": ',
    "list": "[]",
    "deep": "[" * 100_000,
    "agents": '{"agents": 5, "stages": [], "seed": 1, "versions": {}}',
    "role": '{"agents": {"a": {"role": "king", "scores": []}}, "stages": [], "seed": 1, "versions": {}}',
    "score": '{"agents": {"a": {"role": "student", "scores": [{"iteration": 0, "gold": "high"}]}}, "stages": [],'
    ' "seed": 1, "versions": {}}',
    "nan": '{"agents": {"a": {"role": "student", "scores": [{"iteration": 0, "gold": NaN}]}}, "stages": [],'
    ' "seed": 1, "versions": {}}',
    "arm": '{"agents": {}, "arms": {"x": {"student": {"role": "student", "scores": []}}}, "stages": [], "seed": 1,'
    ' "versions": {}}',
    "stages": '{"agents": {}, "stages": [{"name": "data", "seconds": "long"}], "seed": 1, "versions": {}}',
}


@pytest.mark.parametrize("odd", [*ODD, "fifo", "folder"])
def test_a_summary_or_step_times_of_any_shape_do_not_stop_a_report(run_dir, tmp_path, odd, caplog):
    """They stand outside the hashed set: a line, and the stages' own scores instead."""
    run = shutil.copytree(run_dir, tmp_path / "run")
    train = next(path.parent for path in sorted(run.glob("*-train/timing.jsonl")))
    for path in (run / "summary.json", train / "timing.jsonl", train / "timing.json", run / "recipe.yaml"):
        path.unlink(missing_ok=True)
        if odd == "fifo":
            os.mkfifo(path)
        elif odd == "folder":
            path.mkdir()
        else:
            path.write_text(ODD[odd])
    text = page_of(write_report(run)).text
    assert "This run is not finished." in text and "student" in text
    assert "summary.json is ignored: " in caplog.text and "a run writes it again" in caplog.text
    assert table(RunReader(run).summary).startswith("gold score by iteration")


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("*-eval-student-iter1", "evaluation.jsonl"),
        ("*-eval-student-iter1", "evaluation.json"),
        ("*-iter1-student-select", "scores.jsonl"),
        ("*-iter1-student-select", "pairs.jsonl"),
    ],
)
def test_a_flipped_bit_is_not_shown(run_dir, tmp_path, stage, name):
    """Rows that still parse could show another score, or lack the key that a reader asks for."""
    run = shutil.copytree(run_dir, tmp_path / "run")
    (run / "summary.json").unlink()  # without it scores are the stages' own
    folder = sorted(run.glob(stage))[0]
    raw = (folder / name).read_bytes()
    files = {name: {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    write_report(run)
    (folder / name).write_bytes(raw.replace(b'"', b'"x', 1))
    with pytest.raises(IntegrityError, match=f"the content of {name} was changed"):
        write_report(run)


@pytest.mark.parametrize("change", [{"role": "king"}, {"gold": "high"}, {"gold": math.inf}, {"gold": [1]}])
def test_a_damaged_evaluation_is_a_line_that_names_it(run_dir, tmp_path, change):
    run = shutil.copytree(run_dir, tmp_path / "run")
    (run / "summary.json").unlink()
    path = sorted(run.glob("*-eval-student-iter1/evaluation.json"))[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=r"eval-student-iter1/evaluation.json: .*Fix: run again with --from"):
        write_report(run)


def test_table_has_every_agent_and_iteration(run_dir):
    lines = table(RunReader(run_dir).summary).splitlines()
    assert lines[0] == "gold score by iteration, 12 held-out prompts, seed 200"
    assert lines[1].split() == ["agent", "role", "it0", "it1", "it2", "it3", "change"]
    rows = {line.split()[0]: line.split() for line in lines[3:]}
    assert rows["student"] == ["student", "student", "0.689", "0.799", "0.919", "0.909", "+0.220"]
    assert rows["ceiling"] == ["ceiling", "ceiling", "0.990"]
    assert rows["own-samples:"][2:4] == ["ablation", "0.702"]
    assert rows["PGR,"][1:5] == ["mean", "initial", "teacher", "student"]
    assert table(build_summary({}, [], 0, {})) == "no metric was measured for every agent"


def test_seeds_report_lists_every_claim(tmp_path, run_dir):
    summaries = []
    for seed in (200, 201, 202):
        summary = json.loads((run_dir / "summary.json").read_text())
        for row in summary["agents"]["student"]["scores"][1:]:
            row["gold"] -= (seed - 200) * 0.05
        summaries.append(summary | {"seed": seed})
    runs = [ScoredRun(summary) for summary in summaries]
    found = claims(runs)
    page = page_of(write_seeds_report(tmp_path, runs, found))
    for claim in found:
        assert claim.better in page.text and claim.worse in page.text
    tags = [
        attrs["class"] for tag, attrs in page.tags if tag == "span" and (attrs.get("class") or "").startswith("tag ")
    ]
    wanted = [f"tag {MARKS[claim.verdict]}" for claim in found]
    assert [tag for tag in tags if tag in ("tag good", "tag open", "tag bad")] == wanted and len(found) == 9
    verdicts = [claim.verdict for claim in found]
    assert all(f"{word}: {verdicts.count(word.lower())}." in page.text for word in ("Inconclusive", "Contradicted"))
    assert "Seed 202" in page.text and "mean initial teacher" in page.text and "PGR" in page.text
    assert "script" not in {tag for tag, _ in page.tags}
    content = json.loads((tmp_path / "claims.json").read_text())
    assert [row["verdict"] for row in content["claims"]] == [claim.verdict for claim in found]
    assert (tmp_path / "claims.txt").read_text().count("\n") == 3 + len(found)


@pytest.mark.parametrize(("low", "high", "said"), [(-0.03, 0.04, True), (0.001, 0.04, False), (-0.04, -0.001, False)])
def test_a_change_inside_the_noise_is_not_told_as_a_success(low, high, said):
    rows = [{"iteration": 0, "gold": 0.746}, {"iteration": 1, "gold": 0.752}]
    summary = build_summary({"student": AgentHistory("student", rows)}, [], 0, {})
    estimate = Estimate(0.006, low, high, 0.5)
    claim = Claim("naive", "final student", "naive weak-label student", (0,), (0.752,), (0.746,), estimate)
    text, _ = headline(summary, [claim])
    assert ("(gold score), which is inside the noise." in text) is said


def test_a_student_with_a_name_of_its_own_is_called_by_it():
    rows = [{"iteration": 0, "gold": 0.746}, {"iteration": 1, "gold": 0.752}]
    text, _ = headline(build_summary({"gemma": AgentHistory("student", rows)}, [], 0, {}), [])
    assert text.startswith("The student gemma rose from 0.746 ")
