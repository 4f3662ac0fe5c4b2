"""Base models that stay loaded between the stages of a process, and the policies built from them."""

from __future__ import annotations

import copy
import gc
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from transformers import PreTrainedModel

from macpo.engine.config import FullSettings, LoraSettings, ParallelSettings, Quantization
from macpo.engine.distributed.failures import is_out_of_memory, make_room, when_memory_runs_out
from macpo.engine.errors import ResourceError
from macpo.engine.model_folders import PolicyRef, local_folder, num_parameters, weight_files
from macpo.engine.models.equivalence import passed_structures
from macpo.engine.models.liger import use_liger
from macpo.engine.models.loading import as_dtype, load_causal_lm
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.tuning import lora
from macpo.engine.models.tuning.text_path import freeze_outside_text


class ModelCache:
    """Loaded base models; when the budget is full, the least recently used is dropped first.

    A policy never changes its cached base: it gets its own module tree. With an adapter, or without tuning, the tree
    shares the cached, frozen tensors; full tuning copies them. So several policies of one base can be alive and used in
    turn. A dropped base stays in memory as long as one of its policies is alive. Where memory runs out, in training,
    generation or scoring, bases that no living policy uses are dropped first. If a policy will be spread over ranks,
    its base is read separately into host memory, so that no device ever holds all of it.

    Args:
        budget_bytes: limit for loaded base weights; None is no limit.
        dtype, device: dtype and device of the loaded weights.
        parallel: what training will do with them; scoring and generation use the same modules.

    Attributes:
        loads: how many times a base was read from disk.
    """

    def __init__(
        self,
        budget_bytes: int | None = None,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "cpu",
        *,
        parallel: ParallelSettings | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.parallel = parallel or ParallelSettings()
        self.budget_bytes = budget_bytes
        self.dtype = as_dtype(dtype)
        self.device = torch.device(device)
        self.trust_remote_code = trust_remote_code
        self.loads = 0
        self._bases: OrderedDict[str, tuple[str, PreTrainedModel, int]] = OrderedDict()
        self._policies: WeakSet[PolicyModule] = WeakSet()
        when_memory_runs_out(self.drop_idle)

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the loaded bases, least recently used first."""
        return tuple(self._bases)

    def policy(
        self, ref: PolicyRef, tuning: LoraSettings | FullSettings | None = None, *, seed: int = 0, spread: bool = False
    ) -> PolicyModule:
        """A policy to use (tuning None) or to train.

        Args:
            ref: which weights.
            tuning: LoraSettings trains an adapter (a new one drawn from `seed`, or a copy of `ref.adapter`), on a
                4-bit base if it says so; FullSettings trains every weight on the text path of a float32 copy, with
                `ref.adapter` merged in, which `parallelize` makes compute in the cache's dtype.
            spread: whether `parallelize` will spread it over ranks.

        Raises:
            ConfigError: the weights cannot be used. ResourceError: the base alone exceeds the budget, or the device.
        """
        made = self._tried(ref, tuning, seed, spread)
        if made is None and make_room():
            made = self._tried(ref, tuning, seed, spread)
        if made is None:
            problem = f"base model {ref.base!r} does not fit in memory" + (" as it is trained" if tuning else "")
            raise ResourceError(problem, "use a smaller model or dtype, LoRA instead of full tuning, or more ranks")
        self._policies.add(made)
        return made

    def _tried(
        self, ref: PolicyRef, tuning: LoraSettings | FullSettings | None, seed: int, spread: bool
    ) -> PolicyModule | None:
        """The policy; None if memory ran out."""
        try:
            return self._made(ref, tuning, seed, spread)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _made(
        self, ref: PolicyRef, tuning: LoraSettings | FullSettings | None, seed: int, spread: bool
    ) -> PolicyModule:
        base = self._base(ref.base, tuning.quantization if isinstance(tuning, LoraSettings) else "none", spread)
        kind: dict[str, Any] = {"compute_dtype": self.dtype, "home": self.device}
        if isinstance(tuning, FullSettings):
            model = base if spread else copy.deepcopy(base)
            if not spread or ref.adapter is not None:  # else `parallelize` makes float32 shards
                model = model.float()
            if ref.adapter is not None:
                model = lora.merged(lora.load_adapter(model, ref.adapter), ref.adapter)
            freeze_outside_text(model.requires_grad_(True))
            return PolicyModule(model, **kind)
        twin = shared_copy(base)
        if ref.adapter is not None:
            wrapped = lora.load_adapter(twin, ref.adapter)
            if tuning is None:
                return PolicyModule(wrapped.requires_grad_(False), **kind)
            lora.check_same_shape(wrapped, tuning, ref.adapter)
            freeze_outside_text(twin)
            return PolicyModule(wrapped, **kind)
        return PolicyModule(twin if tuning is None else lora.new_adapter(twin, tuning, seed=seed), **kind)

    def fits(self, name: str, ranks: int = 1) -> bool:
        """Whether each rank's part of a base, shared by `ranks`, stays within the budget."""
        return self.budget_bytes is None or self._part_bytes(name, ranks) <= self.budget_bytes

    def make_room(self, name: str, ranks: int) -> None:
        """Drop bases until this rank's part of one that `ranks` share fits beside them; that one is not cached."""
        self._make_room(name, self._part_bytes(name, ranks))

    def _part_bytes(self, name: str, ranks: int) -> int:
        files = weight_files(local_folder(name, trust_remote_code=self.trust_remote_code))
        return num_parameters(files) * self.dtype.itemsize // ranks

    def keep(self, folder: Path, needed: Collection[Path]) -> None:
        """Drop the bases below a folder that are in none of the folders `needed`; others stay."""
        paths = {name: Path(name) for name in self._bases}
        for name, path in paths.items():
            if path.is_relative_to(folder) and not any(path.is_relative_to(each) for each in needed):
                del self._bases[name]
        if len(self._bases) < len(paths):
            self._collect()

    def drop_idle(self) -> bool:
        """Drop the bases of which no policy is alive; returns whether there were any."""
        used = {id(tensor) for policy in self._policies for tensor in policy.parameters()}
        idle = [
            name
            for name, (_, model, _) in self._bases.items()
            if not any(id(tensor) in used for tensor in model.parameters())
        ]
        for name in idle:
            del self._bases[name]
        if idle:
            self._collect()
        return bool(idle)

    def release(self) -> None:
        """Empty the cache; bases that a living policy uses stay in memory."""
        self._bases.clear()
        self._collect()

    def _base(self, name: str, quantization: Quantization, spread: bool) -> PreTrainedModel:
        folder = local_folder(name, trust_remote_code=self.trust_remote_code)
        files = weight_files(folder)
        stats = [(file.name, file.stat()) for file in files]
        version = repr([quantization, *((path, info.st_size, info.st_mtime_ns, info.st_ino) for path, info in stats)])
        if not spread:
            if name in self._bases and self._bases[name][0] == version:
                self._bases.move_to_end(name)
                return self._bases[name][1]
            self._bases.pop(name, None)
            weight_bytes = 0.5 if quantization == "nf4" else self.dtype.itemsize
            self._make_room(name, int(num_parameters(files) * weight_bytes))
        model = load_causal_lm(
            folder,
            dtype=self.dtype,
            device="cpu" if spread and quantization == "none" else self.device,
            quantization=quantization,
            trust_remote_code=self.trust_remote_code,
        ).requires_grad_(False)
        use_liger(model, self.parallel, self.device)
        self.loads += 1
        passed_structures(model)  # its policies are copies: the first of each structure is compared with the model
        if not spread:
            size = sum(p.numel() * p.element_size() for p in model.parameters())
            self._bases[name] = (version, model, size)
        return model

    def _make_room(self, name: str, needed: int) -> None:
        if self.budget_bytes is None:
            return
        if needed > self.budget_bytes:
            problem = f"base model {name!r} needs {needed / 1e9:.2f} GB, the budget is {self.budget_bytes / 1e9:.2f} GB"
            raise ResourceError(problem, "raise compute.memory_gb or use a smaller model or dtype")
        dropped = False
        while self._bases and needed + sum(size for _, _, size in self._bases.values()) > self.budget_bytes:
            self._bases.popitem(last=False)
            dropped = True
        if dropped:
            self._collect()

    def _collect(self) -> None:
        gc.collect()  # module trees hold reference cycles
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A separate module tree and config over the same parameters and buffers, to which adapters can be added."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)
