"""The method end to end on a tiny world: every stage, what it may read, and what the ablations change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from tiny import tiny

from macpo.commands.planning.estimates import size_of
from macpo.commands.run import run
from macpo.config import PositiveSettings, Recipe
from macpo.data_settings import DataSettings
from macpo.engine.data.chat import Chat, load_tokenizer
from macpo.engine.data.records import Example, Pair, Prompt, Response, ids_digest, read_records, write_records
from macpo.engine.errors import DataError
from macpo.engine.files import read_json, read_jsonl
from macpo.engine.model_folders import PolicyRef
from macpo.engine.models.compute import model_cache
from macpo.engine.processes import StopFlag
from macpo.engine.run.context import StageContext
from macpo.engine.run.folder import folder_of
from macpo.engine.scoring import score
from macpo.method.encoding import encode
from macpo.method.learning import Imitate
from macpo.method.pairs import TeacherPairInputs, TeacherPairs
from macpo.method.positives import Candidate, as_generated, half_of, read_candidates
from macpo.method.prompt_sets import read_sources
from macpo.methods.registry import build_plan


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe]:
    recipe = tiny(tmp_path_factory.mktemp("method") / "run")
    return run(recipe), recipe


def digests(run_dir: Path) -> dict[str, str]:
    """Stage -> digest of its hashed outputs (weights, JSONL, scores; not timings and logs)."""
    return {
        folder.name.partition("-")[2]: json.loads((folder / "manifest.json").read_text())["digest"]
        for folder in sorted(run_dir.iterdir())
        if (folder / "manifest.json").exists()
    }


def test_every_agent_is_evaluated_at_every_iteration(finished: tuple[Path, Recipe]) -> None:
    run_dir, _ = finished
    summary = json.loads((run_dir / "summary.json").read_text())
    for name in ("teacher0", "teacher1", "student"):
        scores = summary["agents"][name]["scores"]
        assert [row["iteration"] for row in scores] == [0, 1, 2]
        assert all(0 <= row["gold"] <= 1 and 0 <= row["preference_accuracy"] <= 1 for row in scores)
    assert summary["agents"]["ceiling"]["role"] == "ceiling"
    assert (run_dir / "report.html").stat().st_size > 10_000


def test_the_three_sets_of_prompts_are_disjoint(finished: tuple[Path, Recipe]) -> None:
    run_dir, _ = finished
    data = folder_of(run_dir, "data")
    student = {p.id for p in read_records(data / "student.jsonl", Prompt)}
    test = {p.prompt.id for p in read_records(data / "test.jsonl", Pair)}
    human = {p.prompt.id for k in (0, 1) for p in read_records(data / f"teacher-teacher{k}.jsonl", Pair)}
    assert (len(student), len(test)) == (20, 12)
    assert not student & test and not student & human and not test & human


def test_positives_come_from_another_agent_and_negatives_from_oneself(finished: tuple[Path, Recipe]) -> None:
    run_dir, _ = finished
    for t in (1, 2):
        for pair in read_records(folder_of(run_dir, f"iter{t}-student-select") / "pairs.jsonl", Pair):
            assert pair.chosen_by in ("teacher0", "teacher1") and pair.rejected_by == "student"
        for k in (0, 1):
            for pair in read_records(folder_of(run_dir, f"iter{t}-teacher{k}-pairs") / "pairs.jsonl", Pair):
                assert pair.chosen_by == "student" and pair.rejected_by == f"teacher{k}"


def test_the_kept_response_has_the_lowest_perplexity(finished: tuple[Path, Recipe]) -> None:
    run_dir, _ = finished
    for _, row in read_jsonl(folder_of(run_dir, "iter1-student-select") / "scores.jsonl"):
        perplexities = [c["perplexity"] for c in row["candidates"]]
        assert len(perplexities) == 2 and row["kept"] == perplexities.index(min(perplexities))


def test_filter_scores_equal_recomputed_reference_logps(finished: tuple[Path, Recipe]) -> None:
    """The scores of the perplexity filter are the DPO reference log-probs of the chosen responses."""
    run_dir, recipe = finished
    pairs = read_records(folder_of(run_dir, "iter2-student-select") / "pairs.jsonl", Pair)
    reference = str(folder_of(run_dir, "iter1-student-train") / "policy")
    chat = Chat(load_tokenizer(reference), "vicuna")
    groups = [
        chat.group(p.prompt.messages, [(p.chosen, p.chosen_finished)], max_tokens=64, max_prompt_tokens=52)
        for p in pairs
    ]
    policy = model_cache(recipe.compute, False).policy(PolicyRef(reference))
    recomputed = score(policy, [g for g in groups if g], max_tokens=recipe.compute.score_tokens)
    kept = torch.tensor([p.ref_chosen_logp for p in pairs])
    again = torch.tensor([scores[0].sum_logp for scores in recomputed])
    assert torch.allclose(kept, again, rtol=1e-5, atol=1e-5)


def test_first_preference_step_has_loss_ln2(finished: tuple[Path, Recipe]) -> None:
    """The reference is the policy itself, whether its chosen log-probs were handed over or computed."""
    run_dir, recipe = finished
    for name in ("iter1-student-train", "iter1-teacher0-train", "iter2-student-train", "iter2-teacher1-train"):
        (_, first), *_ = read_jsonl(folder_of(run_dir, name) / "metrics.jsonl")
        sft_weight = recipe.student_training.preference.sft_weight
        assert first["loss"] - sft_weight * first["sft_loss"] == pytest.approx(0.6931472, abs=2e-6)


def test_poisoned_student_responses_change_nothing_but_the_ceiling(tmp_path: Path) -> None:
    """No stage of MACPO reads the student half's human responses: replace them all and every digest stays."""
    rows = [
        {"prompt": f"how do i plant tree {i} ?", "chosen": f"dig a hole {i % 7} .", "rejected": f"no {i % 5} ."}
        for i in range(90)
    ]
    clean, poisoned = tmp_path / "clean.jsonl", tmp_path / "poisoned.jsonl"
    clean.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"teacher_prompts": 24, "student_prompts": 20, "test_prompts": 10}
    first = tiny(tmp_path / "a", data=data | {"path": str(clean)}, iterations=1)
    run(first)
    prompts = read_records(folder_of(tmp_path / "a", "data") / "student.jsonl", Prompt)
    student = {prompt.messages[0]["content"] for prompt in prompts}
    for row in rows:
        if row["prompt"] in student:
            row |= {"chosen": "poison chosen", "rejected": "poison rejected"}
    poisoned.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(tiny(tmp_path / "b", data=data | {"path": str(poisoned)}, iterations=1))
    before, after = digests(tmp_path / "a"), digests(tmp_path / "b")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"human-answers", "ceiling", "eval-ceiling-iter0"}


