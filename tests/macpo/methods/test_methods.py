"""Every baseline against its paper's definition, computed anew from the files that a run leaves."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from tiny import init, tiny
from transformers import AutoModelForCausalLM

from macpo import methods
from macpo.commands.compare import compare, comparison_of
from macpo.commands.run import run
from macpo.comparison.arms import method_arms, named_arms
from macpo.comparison.diagnostics import separability
from macpo.demo_world import gold
from macpo.engine.data.chat import Chat, load_tokenizer
from macpo.engine.data.messages import Message
from macpo.engine.data.records import Example, Pair, Prompt, Response, read_records
from macpo.engine.errors import ConfigError, DataError
from macpo.engine.files import read_jsonl, write_jsonl
from macpo.engine.processes import StopFlag
from macpo.engine.run.context import StageContext
from macpo.engine.run.folder import folder_of
from macpo.method.responses import read_responses
from macpo.methods import filtered, rlaif, rlcd
from macpo.methods.ratings import RatedPairInputs, RatedPairs
from macpo.methods.registry import METHODS, build_plan
from macpo.recipe_kinds import load, plan_of

PROMPTS = Path(methods.__file__).parent / "prompts"
PLAIN = {"student_training.preference.sft_weight": 0}
ASKING: dict[str, dict[str, Any]] = {
    "rewarding": {"method": "self-rewarding", **PLAIN},
    "rlaif": {"method": "rlaif", **PLAIN},
    "rlcd": {"method": "rlcd", **PLAIN},
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `macpo compare` leaves: all methods that the demo world allows, one teacher, and two ablations."""
    folder = tmp_path_factory.mktemp("compared") / "out"
    own = {"own-positives": {"positives.source": "own"}, "random": {"positives.selection": "random"}}
    recipe = tiny(folder, iterations=2, ablations=own)
    compare(comparison_of(recipe, [3], k_curve=[1, 2], match_steps=True))
    return folder


@pytest.fixture(scope="module")
def in_the_world(compared: Path) -> Path:
    return compared / "seed-3"


