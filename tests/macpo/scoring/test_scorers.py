"""`evaluation.scorers`: what scores the responses of a run, and what may be its headline."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import macpo
from forks import ranks
from standalone_runs import make_base
from tiny import init, tiny
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from macpo.commands.planning.estimates import estimate, hardware_of, size_of
from macpo.commands.run import is_finished, run
from macpo.config import Recipe
from macpo.data.preferences import split
from macpo.engine import recipe as recipes
from macpo.engine.data.chat import Chat, load_tokenizer
from macpo.engine.data.records import Pair, Prompt
from macpo.engine.distributed.world import World
from macpo.engine.errors import DataError, Stopped
from macpo.engine.files import read_jsonl
from macpo.engine.models.reward.classifier import Classifier
from macpo.engine.processes import StopFlag
from macpo.engine.run.context import StageContext
from macpo.engine.run.folder import folder_of
from macpo.evaluation.summary import headline_metric
from macpo.method.scoring.scorers import Item
from macpo.method.scoring.stages import CheckScorer
from macpo.methods.registry import build_plan
from macpo.recipe_kinds import plan_of


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sequence classifier of others: three labels, a template of its own, padding that is its end token."""
    folder = make_base(tmp_path_factory.mktemp("model"))
    torch.manual_seed(3)
    labels: Any = {0: "rude", 1: "polite", 2: "odd"}
    model = AutoModelForSequenceClassification.from_pretrained(folder, id2label=labels)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.config.pad_token_id = tokenizer.eos_token_id
    with torch.no_grad():
        model.score.weight.mul_(5)
    model.save_pretrained(folder.parent / "classifier")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role | upper }} : {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT : {% endif %}"
    )
    tokenizer.save_pretrained(folder.parent / "classifier")
    return folder.parent / "classifier"


def recipe_of(output: Path, scorers: list[dict[str, Any]], **changes: Any) -> Recipe:
    """One teacher and the student as they are after their initialisation: every policy answers the test prompts."""
    teacher = {"init": init(16), "tuning": {"type": "full"}}
    evaluation = {"scorers": scorers, "ceiling": False}
    return tiny(output, iterations=0, teachers=[teacher], evaluation=evaluation, **changes)


def human_pairs(path: Path, count: int) -> Path:
    rng = random.Random(1)
    rows = []
    for i in range(count):
        better, worse = "sure , happy to help you . good luck !", rng.choice(["go away .", "no , you silly person ."])
        rows.append({"prompt": f"my name is emma and i want to paint item {i} .", "chosen": better, "rejected": worse})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def four_sets(path: Path) -> dict[str, Any]:
    """Data of a recipe whose scorer is trained on prompts of its own."""
    sizes = {"teacher_prompts": 16, "student_prompts": 12, "test_prompts": 16, "reward_prompts": 40}
    return {"path": str(human_pairs(path, 90)), **sizes}