def test_only_the_ceiling_may_reach_the_human_responses(tmp_path: Path) -> None:
    stages = build_plan(tiny(tmp_path)).graph.stages
    readers = {stage.name for stage in stages if "human-answers" in stage.inputs.values()}
    assert readers == {"ceiling"}


ARMS = {
    "one-teacher": {"use_teachers": ["teacher1"]},
    "random": {"positives.selection": "random"},
    "worst": {"positives.selection": "max-perplexity"},
    "own-positives": {"positives.source": "own"},
    "weak-negatives": {"negatives.source": "other"},
    "spin-negatives": {"negatives.source": "previous-positive"},
    "own-against-own": {"positives.source": "own", "negatives.source": "previous-positive"},
    "no-mutual": {"mutual_learning": False},
    "fresh-negatives": {"negatives.refresh": True},
    "cross-fit": {"positives.cross_fit": True},
    "filtered-labels": {"initial.weak_label": "min-perplexity", "iterations": 0},
    "one-labeller": {"initial.weak_label": "teacher1", "iterations": 0},
}


@pytest.fixture(scope="module")
def with_arms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arms") / "run"
    evaluation, sampling = {"ceiling": False}, {"max_new_tokens": 32}  # long enough for some responses to end
    return run(tiny(folder, iterations=1, ablations=ARMS, evaluation=evaluation, sampling=sampling))


