"""The report of a run and of several seeds, on a run folder written here in the contract's formats."""

from __future__ import annotations

import hashlib
import html.parser
import json
import math
import os
import random
import re
import shutil
from pathlib import Path

import pytest

from macpo.engine.errors import DataError
from macpo.engine.files import write_json, write_jsonl
from macpo.evaluation.claims import claims
from macpo.evaluation.metrics import answer_stats, gold_mean, preference_metrics
from macpo.evaluation.summary import AgentHistory, build_summary
from macpo.report.findings import table
from macpo.report.page import write_report, write_seeds_report
from macpo.report.run_reader import RunReader

EVIL = (
    '<img src=x onerror="alert(1)"></script><script>alert(2)</script>'
    " {{ 7 * 7 }} \x00\x1b[31m \u202egnol\u061c\u200b\u2028\u2066\ufeff"
)
TEACHERS = ("teacher0", "teacher1", "teacher2")
LEVELS = {
    "teacher0": (0.63, 0.71, 0.78, 0.84),
    "teacher1": (0.52, 0.60, 0.66, 0.71),
    "teacher2": (0.67, 0.74, 0.80, 0.79),
    "student": (0.70, 0.81, 0.93, 0.92),
    "ceiling": (0.99,),
}
ARMS = {
    "filtered-sft": (0.95,),
    "one-teacher": (0.66, 0.74, 0.78, 0.80),
    "weak-negatives": (0.70, 0.80, 0.86, 0.90),
    "own-samples": (0.70, 0.72, 0.73, 0.74),
}
TOPICS = ("repair the car", "plant the hedge", "scare the rabbit", "paint the kitchen", "feed the parrot")