def test_gold_and_a_classifier_score_every_response(classifier: Path, tmp_path: Path) -> None:
    """The gold scorer repeats what evaluation measured; the classifier does what transformers does with one row."""
    scorers = [
        {"name": "rules", "kind": "gold"},
        {"name": "rm", "reward": str(classifier), "label": "polite", "batch_tokens": 60},
    ]
    recipe = recipe_of(tmp_path / "run", scorers)
    before, after = build_plan(recipe_of(tmp_path / "run", [])), build_plan(recipe)
    assert {s.name for s in before.graph.stages} < {s.name for s in after.graph.stages}
    run(recipe)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for agent in summary["agents"].values():
        for row in agent["scores"]:
            assert row["score_rules"] == pytest.approx(row["gold"], abs=1e-12)
            assert row["score_rules_se"] == pytest.approx(row["gold_se"], abs=1e-12)
            assert row["score_rm_se"] > 0
    assert summary["metric"] == "gold" and summary["scorers"]["rules"] == {"headline": True}

    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    responses = [row for _, row in read_jsonl(folder_of(tmp_path / "run", "eval-student-iter0") / "evaluation.jsonl")]
    scores = [row for _, row in read_jsonl(folder_of(tmp_path / "run", "score-rm-student-iter0") / "scores.jsonl")]
    assert [row["prompt_id"] for row in responses] == [row["prompt_id"] for row in scores]
    seen = 0
    for response, score in zip(responses, scores, strict=True):
        if not response["answer"]:
            continue
        whole = [*response["prompt"], {"role": "assistant", "content": response["answer"]}]
        text = tokenizer.apply_chat_template(whole, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        ids["input_ids"] = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids["input_ids"]], 1)
        with torch.no_grad():
            expected = model(input_ids=ids["input_ids"]).logits[0, 1].item()
        assert score["score"] == pytest.approx(expected, rel=1e-5, abs=1e-5)
        seen += 1
    assert seen >= 6 and len({row["score"] for row in scores}) > 3
    page = (tmp_path / "run" / "report.html").read_text()
    assert "score by rm" in page and "The scorer rm agrees with people" in page
    assert is_finished(recipe, plan_of(recipe))
    other = recipe_of(tmp_path / "run", [scorers[0], scorers[1] | {"label": "odd"}])
    assert not is_finished(other, plan_of(other))  # another label is another scorer
    budget = recipe_of(tmp_path / "run", [scorers[0], scorers[1] | {"batch_tokens": 7}])
    assert is_finished(budget, plan_of(budget))  # how it is batched is not


def test_a_reward_model_trained_in_the_run_leads_where_it_agrees_with_people(tmp_path: Path) -> None:
    """On a fourth set of prompts; without gold it is the headline, and one that only guesses is not."""
    data = four_sets(tmp_path / "pairs.jsonl")
    training = {"learning_rate": 1e-2, "batch": 8, "epochs": 4}
    lora = {"type": "lora", "rank": 4, "target_modules": "all-linear"}
    scorers = [
        {"name": "guess", "reward": {"train": {"training": {"learning_rate": 1e-9}, "tuning": lora}}},
        {"name": "own", "reward": {"train": {"training": training, "tuning": lora}}},
    ]
    recipe = recipe_of(tmp_path / "run", scorers, data=data)
    run(recipe)
    folder = folder_of(tmp_path / "run", "data")
    sets = {
        name: {row["prompt_id"] for _, row in read_jsonl(folder / f"{name}.jsonl")}
        for name in ("teacher-teacher0", "student", "test", "reward")
    }
    assert {name: len(ids) for name, ids in sets.items()} == dict(zip(sets, (16, 12, 16, 40), strict=True))
    assert len(set().union(*sets.values())) == 84
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["scorers"]["own"]["headline"] and summary["scorers"]["own"]["reward_accuracy"] == 1.0
    assert summary["scorers"]["own"]["reward_pairs"] == 16
    assert not summary["scorers"]["guess"]["headline"] or summary["scorers"]["guess"]["reward_accuracy_low"] > 0.5
    leads = [name for name in ("guess", "own") if summary["scorers"][name]["headline"]]
    assert summary["metric"] == f"score_{leads[0]}"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The scorer own agrees with people on 100.0% of 16 held-out pairs" in page
    guessing = summary | {"scorers": {name: each | {"headline": False} for name, each in summary["scorers"].items()}}
    assert headline_metric(guessing) == "preference_accuracy"
    trained = folder_of(tmp_path / "run", "reward-own") / "policy"
    assert AutoModelForSequenceClassification.from_pretrained(trained).config.num_labels == 1