def test_ablations_share_equal_stages_and_change_what_they_say(with_arms: Path) -> None:
    summary = json.loads((with_arms / "summary.json").read_text())
    assert set(summary["arms"]) == set(ARMS)
    names = set(digests(with_arms))
    assert not any("base-" in name and "." in name for name in names), "a base model was made twice"
    assert "one-teacher.iter1-student-train" in names and "random.init-student-positive" not in names

    def pairs(name: str) -> list[Pair]:
        return read_records(folder_of(with_arms, name) / "pairs.jsonl", Pair)

    assert {p.chosen_by for p in pairs("one-teacher.iter1-student-select")} == {"teacher1"}
    assert {p.chosen_by for p in pairs("own-positives.iter1-student-select")} == {"student"}
    assert {p.rejected_by for p in pairs("weak-negatives.iter1-student-select")} <= {"teacher0", "teacher1"}
    assert {p.rejected_by for p in pairs("weak-negatives.iter1-teacher0-pairs")} == {"student"}
    spin = pairs("spin-negatives.iter1-student-select")
    shared = folder_of(with_arms, "own-positives.init-student-answer")  # both arms need the same samples
    own = {row["prompt_id"]: row["text"] for _, row in read_jsonl(shared / "responses.jsonl")}
    assert all(own[p.prompt.id] == p.rejected for p in spin)
    assert all(p.chosen_by == p.rejected_by == "student" for p in pairs("own-against-own.iter1-student-select"))
    fresh = {p.prompt.id: p.rejected for p in pairs("fresh-negatives.iter1-student-select")}
    main = {p.prompt.id: p.rejected for p in pairs("iter1-student-select")}
    assert any(fresh[i] != main[i] for i in fresh.keys() & main.keys())
    worst = list(read_jsonl(folder_of(with_arms, "worst.iter1-student-select") / "scores.jsonl"))
    for _, row in worst:
        perplexities = [c["perplexity"] for c in row["candidates"]]
        assert row["kept"] == perplexities.index(max(perplexities))
    teachers = summary["arms"]["no-mutual"]["teacher0"]["scores"]
    assert teachers[0]["gold"] == teachers[1]["gold"]
    assert [s["iteration"] for s in summary["arms"]["filtered-labels"]["student"]["scores"]] == [0]


def test_a_cross_fitted_choice_scores_no_prompt_by_a_student_that_learnt_its_label(with_arms: Path) -> None:
    labels = {e.prompt.id for e in read_records(folder_of(with_arms, "init-weak-labels") / "examples.jsonl", Example)}
    scored: dict[str, list[Candidate]] = {}
    for half in (0, 1):
        learnt = {i for i in labels if half_of(i) != half}
        trained = folder_of(with_arms, f"cross-fit.init-student-half{1 - half}")
        counts = read_json(trained / "timing.json")["counts"]
        assert 0 < counts["examples"] <= len(learnt) < len(labels)
        found = read_candidates(folder_of(with_arms, f"cross-fit.iter1-student-score-half{half}"))
        assert found and not set(found) & learnt and all(half_of(i) == half for i in found)
        scored |= found
    assert set(scored) == set(read_candidates(folder_of(with_arms, "iter1-student-score")))
    select = folder_of(with_arms, "cross-fit.iter1-student-select")
    for _, row in read_jsonl(select / "scores.jsonl"):
        perplexities = [each.perplexity for each in scored[row["prompt_id"]]]
        assert row["kept"] == perplexities.index(min(perplexities))
    pairs = read_records(select / "pairs.jsonl", Pair)
    assert pairs and all(p.ref_chosen_logp is None for p in pairs), "the scorer is not the policy about to be trained"
    (_, first), *_ = read_jsonl(folder_of(with_arms, "cross-fit.iter1-student-train") / "metrics.jsonl")
    assert first["loss"] - 0.2 * first["sft_loss"] == pytest.approx(0.6931472, abs=2e-6)


def test_cross_fit_is_for_a_choice_by_perplexity() -> None:
    for other in ({"source": "own"}, {"selection": "random"}):
        with pytest.raises(ValidationError, match="cross_fit is for a choice by perplexity"):
            PositiveSettings(cross_fit=True, **other)


