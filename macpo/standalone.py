"""SFT or preference training of one policy: a short graph of the method's own stages, and a held-out evaluation.

data -> [base] -> evaluate before -> [reference] -> train -> evaluate after
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from macpo import demo_world
from macpo.agents import agent_chat, encode, encode_pairs, likelihoods, load_policy, shared_parts
from macpo.config import Recipe
from macpo.data.examples import load_examples
from macpo.data.preferences import load_preferences, shuffled_prompts
from macpo.data.rows import fingerprint
from macpo.engine.config import ComputeSettings, PreferenceSettings
from macpo.engine.data.pack import PrefixGroup
from macpo.engine.data.records import Example, Pair, read_records, write_records
from macpo.engine.errors import DataError
from macpo.engine.files import atomic_write, write_json
from macpo.engine.run.context import StageContext
from macpo.engine.run.stages import Graph
from macpo.engine.training.objectives import loss_settings
from macpo.engine.training.reference import weighted
from macpo.evaluation.metrics import preference_metrics
from macpo.kernels.pair_loss.losses import LOSSES, PairScores, sft
from macpo.learning import imitate, prefer, read_reference, reference_parts
from macpo.standalone_config import KINDS, NAME, ExampleData, PairData, PreferenceRecipe, Standalone
from macpo.steps import Builder, Plan, Point, StageName

Records = list[Pair] | list[Example]


@dataclass(frozen=True, slots=True)
class Sets:
    """What the data holds: no prompt of `test` is in `train` or `documents`."""

    train: Records
    test: Records
    documents: list[Example]
    """For a model that is pretrained here: what `train_prompts` leaves over."""
    counts: dict[str, int]


def build_plan(recipe: Standalone) -> Plan:
    """The stages of a standalone recipe."""
    plan = Plan()
    steps = Builder(recipe, plan)
    (agent,) = recipe.agents
    paths = {recipe.data.path, recipe.data.test_path}
    data_settings = {
        "data": recipe.data.model_dump(mode="json", exclude={"long_prompt", "special_text"}),
        "kind": recipe.recipe,
        "files": {path: fingerprint(path) for path in sorted(filter(None, paths))},
        "seed": recipe.seed,
    }
    data = steps.data = steps.add("data", split_records, data_settings, {})
    common = steps.policy_settings(agent, ready=agent.positive)
    base = steps.base(agent)
    training: dict[str, Any] = {"seed": steps.seed(agent, recipe.recipe)}
    inputs: dict[str, StageName] = {}

    if isinstance(recipe, PreferenceRecipe):
        training |= {"optim": recipe.training.model_dump(mode="json"), "file": "train.jsonl"}
        training |= steps.reference_settings(agent, recipe.training)
        if recipe.training.has_reference:
            chosen = {name: training["optim"][name] for name in ("reference", "reference_model")}
            settings = common | steps.reference_settings(agent, recipe.training) | chosen
            run = steps.compute(score_reference)
            inputs["reference"] = steps.add("reference", run, settings, base | {"pairs": data})
        run, alias, judge = steps.compute(prefer), "pairs", steps.compute(evaluate_pairs)
        judging: dict[str, Any] = {"loss": recipe.training.model_dump(mode="json", include=LOSS_FIELDS)}
    else:
        training |= {"optim": recipe.training.model_dump(mode="json"), "file": "train.jsonl", "side": "answer"}
        training |= {"tuning": agent.tuning.model_dump(mode="json")}
        run, alias, judge = steps.compute(imitate), "examples", steps.compute(evaluate_examples)
        judging = {}

    def evaluate(iteration: int, policy: StageName | None) -> None:
        ready = agent.positive if policy is None else None
        settings = steps.policy_settings(agent, ready) | judging | {"role": "policy", "iteration": iteration}
        sources = base | inputs | {"data": data} | ({"policy": policy} if policy else {})
        stage = steps.add(f"eval-{NAME}-iter{iteration}", judge, settings, sources)
        plan.points.append(Point("", NAME, "policy", iteration, policy, stage))

    evaluate(0, None)
    evaluate(1, steps.add(f"train-{NAME}", run, common | training, base | inputs | {alias: data}))
    return plan


def show_plan(recipe: Standalone) -> str:
    """The stages as text, with exact numbers of rows and steps; no model is loaded."""
    sets = read_sets(recipe.data.model_dump(mode="json"), recipe.recipe, recipe.seed)
    steps, training = -(-len(sets.train) // recipe.training.batch), recipe.training
    notes = {
        "data": f"{len(sets.train):,} to train on, {len(sets.test):,} held out",
        "reference": f"{len(sets.train) + len(sets.test):,} pairs, unless the cache has them",
        f"train-{NAME}": f"{steps * training.epochs:,} steps of {training.batch} in {training.epochs} epochs, before "
        f"prompts are dropped that are too long",
    }
    names = [stage.name for stage in build_plan(recipe).graph.stages]
    lines = [f"{name:20} {notes.get(name, '')}".rstrip() for name in names]
    return "\n".join([f"{len(names)} stages into {recipe.output}", "", *lines])


LOSS_FIELDS = {"loss", "beta", "label_smoothing", "gamma", "ld_alpha", "sft_weight"}


def build_graph(config: Mapping[str, Any]) -> Graph:
    """The graph of a resolved recipe; worker processes rebuild it by this function's name."""
    recipe = KINDS[config["recipe"]].model_validate(config)
    assert not isinstance(recipe, Recipe)
    return build_plan(recipe).graph


