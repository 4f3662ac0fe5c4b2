"""A reward model learns from human pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from macpo.engine.config import RewardSettings
from macpo.engine.data.records import Pair, read_records
from macpo.engine.run.context import StageContext
from macpo.method.costs import RunSize
from macpo.method.encoding import encode_pairs
from macpo.method.learning import LearningStage
from macpo.method.policies import OpenPolicy, PolicyInputs

if TYPE_CHECKING:
    from macpo.engine.models.policy import PolicyModule


class TrainRewardInputs(PolicyInputs):
    pairs: str


class TrainReward(LearningStage):
    """Bradley-Terry training of a score head and its model; `policy/` is a Hugging Face sequence classifier."""

    name = "train_reward"
    doing = "trains a reward model"
    weight = 4.0
    responses = 2
    optim: RewardSettings
    file: str = "train.jsonl"
    margins: bool = False
    """Whether the pairs have margins, which the rewards' differences aim at."""
    inputs: TrainRewardInputs

    def run(self, ctx: StageContext) -> None:
        import torch

        from macpo.engine.training.objectives import bradley_terry

        policy = self.open_policy(ctx)
        pairs = read_records(ctx.input(self.inputs.pairs) / self.file, Pair)
        groups, kept, counts = encode_pairs(policy, pairs)
        ctx.note(pairs=len(groups), **counts)
        margins = torch.tensor([pairs[i].margin for i in kept]) if self.margins else None
        objective = bradley_terry(self.optim.center_rewards_coefficient, margins)
        self.learn(policy, groups, [pairs[i].prompt.id for i in kept], lambda module: objective)

    def module(self, policy: OpenPolicy) -> PolicyModule:
        from macpo.engine.models.reward.score_head import RewardModule

        return policy.load(self.tuning, seed=self.seed, made=RewardModule)

    def save(self, policy: OpenPolicy, module: PolicyModule, folder: Path) -> None:
        from macpo.engine.models.reward.saving import save_reward
        from macpo.engine.models.reward.score_head import RewardModule

        assert isinstance(module, RewardModule)
        save_reward(module, folder, start=policy.ref, tuning=self.tuning, chat=policy.chat)

    def num_rows(self, run: RunSize) -> int:
        return run.reward_prompts if self.file == "reward.jsonl" else run.student_prompts

    def disk_bytes(self, run: RunSize) -> float:
        shape = self._shape(run)
        merged = 4 * shape.num_parameters - shape.bytes_policy if shape else 0
        return super().disk_bytes(run) + max(0, merged)
