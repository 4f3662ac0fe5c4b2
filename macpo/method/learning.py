"""How a policy learns: SFT or preference training from where it stands, against a frozen reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from macpo.engine.config import LoraSettings, OptimSettings, PreferenceSettings, Tuning
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.records import Example, Pair, read_records
from macpo.engine.run.context import StageContext
from macpo.engine.training.leftovers import CONTINUED, SCRATCH, goes_on_from
from macpo.engine.training.trackers import Trackers
from macpo.method.costs import STEP_BYTES, Cost, RunSize, Shape, TrainingCost
from macpo.method.encoding import encode_examples, encode_pairs
from macpo.method.policies import OpenPolicy, PolicyInputs, PolicyStage
from macpo.method.positives import Half, half_of

if TYPE_CHECKING:
    from macpo.engine.models.policy import PolicyModule
    from macpo.engine.training.objectives import Objective


class LearningStage(PolicyStage):
    """A kind of stage that trains a copy of its policy and saves it as `policy/`."""

    optim: OptimSettings
    tuning: Tuning
    seed: int
    responses: ClassVar[int] = 1
    """Per prompt."""
    scratch, continued = SCRATCH, CONTINUED

    def learn(
        self,
        policy: OpenPolicy,
        groups: list[PrefixGroup],
        ids: list[str],
        objective: Callable[[Callable[[], PolicyModule]], Objective],
    ) -> None:
        """Train on the groups and save the result.

        Args:
            ids: the ids of the groups' prompts.
            objective: makes what is minimised; its argument gives the policy about to be trained.
        """
        from macpo.engine.training.trainer import train

        ctx = policy.ctx
        module = functools.cache(lambda: self.module(policy))  # another reference goes before it
        minimised = objective(module)
        result = train(
            module(),
            groups,
            minimised,
            self.optim,
            seed=self.seed,
            workdir=ctx.dir,
            ids=ids,
            world=ctx.world,
            should_stop=ctx.stop_requested,
            progress=ctx.name,
            trackers=Trackers(self.compute.trackers, ctx.name, ctx.dir.parent / "trackers"),
        )
        self.save(policy, module(), ctx.dir / "policy")
        ctx.note(tokens=result.tokens, steps=result.steps)

    def goes_on_from(self, folder: Path) -> str:
        return goes_on_from(folder)

    def module(self, policy: OpenPolicy) -> PolicyModule:
        """What is trained."""
        return policy.load(self.tuning, seed=self.seed)

    def save(self, policy: OpenPolicy, module: PolicyModule, folder: Path) -> None:
        """Write what was trained."""
        from macpo.engine.models.saving import save_policy

        save_policy(module, folder, base_name=str(self.agent.model), chat=policy.chat)

    def num_rows(self, run: RunSize) -> int:
        """Estimated number of prompts that are trained on."""
        return run.student_prompts

    def cost(self, run: RunSize) -> Cost:
        shape = self._shape(run)
        tokens = self._tokens(run) * self.optim.epochs
        return Cost(tokens, self._flop_factor * (shape.num_parameters if shape else 0) * tokens)

    def disk_bytes(self, run: RunSize) -> float:
        shape = self._shape(run)
        steps = self.num_rows(run) * self.optim.epochs / self.optim.batch
        return (shape.bytes_policy if shape else 0) + STEP_BYTES * steps

    def training(self, run: RunSize) -> TrainingCost:
        from macpo.engine.planning.fitting import Workload

        prompt, response = max(1, round(run.prompt_tokens)), max(1, round(run.response_tokens))
        step = Workload(self.optim.batch, prompt, response, self.optim.microbatch_tokens, self.responses)
        return TrainingCost(run.shapes[self.agent.name].config, self.tuning, step, self._training_tokens(run))

    def _shape(self, run: RunSize) -> Shape | None:
        return run.shapes.get(self.agent.name)

    def _tokens(self, run: RunSize) -> float:
        """In one epoch."""
        return self.num_rows(run) * (run.prompt_tokens + self.responses * run.response_tokens)

    def _training_tokens(self, run: RunSize) -> float:
        return self._tokens(run) * self.optim.epochs

    @property
    def _flop_factor(self) -> int:
        """FLOP per token and parameter; a frozen base needs no weight gradients."""
        return 4 if isinstance(self.tuning, LoraSettings) else 6


class ImitateInputs(PolicyInputs):
    examples: str
    """Wrote the examples or pairs."""


class Imitate(LearningStage):
    """SFT on one side of human pairs, or on weak labels: the initial policies, and the ceiling."""

    name = "imitate"
    doing = "SFT"
    weight = 3.0
    file: str
    side: Literal["chosen", "rejected", "answer"]
    """Which side of pairs; `response` where the file holds examples."""
    half: Half | None = None
    """Only the examples of these prompts."""
    inputs: ImitateInputs

    def run(self, ctx: StageContext) -> None:
        policy = self.open_policy(ctx)
        path = ctx.input(self.inputs.examples) / self.file
        if self.side == "answer":
            examples = read_records(path, Example)
        else:
            examples = [pair.example(self.side) for pair in read_records(path, Pair)]
        if self.half is not None:
            examples = [example for example in examples if half_of(example.prompt.id) == self.half]
        groups, kept, counts = encode_examples(policy, examples)
        ctx.note(examples=len(groups), **counts)
        objective = self.objective()
        self.learn(policy, groups, [examples[i].prompt.id for i in kept], lambda module: objective)

    def objective(self) -> Objective:
        """What is minimised over the examples."""
        from macpo.engine.training.objectives import sft

        return sft()

    def num_rows(self, run: RunSize) -> int:
        prompts = run.prompts_of(self.file)
        return prompts if self.half is None else prompts // 2


class PreferInputs(PolicyInputs):
    pairs: str
    reference: str | None = None
    """Computed the reference log-probs; by default the stage does so itself."""


class Prefer(LearningStage):
    """Preference training on pairs, from the stage's policy, which is the frozen reference too unless `optim` says
    otherwise."""

    name = "prefer"
    doing = "preference training"
    weight = 4.0
    responses = 2
    optim: PreferenceSettings
    reference_weights: dict[str, str]
    """Identity of a reference model that the settings name."""
    file: str = "pairs.jsonl"
    pairs_per_prompt: int = Field(default=1, exclude=True)
    """For estimates."""
    inputs: PreferInputs

    def run(self, ctx: StageContext) -> None:
        from macpo.engine.training.objectives import preference
        from macpo.engine.training.reference import weighted
        from macpo.method.reference import Reference, read_reference

        policy, settings = self.open_policy(ctx), self.optim
        pairs = read_records(ctx.input(self.inputs.pairs) / self.file, Pair)
        groups, kept, counts = encode_pairs(policy, pairs)
        ctx.note(pairs=len(groups), **counts)
        known = [pairs[i].ref_chosen_logp for i in kept]

        def objective(module: Callable[[], PolicyModule]) -> Objective:
            if not settings.has_reference:
                return preference(settings, None)
            if self.inputs.reference is not None:
                parts = read_reference(ctx.input(self.inputs.reference) / "train.safetensors", len(groups))
                return preference(settings, weighted(parts, settings.ld_alpha).float())
            reference = Reference(policy, settings, self.tuning, self.seed)
            return preference(settings, reference.logps(groups, module, known))

        self.learn(policy, groups, [pairs[i].prompt.id for i in kept], objective)

    def num_rows(self, run: RunSize) -> int:
        return self.pairs_per_prompt * run.prompts_of(self.file)

    def cost(self, run: RunSize) -> Cost:
        """Training, and one forward of the reference."""
        shape, tokens, epochs = self._shape(run), self._tokens(run), self.optim.epochs
        flop = (2 + self._flop_factor * epochs) * (shape.num_parameters if shape else 0) * tokens
        return Cost(tokens * (1 + epochs), flop)

    def _training_tokens(self, run: RunSize) -> float:
        return self._tokens(run) * (self.optim.epochs + 1 / 3)  # the reference's forward is a third of a step