def test_what_an_agent_wrote_itself_is_not_scored_again(with_arms: Path) -> None:
    """The log-probs of generation are those that scoring would give, and the reference of the first step."""
    responses = folder_of(with_arms, "own-positives.init-student-answer")
    policy = str(folder_of(with_arms, "init-student-positive") / "policy")
    scores = folder_of(with_arms, "own-positives.iter1-student-score")
    rows = [row for _, row in read_jsonl(scores / "candidates.jsonl")]
    counted = read_json(scores / "timing.json")["counts"]["scored_while_generated"]
    given = {r.prompt_id: r for r in read_records(responses / "responses.jsonl", Response)}
    reused = [row for row in rows if row["candidates"][0]["sum_logp"] == given[row["prompt_id"]].sum_logp]
    assert len(reused) == counted > len(rows) // 2

    chat = Chat(load_tokenizer(policy), "vicuna")
    prompts = {p.id: p for p in read_records(folder_of(with_arms, "data") / "student.jsonl", Prompt)}
    items = [(prompts[row["prompt_id"]], row["candidates"][0]) for row in rows]
    groups = [
        chat.group(prompt.messages, [(one["text"], one["finished"])], max_tokens=64, max_prompt_tokens=52)
        for prompt, one in items
    ]
    compute = tiny(with_arms).compute
    module = model_cache(compute, False).policy(PolicyRef(policy))
    wanted = score(module, [g for g in groups if g], max_tokens=compute.score_tokens)
    for row, (scored,) in zip(rows, wanted, strict=True):
        (one,) = row["candidates"]
        assert (one["sum_logp"], one["num_tokens"]) == (pytest.approx(scored.sum_logp, rel=1e-5), scored.num_tokens)
    assert any(one["finished"] for _, one in items) and not all(one["finished"] for _, one in items)
    (_, first), *_ = read_jsonl(folder_of(with_arms, "own-positives.iter1-student-train") / "metrics.jsonl")
    assert first["loss"] - 0.2 * first["sft_loss"] == pytest.approx(0.6931472, abs=1e-5)

    main = read_json(folder_of(with_arms, "iter1-student-score") / "timing.json")["counts"]
    assert "scored_while_generated" not in main, "the teachers' responses are nobody's own here"


def test_only_the_tokens_that_were_drawn_count_as_known() -> None:
    ids = [5, 6, 2]
    response = Response("a", "student", "x", True, 2, 0, -3.5, ids_digest(ids))
    known = as_generated(response, ids)
    assert known is not None and (known.sum_logp, known.num_tokens) == (-3.5, 3)
    assert as_generated(response, [5, 6]) is None and as_generated(response, [5, 62]) is None
    assert as_generated(replace(response, sum_logp=None), ids) is None


def test_no_pair_left_names_the_counts(tmp_path: Path) -> None:
    """FAULTS 38: a selection without pairs is an error of the data with counts per filter."""
    prompt = Prompt.of("hello")
    for folder in ("data", "positives", "negatives", "out"):
        (tmp_path / folder).mkdir()
    write_records(tmp_path / "data" / "student.jsonl", [prompt, Prompt.of("other")])
    inputs = {name: tmp_path / name for name in ("data", "positives", "negatives")}
    context = StageContext("iter1-teacher0-pairs", tmp_path / "out", inputs, StopFlag())
    read = TeacherPairInputs(data="data", positives={"teacher0": "positives"}, negatives={"teacher0": "negatives"})
    same = [Response(prompt.id, "teacher0", "same response", True, 3)]
    write_records(tmp_path / "positives" / "responses.jsonl", same)
    write_records(tmp_path / "negatives" / "responses.jsonl", same)
    with pytest.raises(DataError, match="identical: 1, no_positive: 1"):
        TeacherPairs(seed=0, inputs=read).run(context)


def test_ready_agents_bring_their_policies(finished: tuple[Path, Recipe], tmp_path: Path) -> None:
    """A teacher given as two folders, not trained, only answers."""
    run_dir, _ = finished
    ready = {
        "name": "ready",
        "positive": str(folder_of(run_dir, "init-teacher0-positive") / "policy"),
        "negative": str(folder_of(run_dir, "init-teacher0-negative") / "policy"),
        "train": False,
        "tuning": {"type": "full"},
    }
    base = str(folder_of(run_dir, "base-student") / "model")
    recipe = tiny(tmp_path / "run", teachers=[ready], student={"model": base}, iterations=1)
    out = run(recipe)
    summary = json.loads((out / "summary.json").read_text())
    first, last = summary["agents"]["ready"]["scores"]
    assert first["gold"] == last["gold"]
    trained = folder_of(out, "iter1-student-train") / "policy"
    assert (trained / "adapter_model.safetensors").exists(), "LoRA is the default tuning"