def test_a_plan_knows_the_model_that_a_scorer_is_trained_from(tmp_path: Path) -> None:
    """Its weights are the work of training and scoring, and lie on the disk merged; the student's would be others."""
    base = make_base(tmp_path / "model")
    data = four_sets(tmp_path / "pairs.jsonl")
    scorers = [{"name": "own", "reward": {"train": {}}}, {"name": "named", "reward": {"train": {"model": str(base)}}}]
    recipe = recipe_of(tmp_path / "run", scorers, data=data)
    rows = {row.stage: row for row in estimate(recipe, build_plan(recipe), hardware_of(recipe))}
    sizes = size_of(recipe).shapes
    assert sizes["named"].name == str(base) and sizes["named"].num_parameters != sizes["student"].num_parameters
    assert rows["reward-named"].load and rows["reward-named"].seconds > 0
    for name in ("reward-own", "reward-named"):
        agent = "student" if name == "reward-own" else "named"
        assert rows[name].disk_bytes >= 4 * sizes[agent].num_parameters


def test_the_fourth_set_leaves_the_others_as_they_are() -> None:
    pairs = [Pair(Prompt.of(f"p{i}"), "a", "b") for i in range(60)]
    sizes = {"teacher": 20, "student": 10, "test": 10, "seed": 3}
    without, with_ = split(pairs, **sizes), split(pairs, **sizes, reward=12)
    for name in ("teacher", "student", "test"):
        assert list(getattr(without, name).ids) == list(getattr(with_, name).ids)
    assert len(without.reward) == 0 and len(with_.reward) == 12
    assert {*with_.reward.ids, *with_.rest.ids} == {*without.rest.ids}
    with pytest.raises(DataError, match=r"teacher_prompts 20 .* \+ reward_prompts 30"):
        split(pairs, **sizes, reward=30)


def test_scoring_resumes_after_its_last_wave_and_scores_equal_responses_once(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path / "run", [{"name": "rm", "reward": str(classifier), "label": "polite"}])
    work = build_plan(recipe).graph.stage("check-rm").work
    assert isinstance(work, CheckScorer) and work.compute.wave_requests == 8
    items = [Item(Prompt.of(f"how do i sit {i % 12} ?"), "sure .", True) for i in range(24)]  # 12, each twice
    rows: list[int] = []
    forward = Classifier._forward

    def counted(self: Classifier, batch: list[list[int]]) -> torch.Tensor:
        rows.append(len(batch))
        return forward(self, batch)

    monkeypatch.setattr(Classifier, "_forward", counted)

    def context(name: str, stop: int) -> StageContext:
        (tmp_path / name).mkdir(exist_ok=True)
        ctx = StageContext("check-rm", tmp_path / name, {}, StopFlag())
        asked = iter(range(1, 1000))
        monkeypatch.setattr(ctx, "stop_requested", lambda: next(asked) > stop)
        return ctx

    whole = work.scored(context("whole", 1000), items)
    assert sum(rows) == 12 and whole[:12] == whole[12:]
    rows.clear()
    with pytest.raises(Stopped):
        work.scored(context("parts", 2), items)  # asked before each wave, and before each batch
    assert sum(rows) == 8
    assert work.scored(context("parts", 1000), items) == whole
    assert sum(rows) == 12
    (tmp_path / "parts" / "waves" / "0001.json").write_text('{"keys": [], "sco')
    assert work.scored(context("parts", 1000), items) == whole and sum(rows) == 16


