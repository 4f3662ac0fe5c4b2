"""What a standalone recipe measures: reference log-probs of its pairs, and its policy on the held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import field_serializer

from macpo.engine.config import PreferenceSettings, Tuning
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.records import Example, Pair, Prompt, read_records
from macpo.engine.files import atomic_write, write_json, write_jsonl
from macpo.engine.run.context import StageContext
from macpo.evaluation.agreement import agreement
from macpo.evaluation.metrics import preference_metrics
from macpo.evaluation.summary import Role
from macpo.method.costs import Cost, RunSize
from macpo.method.encoding import encode_examples, encode_pairs
from macpo.method.heldout import response_metrics, response_row
from macpo.method.likelihoods import likelihoods, shared_parts
from macpo.method.policies import PolicyDataInputs, PolicyInputs, PolicyStage
from macpo.method.responses import GeneratingStage

if TYPE_CHECKING:
    from torch import Tensor

LOSS_FIELDS = {"loss", "beta", "label_smoothing", "gamma", "ld_alpha", "sft_weight"}


class ScoreReferenceInputs(PolicyInputs):
    pairs: str


class ScoreReference(PolicyStage):
    """Log-probs of all pairs under the reference: `train.safetensors`, `test.safetensors`, [num_groups, 2, 2] each."""

    name = "score_reference"
    doing = "computes reference log-probs"
    tuning: Tuning
    reference: Literal["policy", "adapter-off"]
    reference_model: str | None
    reference_weights: dict[str, str]
    inputs: ScoreReferenceInputs

    def run(self, ctx: StageContext) -> None:
        from safetensors.torch import save

        from macpo.method.reference import Reference

        policy = self.open_policy(ctx)
        settings = PreferenceSettings(reference=self.reference, reference_model=self.reference_model)
        tokens = 0
        for name in ("train", "test"):
            groups, *_ = encode_pairs(policy, read_records(ctx.input(self.inputs.pairs) / f"{name}.jsonl", Pair))
            parts = Reference(policy, settings, self.tuning).parts(groups)
            tokens += sum(group.num_tokens for group in groups)
            if ctx.world.is_main:
                atomic_write(ctx.dir / f"{name}.safetensors", save({"parts": parts.reshape(-1, 2, 2)}))
        ctx.note(tokens=tokens)

    def cost(self, run: RunSize) -> Cost:
        return self.forward(run, (run.student_prompts + run.test_prompts) * _group_tokens(run, responses=2))

    def disk_bytes(self, run: RunSize) -> float:
        return 32 * (run.student_prompts + run.test_prompts)


def _group_tokens(run: RunSize, responses: int) -> float:
    """Mean tokens of a prompt with its responses."""
    return run.prompt_tokens + responses * run.response_tokens


class EvaluateInputs(PolicyDataInputs):
    reference: str | None = None


class Evaluate(PolicyStage):
    """A kind of stage that writes `evaluation.json`."""

    responses: ClassVar[int] = 1
    """Per prompt."""
    role: Role
    iteration: int
    inputs: EvaluateInputs

    def cost(self, run: RunSize) -> Cost:
        return self.forward(run, run.test_prompts * _group_tokens(run, self.responses))

    def disk_bytes(self, run: RunSize) -> float:
        return 1000

    def write(
        self, ctx: StageContext, groups: list[PrefixGroup], counts: dict[str, int], metrics: Mapping[str, float | None]
    ) -> None:
        if ctx.world.is_main:
            about = {"role": self.role, "iteration": self.iteration, **counts}
            write_json(ctx.dir / "evaluation.json", {**about, **metrics})
        ctx.note(tokens=sum(group.num_tokens for group in groups))


class EvaluatePairs(Evaluate):
    """Loss, preference accuracy and margin on the held-out pairs."""

    name = "evaluate_pairs"
    doing = "scores test pairs"
    responses = 2
    loss: PreferenceSettings

    @field_serializer("loss")
    def _key_of_loss(self, loss: PreferenceSettings) -> dict[str, Any]:
        """How the loss is minimised does not change its value."""
        return loss.model_dump(mode="json", include=LOSS_FIELDS)

    def run(self, ctx: StageContext) -> None:
        from macpo.method.reference import read_reference

        policy = self.open_policy(ctx)
        pairs = read_records(ctx.input(self.inputs.data) / "test.jsonl", Pair)
        groups, _, counts = encode_pairs(policy, pairs)
        parts = shared_parts(policy, policy.load(), groups).reshape(-1, 2, 2)
        reference = None
        if self.inputs.reference is not None:
            reference = read_reference(ctx.input(self.inputs.reference) / "test.safetensors", len(groups))
        self.write(ctx, groups, counts, pair_metrics(self.loss, parts, reference, groups))


def pair_metrics(
    settings: PreferenceSettings, parts: Tensor, reference: Tensor | None, groups: list[PrefixGroup]
) -> dict[str, float]:
    """Mean loss and what `evaluate.preference_metrics` says of the implicit rewards.

    parts, reference: [B, 2, 2] float64, `objectives.shared_sums` of chosen and rejected under policy and reference.
    A loss without a reference rewards beta times the log-prob per token.
    """
    import torch

    from macpo.engine.training.objectives import loss_settings
    from macpo.engine.training.reference import weighted
    from macpo.kernels.pair_loss.losses import LOSSES, PairScores, sft

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


class EvaluateExamples(Evaluate):
    """NLL and perplexity of the held-out responses, by token."""

    name = "evaluate_examples"
    doing = "scores test responses"

    def run(self, ctx: StageContext) -> None:
        import torch

        policy = self.open_policy(ctx)
        examples = read_records(ctx.input(self.inputs.data) / "test.jsonl", Example)
        groups, _, counts = encode_examples(policy, examples)
        scores = [found for (found,) in likelihoods(policy, groups)]
        num_tokens = sum(score.num_tokens for score in scores)
        loss = torch.tensor([-score.sum_logp for score in scores], dtype=torch.float64).sum() / num_tokens
        metrics = {"loss": loss.item(), "perplexity": loss.clamp(max=700.0).exp().item(), "answers": len(groups)}
        self.write(ctx, groups, counts, metrics)


class EvaluateReward(Evaluate):
    """How well the reward model agrees with the held-out human pairs; both rewards of each in `rewards.jsonl`.

    It is read as others read it, by transformers' own sequence classifier from the saved folder.
    """

    name = "evaluate_reward"
    doing = "scores test pairs"
    responses = 2

    def run(self, ctx: StageContext) -> None:
        from macpo.engine.models.compute import device_of, dtype_of
        from macpo.engine.models.reward.classifier import load_classifier

        policy = self.open_policy(ctx)
        pairs = read_records(ctx.input(self.inputs.data) / "test.jsonl", Pair)
        groups, kept, counts = encode_pairs(policy, pairs)
        rows = [group.prompt_ids + response for group in groups for response in group.responses]
        compute = self.compute
        classifier = load_classifier(
            ctx.input(str(self.inputs.policy)) / "policy", dtype=dtype_of(compute), device=device_of(compute)
        )
        values = classifier.shared_scores(
            rows, batch_tokens=compute.score_tokens, world=ctx.world, should_stop=ctx.stop_requested
        )
        lengths = [[len(group.responses[side]) for group in groups] for side in (0, 1)]
        if ctx.world.is_main:
            both = zip(kept, values[::2], values[1::2], strict=True)
            told = [{"prompt_id": pairs[i].prompt.id, "chosen": c, "rejected": r} for i, c, r in both]
            write_jsonl(ctx.dir / "rewards.jsonl", told)
        self.write(ctx, groups, counts, agreement(values[::2], values[1::2], *lengths))


class WriteResponses(GeneratingStage):
    """The policy's responses to the held-out prompts: `evaluation.jsonl`, and their metrics in `evaluation.json`."""

    name = "write_responses"
    role: Role
    iteration: int
    gold: bool
    """Whether the demo world scores them."""
    inputs: PolicyDataInputs

    def run(self, ctx: StageContext) -> None:
        prompts = {prompt.id: prompt for prompt in read_records(ctx.input(self.inputs.data) / "test.jsonl", Prompt)}
        responses, counts = self.generate(self.open_policy(ctx), list(prompts.values()))
        given = {response.prompt_id: response for response in responses}
        rows = [response_row(prompts[key], given.get(key), gold=self.gold) for key in sorted(prompts)]
        if ctx.world.is_main:
            about = {"role": self.role, "iteration": self.iteration, **counts}
            write_json(ctx.dir / "evaluation.json", {**about, **response_metrics(rows, gold=self.gold)})
            write_jsonl(ctx.dir / "evaluation.jsonl", rows)

    def cost(self, run: RunSize) -> Cost:
        return self.answering(run, run.test_prompts)

    def disk_bytes(self, run: RunSize) -> float:
        return run.test_prompts * run.row_bytes(1)