# --- data ---------------------------------------------------------------------------------------------------------


def read_sets(settings: Mapping[str, Any], kind: str, seed: int) -> Sets:
    """Build the demo world, or load a data set and hold prompts out of it.

    Raises DataError where too few prompts are left to train or to evaluate on.
    """
    model: type[PairData] | type[ExampleData] = PairData if kind == "preference" else ExampleData
    data = model.model_validate(settings)
    if data.world is not None:
        made = demo_world.build(data.world, seed, num_teachers=1)
        side = "rejected" if data.format == "rejected" else "chosen"
        train, test = (_of_kind(pairs, kind, side) for pairs in (made.student, made.test))
        return Sets(train, test, made.documents["student"], {})
    records, counts = _load(data, data.path, data.split)
    if data.test_path is None and data.test_split is None:
        prompts = shuffled_prompts(records, seed)
        held, left = prompts[: data.test_prompts], prompts[data.test_prompts :]
    else:
        held_records, _ = _load(data, data.test_path or data.path, data.test_split or data.split)
        held = shuffled_prompts(held_records, seed)[: data.test_prompts]
        reserved = {group[0].prompt.id for group in held}
        prompts = shuffled_prompts(records, seed)
        left = [group for group in prompts if group[0].prompt.id not in reserved]
        counts["train_test_overlap_dropped"] = len(prompts) - len(left)
    if not left or not held or len(left) < (data.train_prompts or 0):
        raise DataError(
            f"{len(left)} distinct prompts are left to train on and {len(held)} to evaluate on",
            "lower test_prompts or train_prompts, or add data",
            field="data",
        )
    used, rest = left[: data.train_prompts], left[len(left) if data.train_prompts is None else data.train_prompts :]
    documents = [document for group in rest for record in group for document in _documents(record)]
    return Sets([r for group in used for r in group], [group[0] for group in held], documents, counts)


def _load(data: PairData | ExampleData, path: str | None, split: str) -> tuple[list[Any], dict[str, int]]:
    assert path is not None
    load: Any = load_preferences if isinstance(data, PairData) else load_examples
    found: tuple[list[Any], dict[str, int]] = load(
        path,
        format=data.format,
        columns=data.columns,
        split=split,
        subset=data.subset,
        preference=data.preference,
    )
    return found


def _of_kind(pairs: list[Pair], kind: str, side: str) -> Records:
    return pairs if kind == "preference" else [Example(pair.prompt, getattr(pair, side)) for pair in pairs]


def _documents(record: Pair | Example) -> list[Example]:
    if isinstance(record, Example):
        return [record]
    return [Example(record.prompt, record.chosen), Example(record.prompt, record.rejected)]


def split_records(ctx: StageContext) -> None:
    """Write `train.jsonl`, `test.jsonl` and `documents-student.jsonl`."""
    sets = read_sets(ctx.settings["data"], ctx.settings["kind"], ctx.settings["seed"])
    write_records(ctx.dir / "train.jsonl", sets.train)
    write_records(ctx.dir / "test.jsonl", sets.test)
    write_records(ctx.dir / "documents-student.jsonl", sets.documents)
    write_json(
        ctx.dir / "counts.json", {"rows": {"train": len(sets.train), "test": len(sets.test)}, "input": sets.counts}
    )