def make_run(
    folder: Path, *, seed: int = 200, gold: bool = True, finished: bool = True, evil: bool = False, num_test: int = 60
) -> Path:
    """A run folder as `macpo run` leaves it: three teachers, a student, a ceiling, four ablation arms, T = 3."""
    rng = random.Random(seed)
    number, stages = 0, []
    shift = {name: rng.gauss(0, 0.02) for name in (*LEVELS, *ARMS)}

    def stage(name: str, seconds: float, tokens: int) -> Path:
        nonlocal number
        number += 1
        path = folder / f"{number:02d}-{name}"
        path.mkdir(parents=True)
        counts = {"tokens": tokens, "resampled": number % 3}
        write_json(path / "timing.json", {"seconds": seconds, "counts": counts})
        stages.append({"name": name, "seconds": seconds, "tokens": tokens})
        return path

    def prompt(i: int) -> dict:
        text = f"my name is emma and i want to {TOPICS[i % len(TOPICS)]} number {i} ."
        turns = [{"role": "user", "content": EVIL if evil and i == 0 else text}]
        return {"prompt_id": hashlib.sha256(text.encode()).hexdigest()[:16], "prompt": turns}

    def answer(agent: str, i: int, level: float) -> str:
        if evil:
            return f"{agent} {EVIL}"
        if rng.random() < level:
            return f"sure emma , to {TOPICS[i % len(TOPICS)]} first open the door and then check step {i} . good luck !"
        return rng.choice(["go away , you silly person .", "well the cat and the street .", ""])

    def train(name: str, preference: bool, num_steps: int, level: float) -> None:
        rows, timing = [], []
        for step in range(1, num_steps + 1):
            done = step / num_steps
            row = {"step": step, "lr": 1e-4 * (1 - done), "grad_norm": 0.8 + rng.random() * 0.2, "tokens": 900}
            row["loss"] = (0.69 if preference else 2.2) * math.exp(-done * level) + rng.gauss(0, 0.03)
            if preference:
                row |= {"margin": done * level + rng.gauss(0, 0.05), "accuracy": min(1.0, 0.5 + done * level / 2)}
            if name == "iter2-student-train" and step == 150:
                row |= {"loss": row["loss"] + 1.5, "spike": 9.27}
            rows.append(row)
            unit, seconds = "pairs_per_s" if preference else "sequences_per_s", 0.25 + 0.25 * (step % 2)
            timing.append({"step": step, "seconds": seconds, "tokens_per_s": 900 / seconds, unit: 16 / seconds})
            timing[-1] |= {"mfu": 0.125 / seconds, "peak_memory_bytes": 10**9 + 10**6 * step}
        path = stage(name, 4 + 8 * level, 900 * num_steps)
        write_jsonl(path / "metrics.jsonl", rows)
        write_jsonl(path / "timing.jsonl", timing)

    def evaluate(agent: str, iteration: int, level: float, prefix: str = "") -> dict:
        rows = []
        for i in range(num_test):
            text = answer(agent, i, level)
            bc, br = rng.gauss(-40, 4), rng.gauss(-41, 4)
            row = {**prompt(1000 + i), "answer": text, "finished": bool(rng.random() < 0.95)}
            row |= {"chosen_logp": bc + rng.gauss(4 * level - 1, 3), "rejected_logp": br + rng.gauss(-1, 3)}
            row |= {"base_chosen_logp": bc, "base_rejected_logp": br}
            if gold:
                row["gold"] = round(rng.random() * 0.2 + 0.8 * (rng.random() < level), 2)
            rows.append(row)
        metrics = answer_stats([row["answer"] for row in rows], [row["finished"] for row in rows])
        names = ("chosen_logp", "rejected_logp", "base_chosen_logp", "base_rejected_logp")
        metrics |= preference_metrics(*([row[name] for row in rows] for name in names), beta=0.1)
        if gold:
            metrics |= gold_mean([row["gold"] for row in rows]) | {"gold": level}
        path = stage(f"{prefix}eval-{agent}-iter{iteration}", 2.5, 3000)
        write_json(path / "evaluation.json", metrics)
        write_jsonl(path / "evaluation.jsonl", rows)
        return metrics

    def select(iteration: int) -> None:
        path = stage(f"iter{iteration}-student-select", 3.1, 8000)
        scores, pairs = [], []
        for i in range(40):
            texts = [answer(name, i, LEVELS[name][iteration - 1]) or "." for name in TEACHERS]
            candidates = [
                {"by": name, "text": text, "finished": True, "sum_logp": -30.0, "num_tokens": 12, "perplexity": ppl}
                for name, text, ppl in zip(TEACHERS, texts, (rng.uniform(2, 30) for _ in TEACHERS), strict=True)
            ]
            kept = min(range(3), key=lambda k: candidates[k]["perplexity"])
            scores.append({"prompt_id": prompt(i)["prompt_id"], "candidates": candidates, "kept": kept})
            scores[-1]["why"] = f"lowest perplexity of 3 ({candidates[kept]['perplexity']:.2f})"
            pair = {**prompt(i), "chosen": texts[kept], "rejected": answer("student", i, 0.0), "chosen_finished": True}
            pair |= {"rejected_finished": True, "chosen_by": TEACHERS[kept], "rejected_by": "student"}
            pairs.append(pair | {"ref_chosen_logp": -30.0})
        write_jsonl(path / "scores.jsonl", scores)
        write_jsonl(path / "pairs.jsonl", pairs)

    write_json(stage("data", 0.2, 0) / "counts.json", {"rows": {"student": 40}, "input": {"identical": 17}})
    agents = {name: AgentHistory("teacher") for name in TEACHERS}
    agents |= {"student": AgentHistory("student"), "ceiling": AgentHistory("ceiling")}
    arms: dict[str, dict[str, AgentHistory]] = {name: {"student": AgentHistory("student")} for name in ARMS}
    for name in agents:
        train(f"init-{name}-positive", False, 60, 1.2)
    last = 3 if finished else 1
    for t in range(last + 1):
        if t:
            select(t)
        for name in ("student", *TEACHERS):
            if t:
                train(f"iter{t}-{name}-train", True, 250, 0.4 * t)
            agents[name].add(t, evaluate(name, t, min(1.0, LEVELS[name][t] + shift[name])))
    agents["ceiling"].add(0, evaluate("ceiling", 0, 0.99))
    for arm, levels in ARMS.items():
        for t, level in enumerate(levels[: last + 1]):
            if t:
                train(f"{arm}.iter{t}-student-train", True, 20, 0.3)
            arms[arm]["student"].add(t, evaluate("student", t, level + shift[arm], f"{arm}."))
    (folder / "recipe.yaml").write_text(f"seed: {seed}\niterations: 3\n# {EVIL if evil else 'as resolved'}\n")
    if not finished:
        (folder / f"{number + 1:02d}-iter2-student-select.tmp").mkdir()
        return folder
    summary = build_summary(
        agents,
        stages,
        seed,
        {"macpo": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.2"},
        arms=arms,
        title=EVIL if evil else "MACPO demo",
        models=dict.fromkeys(agents, EVIL if evil else "Llama, 4 layers × 128, 1.1 M parameters"),
        counts={"identical pairs dropped": 3, "empty answers resampled": 7},
        warnings=[EVIL] if evil else ["12 prompts appear in two rows of the data; the first row was kept."],
        descriptions={"own-samples": "the student's own samples as positives, no mutual learning"},
    )
    write_json(folder / "summary.json", summary)
    return folder


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page; fails on a closing tag that closes nothing."""

    VOID = ("meta", "path", "use", "br", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


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
    assert "The final student is below the student of the ablation filtered-sft" in page.text
    assert "best iteration was 2 (0.919), not the last" in page.text
    kinds = [attrs["class"] for tag, attrs in page.tags if tag == "li" and attrs.get("class") in ("good", "bad")]
    assert kinds.count("bad") == 1 and kinds.count("good") == 8


def test_report_shows_every_part_of_the_run(page, run_dir):
    for part in ("Gold score by iteration", "Held-out metrics", "Answers to the same test prompts", "Training pairs"):
        assert part in page.text
    summary = json.loads((run_dir / "summary.json").read_text())
    for agent in summary["agents"].values():
        for row in agent["scores"]:
            for metric in ("gold", "preference_accuracy", "reward_margin", "logp_margin", "distinct_2"):
                assert f"{row[metric]:.3f}" in page.text
    for stage in summary["stages"]:
        assert stage["name"] in page.text
    assert "lowest perplexity of 3" in page.text and "kept" in page.text
    text = re.sub(r"\s+", " ", page.text)
    assert re.search(r"data, input: identical ?17", text) and "all stages: resampled" in text
    assert "empty answers resampled" in page.text and "12 prompts appear in two rows" in page.text
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


def test_sample_answers_are_the_same_prompts_for_every_agent(page, run_dir):
    rows = {}
    for path in sorted(run_dir.glob("*-eval-student-iter*/evaluation.jsonl")):
        if "." not in path.parent.name:
            rows = {row["prompt_id"]: row for row in map(json.loads, path.read_text().splitlines())}
    shown = [rows[key]["prompt"][0]["content"] for key in sorted(rows)[:6]]
    positions = [page.text.index(text) for text in shown]
    assert positions == sorted(positions)
    assert page.text.count("iteration 3 · gold") == 6 * 4 and page.text.count("iteration 0 · gold") == 6 * 5


def test_report_is_the_same_to_the_byte(page, run_dir):
    first = (run_dir / "report.html").read_bytes()
    assert write_report(run_dir).read_bytes() == first
    assert str(run_dir).encode() not in first  # no path of this machine


def test_report_needs_nothing_from_elsewhere(page, run_dir):
    text = (run_dir / "report.html").read_text()
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv"))
    assert policy.startswith("default-src 'none'") and "script-src" not in policy and "http" not in policy
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "img", "object", "embed", "form", "base", "foreignobject"}
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
    assert not {"img", "script"} & {tag for tag, _ in page.tags}
    assert '<img src=x onerror="alert(1)">' in page.text and "{{ 7 * 7 }}" in page.text  # readable, as text
    assert "<img" not in text and "<script" not in text
    assert not re.search("[\x00-\x08\x0b-\x1f\u061c\u200b\u2028-\u202e\u2060-\u206f\ufeff]", text)
    for part in ("answers", "selection", "pairs", "run"):  # the attack stood in every one of them
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
    assert "Begun: iter2-student-select." in text and "Missing: iter2-student-train." in text
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


@pytest.mark.parametrize("change", [{"role": "king"}, {"gold": "high"}, {"gold": math.inf}, {"gold": [1]}])
def test_a_damaged_evaluation_is_a_line_that_names_it(run_dir, tmp_path, change):
    run = shutil.copytree(run_dir, tmp_path / "run")
    (run / "summary.json").unlink()
    path = sorted(run.glob("*-eval-student-iter1/evaluation.json"))[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=r"eval-student-iter1/evaluation.json: .*Fix: run again with --from"):
        write_report(run)


def test_table_has_every_agent_and_iteration(run_dir):
    lines = table(json.loads((run_dir / "summary.json").read_text())).splitlines()
    assert lines[0] == "gold score by iteration, 12 held-out prompts, seed 200"
    assert lines[1].split() == ["agent", "role", "it0", "it1", "it2", "it3", "change"]
    rows = {line.split()[0]: line.split() for line in lines[3:]}
    assert rows["student"] == ["student", "student", "0.689", "0.799", "0.919", "0.909", "+0.220"]
    assert rows["ceiling"] == ["ceiling", "ceiling", "0.990"]
    assert rows["own-samples:"][2:4] == ["ablation", "0.702"] and "PGR" in rows
    assert table(build_summary({}, [], 0, {})) == "no metric was measured for every agent"


def test_seeds_report_lists_every_claim(tmp_path, run_dir):
    summaries = []
    for seed in (200, 201, 202):
        summary = json.loads((run_dir / "summary.json").read_text())
        for row in summary["agents"]["student"]["scores"][1:]:
            row["gold"] -= (seed - 200) * 0.05
        summaries.append(summary | {"seed": seed})
    found = claims(summaries)
    page = page_of(write_seeds_report(tmp_path, summaries, found))
    for claim in found:
        assert claim.better in page.text and claim.worse in page.text
    tags = [
        attrs["class"] for tag, attrs in page.tags if tag == "span" and (attrs.get("class") or "").startswith("tag ")
    ]
    assert sum(tag in ("tag good", "tag mean", "tag bad") for tag in tags) == len(found) == 9
    assert "does not hold" in page.text and "Seed 202" in page.text
    assert "script" not in {tag for tag, _ in page.tags}
    content = json.loads((tmp_path / "claims.json").read_text())
    assert [row["verdict"] for row in content["claims"]] == [claim.verdict for claim in found]
    assert (tmp_path / "claims.txt").read_text().count("\n") == 3 + len(found)