@pytest.fixture(scope="module")
def on_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The methods that ask in words need a tokenizer for words that are not of the world, and room for a question."""
    folder = tmp_path_factory.mktemp("asking")
    words = [*"abcdefghij", "cat", "sat", "mat", "fish", "rain", "town"]
    rows = [
        {"prompt": f"why {words[i % 15]} {i} ?", "chosen": " ".join(words[i % 7 :]), "rejected": words[i % 16]}
        for i in range(60)
    ]
    write_jsonl(folder / "rows.jsonl", rows)
    data = {"path": str(folder / "rows.jsonl"), "teacher_prompts": 16, "student_prompts": 12, "test_prompts": 8}
    agent = {"init": {**init(16, "bpe"), "context": 1200}, "tuning": {"type": "full"}}
    settings = {"method": "naive-sft", "iterations": 0, "context_tokens": 1200, "evaluation": {"ceiling": False}}
    arms = {name: {"iterations": 1, **arm} for name, arm in ASKING.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlaif, "LEAST_PREFERENCE", 0.0)  # models that learned next to nothing prefer next to nothing
        return run(tiny(folder / "run", data=data, teachers=[agent, agent], student=agent, ablations=arms, **settings))


def stage(run_dir: Path, name: str) -> Path:
    return folder_of(run_dir, name)


def manifest(run_dir: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((stage(run_dir, name) / "manifest.json").read_text())
    return found


@functools.cache
def inputs(run_dir: Path, name: str) -> dict[str, Path]:
    """What a stage calls its inputs -> the folder of each."""
    graph = plan_of(load(run_dir)).graph
    return {alias: stage(run_dir, other) for alias, other in graph.stage(name).inputs.items()}


def draws(run_dir: Path, name: str) -> list[dict[str, Response]]:
    """The responses of each draw that a stage read."""
    found = inputs(run_dir, name)
    return [read_responses(found[alias]) for alias in sorted(found) if alias.startswith("answers:")]


def ratings(folder: Path) -> dict[str, list[float]]:
    return {row["prompt_id"]: row["ratings"] for _, row in read_jsonl(folder / "ratings.jsonl")}


def student_prompts(run_dir: Path) -> dict[str, Prompt]:
    return {p.id: p for p in read_records(stage(run_dir, "data") / "student.jsonl", Prompt)}


def first_loss(run_dir: Path, name: str) -> float:
    (_, row), *_ = read_jsonl(stage(run_dir, name) / "metrics.jsonl")
    return float(row["loss"])


def logps(policy: Path, prompt: Prompt, replies: list[list[int]], chat: Chat) -> list[float]:
    """Summed log-probs of token ids after the prompt, by plain transformers in float64."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float64).eval()
    ids, found = chat.prompt_ids(prompt.messages), []
    for reply in replies:
        with torch.no_grad():
            rows = model(torch.tensor([ids + reply])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        found.append(float(rows.gather(1, torch.tensor(reply)[:, None]).sum()))
    return found


def test_the_naive_student_is_the_methods_own_start(in_the_world: Path) -> None:
    assert not [path for path in in_the_world.iterdir() if "naive-sft." in path.name]
    agents = json.loads((in_the_world / "summary.json").read_text())
    naive, main = agents["arms"]["naive-sft"]["student"]["scores"], agents["agents"]["student"]["scores"]
    assert naive == main[:1] and len(main) == 3


def test_spin_prefers_labels_to_its_own_responses_of_this_round_and_the_last(in_the_world: Path) -> None:
    labels = read_records(stage(in_the_world, "init-weak-labels") / "examples.jsonl", Example)
    own = [
        read_responses(stage(in_the_world, f"spin.{name}")) for name in ("init-student-answer", "iter1-student-answer")
    ]
    for t in (1, 2):
        pairs = read_records(stage(in_the_world, f"spin.iter{t}-student-pairs") / "pairs.jsonl", Pair)
        wanted = [
            (label.prompt.id, label.response, responses[label.prompt.id].text)
            for responses in own[:t]
            for label in labels
            if label.prompt.id in responses and label.response != responses[label.prompt.id].text
        ]
        assert [(p.prompt.id, p.chosen, p.rejected) for p in pairs] == wanted
        assert first_loss(in_the_world, f"spin.iter{t}-student-train") == pytest.approx(math.log(2), abs=2e-6)
        settings = manifest(in_the_world, f"spin.iter{t}-student-train")["settings"]
        assert (settings["optim"]["loss"], settings["optim"]["sft_weight"]) == ("sigmoid", 0)


def test_the_iterated_filter_keeps_the_most_plausible_labels(in_the_world: Path) -> None:
    rows = [row for _, row in read_jsonl(stage(in_the_world, "iter1-student-score") / "candidates.jsonl")]
    best = {row["prompt_id"]: min(row["candidates"], key=lambda c: c["perplexity"]) for row in rows}
    order = sorted(best, key=lambda i: best[i]["perplexity"])
    wanted = {i: best[i]["text"] for i in order[: math.ceil(0.8 * len(order))]}
    examples = read_records(
        stage(in_the_world, "filtered-sft-iterated.iter1-student-labels") / "examples.jsonl", Example
    )
    assert {e.prompt.id: e.response for e in examples} == wanted and filtered.DROPPED == 0.2
    assert "policy" not in manifest(in_the_world, "filtered-sft-iterated.iter1-student-train")["inputs"], (
        "it starts from the base"
    )


def test_sft_on_positives_learns_from_the_better_side_with_the_same_steps(in_the_world: Path) -> None:
    work, contrast = (manifest(in_the_world, f"{arm}iter1-student-train") for arm in ("sft-positives.", ""))
    assert work["settings"]["side"] == "chosen" and work["settings"]["file"] == "pairs.jsonl"
    shared = ("learning_rate", "epochs", "batch")
    assert all(work["settings"]["optim"][name] == contrast["settings"]["optim"][name] for name in shared)
    assert work["inputs"]["examples"] == contrast["inputs"]["pairs"], "the pairs are the method's own"
    steps = [
        len(list(read_jsonl(stage(in_the_world, f"{arm}iter1-student-train") / "metrics.jsonl")))
        for arm in ("sft-positives.", "")
    ]
    assert steps[0] == steps[1] > 0


def test_the_confidence_loss_trains_on_the_weak_labels(in_the_world: Path) -> None:
    name = "confidence-loss.init-student-confident"
    rows = [row for _, row in read_jsonl(stage(in_the_world, name) / "metrics.jsonl")]
    assert rows[0]["loss"] == pytest.approx(rows[0]["label_nll"], rel=1e-6), "its weight begins at 0"
    assert rows[-1]["loss"] < rows[-1]["label_nll"], "the student's own guesses are likelier than the labels"
    assert all(0.5 <= row["confident"] <= 0.8 and 0 <= row["disagrees"] <= row["confident"] for row in rows)
    assert inputs(in_the_world, name)["examples"] == stage(in_the_world, "init-weak-labels")


def test_the_annotators_implicit_reward_labels_the_students_responses(in_the_world: Path) -> None:
    run_dir = in_the_world
    (_, first), *_ = read_jsonl(stage(run_dir, "weak-annotator.init-teacher0-aligned") / "metrics.jsonl")
    assert first["loss"] == pytest.approx(math.log(2), abs=2e-6)
    aligned = stage(run_dir, "weak-annotator.init-teacher0-aligned") / "policy"
    reference = stage(run_dir, "init-teacher0-positive") / "policy"
    chat = Chat(load_tokenizer(str(aligned)), "vicuna")
    by_teacher = [ratings(stage(run_dir, f"weak-annotator.iter1-teacher{k}-reward")) for k in range(2)]
    responses, prompts = draws(run_dir, "weak-annotator.iter1-student-pairs"), student_prompts(run_dir)
    for prompt_id in list(by_teacher[0])[:3]:
        replies = [chat.response_ids(draw[prompt_id].text, draw[prompt_id].finished) for draw in responses]
        ours, theirs = (logps(folder, prompts[prompt_id], replies, chat) for folder in (aligned, reference))
        wanted = [0.1 * (a - b) for a, b in zip(ours, theirs, strict=True)]
        assert by_teacher[0][prompt_id] == pytest.approx(wanted, abs=2e-5)
    pairs = read_records(stage(run_dir, "weak-annotator.iter1-student-pairs") / "pairs.jsonl", Pair)
    assert pairs
    for pair in pairs:
        means = [fmean(column) for column in zip(*(each[pair.prompt.id] for each in by_teacher), strict=True)]
        assert pair.chosen == responses[means.index(max(means))][pair.prompt.id].text


def test_self_rewarding_grades_by_the_expected_number_of_points(on_text: Path) -> None:
    policy = stage(on_text, "init-student-positive") / "policy"
    chat = Chat(load_tokenizer(str(policy)), "vicuna")
    responses, prompts = draws(on_text, "rewarding.iter1-student-grade"), student_prompts(on_text)
    grades = ratings(stage(on_text, "rewarding.iter1-student-grade"))
    assert len(responses) == 4
    for prompt_id in list(grades)[:2]:
        said = f"<user>\n{prompts[prompt_id].messages[0]['content']}\n</user>"
        for draw, grade in zip(responses, grades[prompt_id], strict=True):
            text = (PROMPTS / "grade.txt").read_text().format(conversation=said, response=draw[prompt_id].text)
            replies = [chat.response_ids(str(points), finished=False) for points in range(6)]
            weights = torch.tensor(logps(policy, Prompt.of(text), replies, chat), dtype=torch.float64).softmax(0)
            assert grade == pytest.approx(float((weights * torch.arange(6)).sum()), abs=1e-5)
    for pair in read_records(stage(on_text, "rewarding.iter1-student-pairs") / "pairs.jsonl", Pair):
        given = grades[pair.prompt.id]
        best, worst = (responses[given.index(pick(given))][pair.prompt.id].text for pick in (max, min))
        assert (pair.chosen, pair.rejected) == (best, worst)


def test_rlaif_averages_both_orders(on_text: Path) -> None:
    policy = stage(on_text, "init-teacher0-positive") / "policy"
    chat = Chat(load_tokenizer(str(policy)), "vicuna")
    one, two = draws(on_text, "rlaif.iter1-teacher0-compare")
    prompt_id, found = next(iter(ratings(stage(on_text, "rlaif.iter1-teacher0-compare")).items()))
    said = f"<user>\n{student_prompts(on_text)[prompt_id].messages[0]['content']}\n</user>"
    probabilities = []
    for a, b in ((one, two), (two, one)):
        text = (PROMPTS / "compare.txt").read_text().format(conversation=said, a=a[prompt_id].text, b=b[prompt_id].text)
        replies = [chat.response_ids(letter, finished=False) for letter in "AB"]
        first, second = logps(policy, Prompt.of(text), replies, chat)
        probabilities.append(1 / (1 + math.exp(second - first)))
    wanted = (probabilities[0] + 1 - probabilities[1]) / 2
    assert found == pytest.approx([wanted, 1 - wanted], abs=1e-5)


def test_rlcd_labels_by_the_beginning_which_is_no_part_of_the_response(on_text: Path) -> None:
    graph = plan_of(load(on_text)).graph
    names = [graph.stage("rlcd.iter1-student-pairs").inputs[f"{side}:student"] for side in ("positives", "negatives")]
    assert [graph.stage(name).settings["begin"] for name in names] == [rlcd.BETTER, rlcd.WORSE]
    better, worse = (read_responses(stage(on_text, name)) for name in names)
    pairs = read_records(stage(on_text, "rlcd.iter1-student-pairs") / "pairs.jsonl", Pair)
    assert pairs and all((better[p.prompt.id].text, worse[p.prompt.id].text) == (p.chosen, p.rejected) for p in pairs)
    assert not any(p.chosen.startswith(("(", " ")) for p in pairs)
    assert all(response.sum_logp is None for response in better.values()), "its log-prob is of another prompt"


def test_served_teachers_cannot_label_by_log_probs(tmp_path: Path) -> None:
    served = {"base_url": "http://127.0.0.1:1/v1", "server": "openai", "api": "chat", "positive": "a", "negative": "b"}
    recipe = tiny(tmp_path, teachers=[{"served": served, "train": False}], mutual_learning=False)
    arms, left_out = method_arms(recipe, ["weak-annotator", "spin"])
    assert list(arms) == ["spin"] and left_out == {
        "weak-annotator": "it needs log-probs of the teachers, and teacher0 is served"
    }


@pytest.mark.parametrize("blank", ["", " "])
def test_a_beginning_is_written_as_a_response_begins(blank: str, on_text: Path) -> None:
    """Template and tokenizer write it as they would the response: under vicuna with a blank before it."""
    tokenizer = load_tokenizer(str(stage(on_text, "init-student-positive") / "policy"))
    asked: list[Message] = [{"role": "user", "content": "why ?"}]
    template = "{% for m in messages %}{{ m['role'] + ':" + blank + "' + m['content'] }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    chat = Chat(tokenizer, template)
    ids = chat.prompt_ids(asked) + chat.response_ids(rlcd.BETTER, finished=False)
    assert tokenizer.decode(ids).endswith(f"assistant:{blank}{rlcd.BETTER}")


def test_the_comparison_has_a_row_for_everything(compared: Path) -> None:
    found = json.loads((compared / "compare.json").read_text())
    kinds: dict[str, set[str]] = {}
    for row in found["rows"]:
        kinds.setdefault(row["kind"], set()).add(row["name"])
    assert kinds["method"] == {"macpo", *named_arms("methods")}
    assert kinds["bound"] == {"mean initial teacher", "ceiling"}
    assert kinds["teachers"] == {"k1-teacher0", "k1-teacher1"} and kinds["ablation"] == {"own-positives", "random"}
    rows = {row["name"]: row for row in found["rows"]}
    for name in ("self-rewarding", "rlaif", "rlcd"):
        assert "asks a model in words" in rows[name]["left_out"] and rows[name]["score"] is None
    agents = json.loads((compared / "seed-3" / "summary.json").read_text())
    for name, row in rows.items():
        if name in agents["arms"]:
            last = agents["arms"][name]["student"]["scores"][-1]
            assert row["score"]["value"] == pytest.approx(last["gold"], abs=1e-9), name
            assert row["score"]["low"] <= row["score"]["value"] <= row["score"]["high"]
    naive = agents["agents"]["student"]["scores"][0]["gold"]
    assert rows["macpo"]["change"]["value"] == pytest.approx(rows["macpo"]["score"]["value"] - naive, abs=1e-9)
    part = rows["macpo"]["score"]["value"] - rows["random"]["score"]["value"]
    assert rows["random"]["change"]["value"] == pytest.approx(part, abs=1e-9), "of an ablation, the method's from it"
    assert [each["count"] for each in found["teachers"]] == [1, 2]
    ledger = rows["spin"]["ledger"]
    assert ledger["student_steps"] <= rows["macpo"]["ledger"]["student_steps"] and ledger["human_labels"] == 2 * 16
    page = (compared / "compare.html").read_text()
    assert "What does not hold" in page and all(name in page for name in rows) and "<script" not in page


def test_the_diagnostics_are_those_of_the_files(compared: Path) -> None:
    found = json.loads((compared / "compare.json").read_text())["diagnostics"]["3"]
    run_dir = compared / "seed-3"
    assert [row["iteration"] for row in found] == [1, 2]
    labels = {
        e.prompt.id: e.response for e in read_records(stage(run_dir, "init-weak-labels") / "examples.jsonl", Example)
    }
    for row in found:
        select = stage(run_dir, f"iter{row['iteration']}-student-select")
        scores = [each for _, each in read_jsonl(select / "scores.jsonl")]
        kept = [each["candidates"][each["kept"]]["text"] == labels.get(each["prompt_id"]) for each in scores]
        assert row["kept_own_label"] == pytest.approx(fmean(kept))
        pairs = read_records(select / "pairs.jsonl", Pair)
        assert row["kept"] == pytest.approx(fmean(gold(p.prompt.messages, p.chosen) for p in pairs))
        assert row["at_random"] <= row["best"] and 0 <= row["same_first_word"] <= 1


def test_separability_is_the_chance_that_the_better_response_is_likelier() -> None:
    assert separability([1, 1, 0, 0], [1.0, 2.0, 3.0, 4.0]) == 1.0
    assert separability([1, 1, 0, 0], [1.0, 3.0, 2.0, 4.0]) == 0.75
    assert separability([0, 0, 0], [1.0, 2.0, 3.0]) is None


@pytest.mark.parametrize("name", sorted(name for name, method in METHODS.items() if method.asks))
def test_the_demo_worlds_models_are_not_asked_in_words(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"ablations.x.method: {name} cannot run here: it asks a model in words"):
        build_plan(tiny(tmp_path, ablations={"x": {"method": name}}))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"method": "spin", "mutual_learning": False}, "mutual_learning is not read"),
        ({"method": "rlcd", "negatives": {"refresh": True}}, "negatives is not read"),
        ({"method": "naive-sft"}, "iterations must be 0"),
        (
            {"method": "confidence-loss", "iterations": 0, "student": {"model": "m", "positive": "p"}},
            "student.positive",
        ),
    ],
)
def test_a_setting_that_the_method_does_not_read_is_refused(
    changes: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=problem):
        tiny(tmp_path, **changes)