def test_two_ranks_share_the_rows_of_a_wave(classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each scores some of them, and both have all scores."""
    recipe = recipe_of(tmp_path / "run", [{"name": "rm", "reward": str(classifier), "label": "polite"}])
    work = build_plan(recipe).graph.stage("check-rm").work
    assert isinstance(work, CheckScorer)
    items = [Item(Prompt.of(f"how do i sit {i} ?"), "sure . " * (1 + i % 4), i % 2 == 0) for i in range(12)]
    forward, rows = Classifier._forward, [0]

    def counted(self: Classifier, batch: list[list[int]]) -> torch.Tensor:
        rows[0] += len(batch)
        return forward(self, batch)

    monkeypatch.setattr(Classifier, "_forward", counted)
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()

    def go(world: World) -> None:
        found = work.scored(StageContext("check-rm", tmp_path / "two", {}, StopFlag(), world), items)
        assert rows == [6]
        (tmp_path / f"{world.rank}.json").write_text(json.dumps(found))

    assert ranks(2, go, timeout_s=120) == [0, 0]
    one = work.scored(StageContext("check-rm", tmp_path / "one", {}, StopFlag()), items)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for mine, theirs in zip(one, found, strict=True):
            assert mine.score == pytest.approx(theirs[0], rel=1e-5, abs=1e-6) and mine.tokens == theirs[1]


def test_an_implicit_reward_is_beta_times_the_log_ratio(tmp_path: Path) -> None:
    one, other = make_base(tmp_path / "one"), make_base(tmp_path / "other", initializer_range=0.3)
    scorer = {"name": "dpo", "kind": "implicit-reward", "policy": str(other), "base": str(one), "beta": 0.5}
    work = build_plan(recipe_of(tmp_path / "run", [scorer | {"template": "vicuna"}])).graph.stage("check-dpo").work
    assert isinstance(work, CheckScorer)
    (tmp_path / "stage").mkdir()
    ctx = StageContext("check-dpo", tmp_path / "stage", {}, StopFlag())
    items = [Item(Prompt.of("how do i sit ?"), "sure . good luck !", True), Item(Prompt.of("how do i sit ?"), "", True)]
    scores = work.scored(ctx, items)
    chat = Chat(load_tokenizer(one), "vicuna")
    for item, score in zip(items, scores, strict=True):
        prompt = chat.prompt_ids(item.prompt.messages)
        response = chat.response_ids(str(item.reply))
        ids = torch.tensor([prompt + response])
        logps = []
        for folder in (other, one):
            with torch.no_grad():
                logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits[0, len(prompt) - 1 : -1]
            logps.append(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum().item())
        assert score.score == pytest.approx(0.5 * (logps[0] - logps[1]), abs=1e-4) and score.tokens == len(response)


@pytest.mark.parametrize(
    ("scorer", "said"),
    [
        ({"reward": "RM"}, "label: the model has 3 outputs: rude, polite, odd. Fix: name one of them"),
        ({"reward": "RM", "label": "kind"}, "the model has no label 'kind'. Fix: use one of rude, polite, odd"),
        ({"reward": "BASE"}, "it has no head: score.weight is not among its weights. Fix: name a reward model"),
        ({"reward": "BARE", "label": "polite"}, "template: its tokenizer has no chat template. Fix: set template to"),
        ({"reward": "/nowhere"}, "there is no reward model folder '/nowhere'"),
        ({"kind": "implicit-reward", "policy": "/nowhere", "base": "BASE"}, "there is no policy folder '/nowhere'"),
        ({"kind": "implicit-reward", "policy": "BASE"}, "base is missing: a scorer of kind implicit-reward needs it"),
        ({"kind": "gold", "reward": "RM"}, "reward is not read by a scorer of kind gold"),
        ({"reward": {"train": {}}}, "train needs human pairs that no agent sees. Fix: set data.reward_prompts"),
    ],
)
def test_what_cannot_score_is_refused_before_anything_runs(
    scorer: dict[str, Any], said: str, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in classifier.iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).write_bytes(file.read_bytes())
    base = make_base(tmp_path / "base") if "BASE" in scorer.values() else tmp_path
    places = {"RM": str(classifier), "BASE": str(base), "BARE": str(bare)}
    scorer = {key: places.get(value, value) if isinstance(value, str) else value for key, value in scorer.items()}
    recipe = tiny(tmp_path / "run")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.dump(recipe))
    code = macpo("run", path, "--set", f"evaluation.scorers={json.dumps([{'name': 'rm', **scorer}])}")
    assert code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_arms_are_compared_by_the_same_scorers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ablations.x may not change `evaluation.scorers`"):
        tiny(tmp_path, ablations={"x": {"evaluation.scorers": []}})
    with pytest.raises(ValueError, match="scorers need distinct names"):
        recipe_of(tmp_path, [{"name": "a", "kind": "gold"}] * 2)
