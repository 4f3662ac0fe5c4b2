"""A policy = backbone + response-only head, and which of its weights are trained, on one rank or many.

T tokens of a packed row, N response tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from macpo.engine.data.pack import PackedBatch, unshared
from macpo.engine.distributed.world import World
from macpo.engine.errors import ConfigError, DataError
from macpo.engine.models.attention_hook import PackedAttention, attention_hook
from macpo.engine.models.equivalence import verify
from macpo.engine.models.head import Head, aliased, head_of, response_logps, whole
from macpo.engine.models.rotary import switch_length
from macpo.engine.models.tuning.adapter_rules import check_forward
from macpo.engine.models.tuning.lora_linear import use_fused_lora
from macpo.kernels import plan_attention

T_ = TypeVar("T_")
KEPT_GRADIENT_BYTES = 2 << 30


class PolicyModule(nn.Module):
    """A causal LM, with or without an adapter, as training and scoring use it.

    It always runs in eval mode: without dropout, the reference is the policy itself and the first DPO loss is ln 2.

    Args:
        model: a Hugging Face causal LM, or peft's wrapper around one.
        compute_dtype: dtype that `parallelize` makes it compute in; default the dtype of its weights.
        home: device on which `parallelize` puts its shards; default the device of its weights.

    Attributes:
        mesh: the ranks that `parallelize` spread it over; None is a whole model on this rank.
        data: the ranks that hold different groups of a step, if tensor parallelism makes them fewer than all.
        team: the ranks that `generation.split_policy` split it over, for generation alone.

    Raises:
        ConfigError: the architecture's attention or head (see `engine/models/equivalence.py`), or the adapter's kind,
            is not supported.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        compute_dtype: torch.dtype | None = None,
        home: torch.device | None = None,
    ) -> None:
        super().__init__()
        check_forward(model)
        use_fused_lora(model)
        self.model = model
        self.compute_dtype = compute_dtype or self.base.dtype
        self.home = home or self.base.device
        self.mesh: DeviceMesh | None = None
        self.data: World | None = None
        self.team: World | None = None
        self.eval()
        config = self.base.config.get_text_config()
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)
        self.attention_kinds = verify(self.base)

    @property
    def base(self) -> PreTrainedModel:
        """The Hugging Face model itself; adapters sit inside its layers."""
        inner = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        assert isinstance(inner, PreTrainedModel)
        return inner

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def collective(self) -> bool:
        """Whether every forward and backward is collective: all ranks must call it the same number of times."""
        return self.mesh is not None

    @property
    def unsharded(self) -> set[nn.Parameter]:
        """Parameters that `parallelize` leaves whole on every rank, in their own dtype."""
        return set()

    def train(self, mode: bool = True) -> PolicyModule:
        """Stay in eval mode: dropout would make log-probs of the same response differ between calls."""
        return super().train(False)

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Last hidden states of a packed row: [T, H].

        Raises:
            DataError: a prompt with its response exceeds the model's positions.
        """
        if self.max_length is not None and batch.max_length > self.max_length:
            raise DataError(
                f"a prompt with its response has {batch.max_length} tokens, the model has {self.max_length} positions",
                "lower max_tokens so that prompts are cut",
            )
        batch = batch.to(self.device)
        base = self.base
        plan_attention(batch.segments, self.attention_kinds, self.compute_dtype)
        with attention_hook(base):
            out = base.base_model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                attention_context=PackedAttention(batch.segments),
            )
        return out.last_hidden_state[0]

    def head(self) -> Head:
        """The output layer, or this rank's rows of it if the vocabulary is split (see `vocab_parallel`)."""
        head = head_of(self.base)
        return aliased(head) if isinstance(self, FSDPModule) and head.weight.device.type == "cpu" else head

    def forward(self, batch: PackedBatch, reduce: Callable[[Tensor, Head, PackedBatch], T_]) -> T_:
        """backbone -> rows that predict a response token [N, H] -> `reduce(rows, head, batch)`.

        Raises:
            ConfigError: the policy is split for generation.
        """
        batch = self.ready(batch)
        return reduce(self.hidden(batch)[batch.rows], self.head(), batch)

    def ready(self, batch: PackedBatch) -> PackedBatch:
        """The batch as the model can read it, on its device.

        Raises:
            ConfigError: the policy is split for generation.
        """
        if self.team is not None:
            raise ConfigError("the policy is split over ranks for generation", "load it again to train or score")
        return unshared(batch, switch_length(self.base)).to(self.device)

    def token_logps(self, batch: PackedBatch) -> Tensor:
        """Log-probs of the response tokens: [N] float32, in the order of `batch.target`."""
        return self(batch, response_logps)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name in a fixed order; sharded ones are DTensors."""
        self.release()
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def release(self) -> None:
        """Free the weights that forwards without a backward left gathered from other ranks."""
        if isinstance(self, FSDPModule):
            self.reshard()

    def synchronise(self, last: bool) -> None:
        """Call before each micro-batch: only the backward of a step's last one must exchange gradients.

        The others add to unsharded gradients if these take at most KEPT_GRADIENT_BYTES (in practice an adapter's always
        do); else each adds to this rank's shard, and only replicas wait for the last.
        """
        if isinstance(self, FSDPModule):
            kept = sum(4 * p.numel() for p in self.parameters() if p.requires_grad) <= KEPT_GRADIENT_BYTES
            self.set_requires_gradient_sync(last or not kept)
            self.set_requires_all_reduce(last)

    def full_state(self) -> dict[str, Tensor]:
        """The whole trained weights by name, in CPU memory of rank 0; empty on the others. Collective."""
        main = World.current().is_main
        out: dict[str, Tensor] = {}
        for name, parameter in self.trainable_parameters().items():
            tensor = whole(parameter.detach())
            if main:
                out[name] = tensor.cpu()
        return out