# --- reference and evaluation -------------------------------------------------------------------------------------


def score_reference(compute: ComputeSettings, ctx: StageContext) -> None:
    """Log-probs of all pairs under the reference: `train.safetensors`, `test.safetensors`, [num_groups, 2, 2] each."""
    settings = PreferenceSettings(**{name: ctx.settings[name] for name in ("reference", "reference_model")})
    tokens = 0
    for name in ("train", "test"):
        groups, _ = encode_pairs(ctx, read_records(ctx.input("pairs") / f"{name}.jsonl", Pair))
        parts = reference_parts(compute, ctx, groups, settings)
        tokens += sum(group.num_tokens for group in groups)
        if ctx.world.is_main:
            atomic_write(ctx.dir / f"{name}.safetensors", save({"parts": parts.reshape(-1, 2, 2)}))
    ctx.note(tokens=tokens)


def evaluate_pairs(compute: ComputeSettings, ctx: StageContext) -> None:
    """Loss, preference accuracy and margin on the held-out pairs; `evaluation.json`."""
    pairs = read_records(ctx.input("data") / "test.jsonl", Pair)
    groups, kept = encode_pairs(ctx, pairs)
    parts = shared_parts(load_policy(compute, ctx), groups, compute, ctx.world, ctx.stop_requested).reshape(-1, 2, 2)
    reference = read_reference(ctx, "test", len(groups)) if "reference" in ctx.inputs else None
    settings = PreferenceSettings.model_validate(ctx.settings["loss"])
    _write_evaluation(ctx, groups, len(pairs) - len(kept), pair_metrics(settings, parts, reference, groups))


def pair_metrics(
    settings: PreferenceSettings, parts: Tensor, reference: Tensor | None, groups: list[PrefixGroup]
) -> dict[str, float]:
    """Mean loss and what `evaluate.preference_metrics` says of the implicit rewards.

    parts, reference: [B, 2, 2] float64, `objectives.shared_sums` of chosen and rejected under policy and reference.
    A loss without a reference rewards beta times the log-prob per token.
    """
    tokens_b2 = torch.tensor([[len(ids) for ids in group.responses] for group in groups], dtype=torch.float64)
    logps_b2 = weighted(parts, settings.ld_alpha)
    ref_b2 = torch.zeros_like(logps_b2) if reference is None else weighted(reference, settings.ld_alpha)
    options = loss_settings(settings)
    scores = PairScores(*(logps_b2 - ref_b2).unbind(1), *tokens_b2.unbind(1))
    loss_b = LOSSES[settings.loss](scores, options)[0]
    loss_b = loss_b + settings.sft_weight * sft(weighted(parts, None)[:, 0], tokens_b2[:, 0])
    if reference is None:
        logps_b2 = logps_b2 / tokens_b2
    columns = [column.tolist() for column in (*logps_b2.unbind(1), *ref_b2.unbind(1))]
    return {"loss": loss_b.mean().item(), **preference_metrics(*columns, beta=settings.beta)}


def evaluate_examples(compute: ComputeSettings, ctx: StageContext) -> None:
    """NLL and perplexity of the held-out answers, by token; `evaluation.json`."""
    examples = read_records(ctx.input("data") / "test.jsonl", Example)
    groups, kept = encode(ctx, agent_chat(ctx), [(e.prompt, [(e.answer, e.finished)]) for e in examples])
    scores = [
        found for (found,) in likelihoods(load_policy(compute, ctx), groups, compute, ctx.world, ctx.stop_requested)
    ]
    num_tokens = sum(score.num_tokens for score in scores)
    loss = torch.tensor([-score.sum_logp for score in scores], dtype=torch.float64).sum() / num_tokens
    metrics = {"loss": loss.item(), "perplexity": loss.clamp(max=700.0).exp().item()}
    _write_evaluation(ctx, groups, len(examples) - len(kept), metrics | {"answers": len(groups)})


def _write_evaluation(ctx: StageContext, groups: list[PrefixGroup], dropped: int, metrics: dict[str, float]) -> None:
    about = {name: ctx.settings[name] for name in ("role", "iteration")}
    if ctx.world.is_main:
        write_json(ctx.dir / "evaluation.json", {**about, "dropped_long_prompt": dropped, **metrics})
    ctx.note(tokens=sum(group.num_tokens for group in groups))
