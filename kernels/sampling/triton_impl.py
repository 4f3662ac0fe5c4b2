"""sample in Triton: one pass over the logits, then one small program a row. See triton_scan.py and triton_draw.py.

Launches depend on shapes, dtypes and `params.facts` alone: no host synchronisation, so a step can be captured in a
CUDA graph (whose `params` may be rewritten in place as long as the facts hold).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from macpo.kernels.sampling.params import SampleParams
from macpo.kernels.sampling.triton_draw import draw_kernel
from macpo.kernels.sampling.triton_scan import scan_kernel
from macpo.kernels.triton_support import TRITON_NAMES, AotKernel

SCAN_BLOCK = 256  # a program is one warp, so that its maxima need no barrier
SCAN_REGISTERS = 112  # of a thread of the scan at most, so that more programs share a multiprocessor
CHUNK = 14336  # tokens of a row that a program scans
MAX_SPLITS = 64
CAP = 4096  # candidates that a list can hold; rows no longer than this are searched whole
MAX_GROUPS = 4096
GROUPS = (16, 128)  # tokens of a group, the smallest that makes no more than MAX_GROUPS
PROBE = 256  # groups that a list without top-k is made from
DRAW_BLOCK, DRAW_WARPS = 512, 4
JOIN_WARPS = 1  # of draw_kernel without filters


def group_size(vocab: int, filtered: bool) -> int:
    """Tokens of a group whose largest score the scan keeps; 0 where rows are searched whole."""
    if not filtered or vocab <= CAP:
        return 0
    return next((size for size in GROUPS if triton.cdiv(vocab, size) <= MAX_GROUPS), 0)


def chunk_size(vocab: int) -> int:
    """Tokens that a program scans: a function of the vocabulary alone."""
    return CHUNK * triton.cdiv(triton.cdiv(vocab, CHUNK), MAX_SPLITS)


def sample(
    logits: Tensor, params: SampleParams, request_keys: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [B, V] -> token ids [B] int64, raw log-probs [B], processed log-probs [B]; see `op.sample`.

    Raises:
        ValueError: float64 logits.
    """
    if logits.dtype not in TRITON_NAMES:
        raise ValueError(f"sample: backend 'triton' takes bfloat16, float16 and float32 logits, got {logits.dtype}")
    batch, vocab = logits.shape
    device, facts = logits.device, params.facts
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    seen = params.seen if params.seen is not None and facts["penalised"] else None
    seen = torch.empty(0, 0, dtype=torch.uint8, device=device) if seen is None else seen.view(torch.uint8)
    seen = seen if seen.stride(1) == 1 else seen.contiguous()

    cuts = facts["top_p"] or facts["min_p"] or any(0 < k < vocab for k in facts["top_ks"])
    filtered = cuts and not facts["greedy"]
    group, chunk = group_size(vocab, filtered), chunk_size(vocab)
    splits, num_groups = triton.cdiv(vocab, chunk), triton.cdiv(vocab, group) if group else 0

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    part, part_id = scratch(5, batch, splits), scratch(batch, splits, dtype=torch.int32)
    group_max, active = scratch(batch, num_groups), scratch(batch if group else 0, MAX_GROUPS, dtype=torch.int32)
    list_s, list_id = scratch(batch if group else 0, CAP), scratch(batch if group else 0, CAP, dtype=torch.int32)
    ids, raw, processed = scratch(batch, dtype=torch.int64), scratch(batch), scratch(batch)

    settings = (
        logits, seen, params.seed, request_keys.contiguous(), positions.contiguous(), *params.settings[1:],
    )  # fmt: skip
    strides = (logits.stride(0), seen.stride(0), batch * splits, splits, vocab)
    scan_kernel[(splits, batch)](
        *settings, part, part_id, group_max, *strides, chunk, num_groups,
        BLOCK=SCAN_BLOCK, GROUP=group, num_warps=1, num_stages=1, maxnreg=SCAN_REGISTERS,
    )  # fmt: skip
    draw_kernel[(batch,)](
        *settings, part, part_id, group_max, active, list_s, list_id, ids, raw, processed,
        *strides, num_groups, max(group, 1).bit_length() - 1,
        FILTERED=filtered, MAX_SPLITS=MAX_SPLITS, PROBE=PROBE, BLOCK=DRAW_BLOCK, CAP=CAP, MAX_GROUPS=MAX_GROUPS,
        num_warps=DRAW_WARPS if filtered else JOIN_WARPS, num_stages=1,
    )  # fmt: skip
    return ids, raw, processed


def aot_kernels() -> list[AotKernel]:
    """Every kernel and configuration that `sample` can choose."""
    settings = {
        "p_seen": "*u8", "p_seed": "*i64", "p_keys": "*i64", "p_position": "*i64", "p_temperature": "*fp32",
        "p_top_p": "*fp32", "p_top_k": "*i64", "p_min_p": "*fp32", "p_penalty": "*fp32",
        "p_part": "*fp32", "p_part_id": "*i32", "p_group": "*fp32",
    }  # fmt: skip
    results = {"p_active": "*i32", "p_list_s": "*fp32", "p_list_id": "*i32"}
    results |= {"p_id": "*i64", "p_raw": "*fp32", "p_processed": "*fp32"}
    sizes = dict.fromkeys(("stride_row", "stride_seen", "plane", "num_splits", "vocab", "num_groups"), "i32")
    kernels = []
    for name in TRITON_NAMES.values():
        logits = {"p_logits": f"*{name}"}
        for group in (0, *GROUPS):
            signature = logits | settings | sizes | {"chunk": "i32"}
            kernels.append(
                AotKernel(
                    f"sample_scan/{name}/{f'group{group}' if group else 'no groups'}",
                    scan_kernel,
                    signature,
                    {"BLOCK": SCAN_BLOCK, "GROUP": group},
                    num_warps=1,
                    num_stages=1,
                    aligned=(*(key for key in signature if key.startswith("p_")), "stride_row", "chunk"),
                    max_registers=SCAN_REGISTERS,
                    max_spill_bytes=32,  # Triton 3.9; 3.6 spills nothing
                )
            )
        for filtered in (False, True):
            signature = logits | settings | results | sizes | {"group_shift": "i32"}
            constants = {"MAX_SPLITS": MAX_SPLITS, "PROBE": PROBE, "BLOCK": DRAW_BLOCK, "CAP": CAP}
            kernels.append(
                AotKernel(
                    f"sample_draw/{name}/{'filters' if filtered else 'no filters'}",
                    draw_kernel,
                    signature,
                    constants | {"FILTERED": filtered, "MAX_GROUPS": MAX_GROUPS},
                    num_warps=DRAW_WARPS if filtered else JOIN_WARPS,
                    num_stages=1,
                    max_spill_bytes=16 if filtered else 0,
                    aligned=(*(key for key in signature if key.startswith("p_")), "stride_row"),
                )
            )
    return kernels