def test_an_arm_of_another_method_leaves_out_what_is_the_loops_alone(tmp_path: Path) -> None:
    recipe = tiny(
        tmp_path,
        negatives={"refresh": True},
        ablations={"spin": {"method": "spin"}, "k1": {"use_teachers": ["teacher0"]}},
    )
    assert not recipe.arm("spin").negatives.refresh and recipe.arm("k1").negatives.refresh


def rated(tmp_path: Path, given: dict[str, list[float]], least: float = 0.0) -> list[Pair]:
    """The pairs of ratings of two responses, "a" and "b", to each prompt."""
    prompts = {name: Prompt.of(name) for name in given}
    folders = {name: tmp_path / name for name in ("data", "one", "two", "ratings", "out")}
    for folder in folders.values():
        folder.mkdir()
    write_jsonl(folders["data"] / "student.jsonl", [p.to_json() for p in prompts.values()])
    for folder, text in (("one", "a"), ("two", "b")):
        responses = [Response(p.id, "student", text, True, 1).to_json() for p in prompts.values()]
        write_jsonl(folders[folder] / "responses.jsonl", responses)
    rows = [{"prompt_id": prompts[name].id, "ratings": each} for name, each in given.items()]
    write_jsonl(folders["ratings"] / "ratings.jsonl", rows)
    reads = RatedPairInputs(data="data", answers={"0": "one", "1": "two"}, ratings={"x": "ratings"})
    context = StageContext(name="pairs", dir=folders["out"], inputs=folders, stop=StopFlag())
    RatedPairs(least=least, inputs=reads).run(context)
    return read_records(folders["out"] / "pairs.jsonl", Pair)


def test_ties_and_unclear_ratings_teach_nothing(tmp_path: Path) -> None:
    given = {"clear": [0.9, 0.1], "tie": [0.5, 0.5], "unclear": [0.45, 0.55], "other": [0.2, 0.8]}
    pairs = {p.prompt.messages[0]["content"]: p.chosen for p in rated(tmp_path, given, least=0.2)}
    assert pairs == {"clear": "a", "other": "b"}


def test_no_rating_that_tells_responses_apart_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the ratings leave no pair .*tied"):
        rated(tmp_path, {"one": [1.0, 1.0], "two": [0.0, 0.0]})