def test_agents_with_different_tokenizers_exchange_text(finished: tuple[Path, Recipe]) -> None:
    """FAULTS 16: teacher1 speaks byte-level BPE, the others words; only text passes between them."""
    run_dir, _ = finished
    sizes = {
        name: len(load_tokenizer(folder_of(run_dir, f"base-{name}") / "model")) for name in ("teacher1", "student")
    }
    assert sizes["teacher1"] != sizes["student"]
    given = {row["text"] for _, row in read_jsonl(folder_of(run_dir, "init-teacher1-answer") / "responses.jsonl")}
    scored = read_jsonl(folder_of(run_dir, "iter1-student-score") / "candidates.jsonl")
    assert given == {c["text"] for _, row in scored for c in row["candidates"] if c["by"] == "teacher1"}


def test_a_teachers_own_data_loses_the_reserved_prompts(tmp_path: Path) -> None:
    """FAULTS 10: what the student half and the test set hold is dropped from it, and counted."""
    rows = [{"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(40)]
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(path), "teacher_prompts": 8, "student_prompts": 6, "test_prompts": 5, "dev_prompts": 4}
    sources = read_sources(DataSettings(**data), {"teacher0": None, "teacher1": str(path)}, seed=0)
    reserved = {pair.prompt.id for pair in (*sources.student, *sources.test, *sources.dev)}
    assert len(sources.teachers["teacher0"]) == 8 and len(sources.teachers["teacher1"]) == 40 - 15
    assert not reserved & {pair.prompt.id for pair in sources.teachers["teacher1"]}
    assert sources.counts["teacher1_overlap_dropped"] == 15


def test_development_prompts_enter_keys_where_there_are_any(tmp_path: Path) -> None:
    """Runs of earlier versions, which knew none, keep their keys; the teachers alone are evaluated on them."""
    plain, world = tiny(tmp_path), {"world": {"dev_prompts": 5}}
    assert "dev_prompts" not in json.dumps(build_plan(plain).graph.stage("data").work.settings())
    sized = plain.data.world.model_copy(update=world["world"])
    recipe = plain.model_copy(update={"data": plain.data.model_copy(update={"world": sized})})
    plan = build_plan(recipe)
    assert plan.graph.stage("data").work.settings()["data"]["world"]["dev_prompts"] == 5
    assert plan.development == {"teacher0": "dev-teacher0-iter0", "teacher1": "dev-teacher1-iter0"}
    added = {stage.name for stage in plan.graph.stages} - {stage.name for stage in build_plan(plain).graph.stages}
    assert added == {f"dev-teacher{k}-{what}" for k in (0, 1) for what in ("base", "iter0")}
    assert build_plan(plain).graph.stage("eval-student-iter0").work.settings().get("held_out") is None
    costs = [size_of(recipe), size_of(plain)]
    assert [plan.graph.stage("dev-teacher0-iter0").work.cost(size).tokens > 0 for size in costs] == [True, False]


def test_prompts_that_are_too_long_are_dropped_and_counted(finished: tuple[Path, Recipe], tmp_path: Path) -> None:
    """FAULTS 11: dropped by policy with a count; an error of the data if none is left."""
    run_dir, recipe = finished
    work = build_plan(recipe).graph.stage("init-teacher0-positive").work
    assert isinstance(work, Imitate)
    prompts = [Prompt.of("short words"), Prompt.of("word " * 80)]
    items = [(prompt, [("a response", True)]) for prompt in prompts]

    def kept(policy: str, chosen: list[tuple[Prompt, list[tuple[str, bool]]]]) -> list[int]:
        agent = work.agent.model_copy(update={"long_prompt": policy})
        changed = work.model_copy(update={"policy": work.policy.model_copy(update={"agent": agent})})
        inputs = {"base-teacher0": folder_of(run_dir, "base-teacher0")}
        context = StageContext("init-teacher0-positive", tmp_path, inputs, StopFlag())
        return encode(changed.open_policy(context), chosen)[1]

    assert kept("truncate", items) == [0, 1] and kept("drop", items) == [0]
    with pytest.raises(DataError, match="none of 1 prompts is left"):
        kept("drop", items[1:])
    with pytest.raises(DataError, match="tokens"):
        kept("error", items)


def test_sources_need_a_corpus(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(12)]
    path = tmp_path / "small.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(path), "teacher_prompts": 6, "student_prompts": 4, "test_prompts": 2}
    with pytest.raises(DataError, match="no document is left"):
        run(tiny(tmp_path / "run", data=data))
