"""Reference log-probs of preference training: from the cache, or computed with the frozen reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from macpo.engine.config import FullSettings, LoraSettings, PreferenceSettings, Tuning
from macpo.engine.data.chat import load_tokenizer
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.distributed.agree import on_main
from macpo.engine.errors import ConfigError, DataError
from macpo.engine.model_folders import PolicyRef, local_folder
from macpo.engine.models.compute import device_of, dtype_of
from macpo.engine.models.policy import PolicyModule
from macpo.engine.paths import expanded
from macpo.engine.run.folder import CACHE
from macpo.engine.training.reference import cached, reference_key, weighted
from macpo.method.likelihoods import shared_parts
from macpo.method.policies import OpenPolicy, policy_ref


@dataclass(frozen=True)
class Reference:
    """The frozen reference of preference training, as the settings name it, in the numerics of training."""

    policy: OpenPolicy
    settings: PreferenceSettings
    tuning: Tuning
    seed: int = 0

    @property
    def is_own(self) -> bool:
        """Whether it is the policy about to be trained."""
        return self.settings.reference == "policy" and self.settings.reference_model is None

    def logps(
        self,
        groups: Sequence[PrefixGroup],
        module: Callable[[], PolicyModule],
        known: Sequence[float | None] | None = None,
    ) -> Tensor:
        """Summed log-probs [num_groups, 2] float32 of (chosen, rejected).

        Args:
            module: gives the policy about to be trained.
            known: chosen log-probs that the scoring of the positives has left; the scorer was that very policy, so only
                the rejected response is computed. They do not serve where the reference is another one or tokens have
                weights (ld_alpha).
        """
        if known is None or not self.is_own or self.settings.ld_alpha is not None:
            known = [None] * len(groups)
        jobs = [
            PrefixGroup(group.prompt_ids, group.responses if value is None else group.responses[1:])
            for group, value in zip(groups, known, strict=True)
        ]
        sums = iter(weighted(self.parts(jobs, module), self.settings.ld_alpha).tolist())
        rows = [[next(sums) if value is None else value, next(sums)] for value in known]
        return torch.tensor(rows, dtype=torch.float32).reshape(-1, 2)

    def parts(self, groups: Sequence[PrefixGroup], module: Callable[[], PolicyModule] | None = None) -> Tensor:
        """`shared_parts` of the groups, from the cache or computed; `module` gives the policy about to be trained."""
        policy, ctx, compute = self.policy, self.policy.ctx, self.policy.compute
        ref, tuning = self._weights()
        quantization = tuning.quantization if isinstance(tuning, LoraSettings) else "none"
        if quantization == "none" and not isinstance(tuning, FullSettings):
            tuning = None  # a fresh adapter adds nothing, another one is loaded frozen: the numbers of training anyway
        numerics = f"{device_of(compute).type} {dtype_of(compute)} {quantization}"
        if isinstance(tuning, FullSettings) and ref.adapter is not None:
            numerics += " merged"
        digest = policy.chat.digest
        key = on_main(ctx.world, lambda: reference_key(ref, groups, tokenizer=digest, numerics=numerics))
        folder = expanded(compute.cache) if compute.cache is not None else ctx.dir.parent / CACHE

        def scored() -> Tensor:
            if module is not None and self.is_own:
                return shared_parts(policy, module(), groups)
            return shared_parts(policy, policy.load(tuning, ref, seed=self.seed), groups)

        return cached(folder, key, groups, scored, world=ctx.world, log=ctx.log)

    def _weights(self) -> tuple[PolicyRef, Tuning | None]:
        """Where the weights lie, and how they are loaded."""
        named = self.settings.reference_model
        if named is not None:
            folder = local_folder(named, trust_remote_code=self.policy.agent.trust_remote_code)
            ref = policy_ref(self.policy.base, folder)
            if ref.adapter is None:
                self._check_same_tokens(named)
            return ref, None
        if self.settings.reference == "adapter-off":
            return PolicyRef(self.policy.base), self.tuning
        return self.policy.ref, self.tuning

    def _check_same_tokens(self, path: str) -> None:
        """Log-probs of token ids mean nothing under a model that reads other tokens."""
        vocabulary = load_tokenizer(path, trust_remote_code=self.policy.agent.trust_remote_code).get_vocab()
        if vocabulary != self.policy.chat.tokenizer.get_vocab():
            raise ConfigError(
                f"{path!r} has another vocabulary than the policy",
                "name a model with the same tokenizer",
                field="reference_model",
            )


def read_reference(path: Path, num_groups: int) -> Tensor:
    """What the reference stage wrote about a set of pairs: [num_groups, 2, 2] float64, `shared_sums` by pair."""
    parts = load_file(path)["parts"]
    if list(parts.shape) != [num_groups, 2, 2]:
        raise DataError(
            f"reference log-probs of {parts.shape[0]} pairs, {num_groups} are there",
            "run with --from reference",
            file=str(path),
        )
    return parts
