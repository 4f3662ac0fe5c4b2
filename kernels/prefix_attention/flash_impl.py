"""prefix_attention with flash-attn's variable-length call: every response gets a copy of its prompt's keys and values.

Each prompt and each response is a sequence of its own: its queries are its tokens, its keys the prompt's followed by
its own. Causality is counted from the last query and key, so query i of a response sees the whole prompt and the
response up to itself, which is the shared-prefix rule; flash-attn's window counts those same positions.
`runs` and its lists are tested against the reference everywhere; the call itself only where flash-attn is installed.

Legend: t tokens, r runs (prompts and responses), c gathered keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from macpo.kernels.prefix_attention.segments import Segments


@dataclass(frozen=True, slots=True)
class Runs:
    """The sequences of a variable-length attention call, whose queries are the packed tokens in their order."""

    keys: Tensor
    """int64 [c]: token of every gathered key."""
    cu_queries: Tensor
    """int32 [r + 1]: offsets of the sequences in the tokens."""
    cu_keys: Tensor
    """int32 [r + 1]: offsets of the sequences in `keys`."""
    max_queries: int
    max_keys: int


def why_not(device: str, dtype: torch.dtype, head_dim: int) -> str:
    """Why flash-attn cannot take q, k, v like these; empty where it can."""
    if find_spec("flash_attn") is None:
        return "flash-attn is not installed; `pip install flash-attn`"
    if device != "cuda":
        return f"flash-attn is for CUDA tensors, these are on {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn is for bf16 and fp16, not {dtype}"
    if head_dim > 256 or head_dim % 8:
        return f"flash-attn takes head sizes that are multiples of 8 up to 256, not {head_dim}"
    return ""


def runs(segments: Segments) -> Runs:
    """The sequences of `segments`, on its device. Reads the three integers on the host: once a Segments object.

    Raises:
        ValueError: tokens of one run differ in what they may see.
    """
    prefix_start, prefix_end, segment_start = (
        x.long().cpu() for x in (segments.prefix_start, segments.prefix_end, segments.segment_start)
    )
    num_tokens = segments.num_tokens
    first_r, run_t = segment_start.unique_consecutive(return_inverse=True)
    starts_r = (segment_start == torch.arange(num_tokens)).nonzero()[:, 0]
    one_rule = all(torch.equal(x[first_r][run_t], x) for x in (prefix_start, prefix_end))
    if not torch.equal(first_r, starts_r) or not one_rule or bool((prefix_end > segment_start)[first_r].any()):
        raise ValueError("flash-attn needs runs of tokens that share a prefix in front of them")
    lengths_r = torch.cat((first_r, torch.tensor([num_tokens]))).diff()
    prefixes_r = (prefix_end - prefix_start)[first_r]
    keys_r = prefixes_r + lengths_r
    cu_queries, cu_keys = (torch.cat((x.new_zeros(1), x.cumsum(0))) for x in (lengths_r, keys_r))
    run_c = torch.arange(len(first_r)).repeat_interleave(keys_r)
    place_c = torch.arange(int(cu_keys[-1])) - cu_keys[run_c]
    own_c = place_c - prefixes_r[run_c]
    keys = torch.where(own_c < 0, prefix_start[first_r][run_c] + place_c, first_r[run_c] + own_c)
    device = segments.prefix_start.device
    return Runs(
        keys.to(device), cu_queries.to(device, torch.int32), cu_keys.to(device, torch.int32), int(lengths_r.max()),
        int(keys_r.max()),
    )  # fmt: skip


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, scale: float | None = None, window: int | None = None,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """q [T, Hq, D], k, v [T, Hkv, D] on CUDA, 16-bit -> [T, Hq, D]; see `op.prefix_attention`.

    Source: the layout is that of flash-preference, a DPO trainer on flash-attn.
    """
    from flash_attn import flash_attn_varlen_func

    plan: Runs = segments.cached((q.device, "flash"), lambda: runs(segments.to(q.device)))
    # Indexed with brackets: the gradient of that sums a prompt's copies in a fixed order, index_select's does not.
    out: Any = flash_attn_varlen_func(
        q, k[plan.keys], v[plan.keys], plan.cu_queries, plan.cu_keys, plan.max_queries, plan.max_keys,
        softmax_scale=scale, causal=True, window_size=(-1, -1) if window is None else (window - 1, 0),
        deterministic=True, **({} if softcap is None else {"softcap": softcap}),
    )  # fmt: skip
    return out
