"""TODO."""

from __future__ import annotations

import torch
from safetensors.torch import save
from torch import Tensor

from macpo.engine.config import ComputeSettings, PreferenceSettings
from macpo.engine.data.pack import PrefixGroup
from macpo.engine.data.records import Example, Pair, read_records
from macpo.engine.files import atomic_write, write_json
from macpo.engine.run.context import StageContext
from macpo.engine.training.objectives import loss_settings
from macpo.engine.training.reference import weighted
from macpo.evaluation.metrics import preference_metrics
from macpo.kernels.pair_loss.losses import LOSSES, PairScores, sft
from macpo.method.encoding import encode, encode_pairs
from macpo.method.likelihoods import likelihoods, shared_parts
from macpo.method.policies import agent_chat, load_policy
from macpo.method.reference import read_reference, reference_parts


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
