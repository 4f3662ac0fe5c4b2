"""prefix_attention on Triton: launches, block sizes, and the list of everything that can be launched.

Legend: t tokens, h query heads, d head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from macpo.kernels.attention_weights import is_rare, sink_gradient
from macpo.kernels.prefix_attention import triton_kernels as kernels
from macpo.kernels.prefix_attention import triton_plan
from macpo.kernels.triton_support import TRITON_NAMES, AotKernel, interpreted


@dataclass(frozen=True, slots=True)
class Tile:
    """Block sizes and launch options of one kernel."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Tiles:
    """The three kernels' tiles for one padded head size and element size."""

    forward: Tile
    dq: Tile
    dkv: Tile
    """Has block sizes of its own; `forward` and `dq` share theirs, and so their lists of blocks."""


# Tiles by padded head size and bytes per element. 16-bit heads in _LARGE have the fastest of `bench.tune` on an H200
# (small tiles, of which several fit a multiprocessor). All others are chosen from what the compiler reports (no
# spills but where `_SPILLS` says so; shared memory below the device's limit).
_FLOAT32 = {
    (64, 4): Tiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    (128, 4): Tiles(Tile(16, 32, 8, 2), Tile(16, 32, 8, 2), Tile(32, 32, 16, 1)),
    (256, 4): Tiles(Tile(16, 16, 8, 1), Tile(16, 16, 8, 2), Tile(16, 16, 8, 1)),
}
# Compute capability 9.x and 10.x: 227 KiB of shared memory a block.
_LARGE = _FLOAT32 | {
    (64, 2): Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    (128, 2): Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    (256, 2): Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 128, 8, 2)),
}
# All others: 99 KiB.
_SMALL = _FLOAT32 | {
    (64, 2): Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    (128, 2): Tiles(Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(32, 128, 8, 2)),
    (256, 2): Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 1), Tile(32, 64, 8, 1)),
}
_LOG2_E = math.log2(math.e)


def _blocks(tile: Tile) -> tuple[int, int]:
    return tile.block_q, tile.block_k


def tiles_of(head_dim: int, dtype: torch.dtype, device: torch.device) -> Tiles:
    """The tiles for q, k, v [T, H, head_dim] of this dtype on `device`."""
    large = device.type == "cuda" and torch.cuda.get_device_properties(device).major in (9, 10)
    return (_LARGE if large else _SMALL)[_padded(head_dim), dtype.itemsize]


def forward(
    q: Tensor, k: Tensor, v: Tensor, visible_3t: Tensor, key_lists: Tensor, scale: float, tiles: Tiles,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o [T, Hq, D] and lse [Hq, T] float32, the log2 of the sum of 2^(log2(e) * score).

    Args:
        q, k, v: [T, Hq, D], [T, Hkv, D] twice; any strides, though others than contiguous are copied.
        visible_3t, key_lists: `plan.visible_keys` and `plan.block_lists` with the forward tile's block sizes.
        scale: factor on the scores; a negative one is moved into q.
        tiles: from `tiles_of`, or smaller ones that make a test short.
        softcap: the bound of the scores, None without one.
        sinks: [Hq] float32, which then are in o and lse; None without.
    """
    q, scale = (-q, -scale) if scale < 0 else (q, scale)
    q, k, v = (x.contiguous() for x in (q, k, v))
    num_tokens, num_heads, head_dim = q.shape
    o = _empty(q.shape, q.dtype, q.device)
    lse = _empty((num_heads, num_tokens), torch.float32, q.device)
    tile = tiles.forward
    kernels.forward_kernel[num_heads, key_lists.shape[0]](
        q, k, v, o, lse, visible_3t, key_lists, None if sinks is None else sinks.contiguous(), q.stride(0), k.stride(0),
        num_tokens, head_dim, num_heads // k.shape[1], key_lists.stride(0), scale * _LOG2_E, _cap_log2(softcap),
        **_constants(tile, head_dim, q.dtype), num_warps=_warps(tile, softcap is not None), num_stages=tile.num_stages,
    )  # fmt: skip
    return o, lse


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, visible_3t: Tensor, key_lists: Tensor,
    query_lists: Tensor, scale: float, tiles: Tiles, softcap: float | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq [T, Hq, D], dk and dv [T, Hkv, D] from do [T, Hq, D] and what `forward` took and gave; and the gradient of the
    sinks [Hq], empty where there are none.

    `query_lists` are `plan.block_lists(..., by_key=True)` with the dkv tile's block sizes.
    """
    flip = scale < 0
    q, scale = (-q, -scale) if flip else (q, scale)
    q, k, v, o, do = (x.contiguous() for x in (q, k, v, o, do))
    dq, delta = dq_and_delta(do, q, k, v, o, lse, visible_3t, key_lists, scale, tiles.dq, softcap)
    dk, dv = dk_and_dv(do, q, k, v, lse, delta, visible_3t, query_lists, scale, tiles.dkv, softcap)
    dsinks = q.new_empty(0) if sinks is None else sink_gradient(delta, lse / _LOG2_E, sinks)
    return -dq if flip else dq, dk, dv, dsinks


def dq_and_delta(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, visible_3t: Tensor, key_lists: Tensor,
    scale: float, tile: Tile, softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dq [T, Hq, D], and delta [Hq, T] = rowsum(do * o), which `dk_and_dv` takes. Contiguous inputs, scale >= 0."""
    (num_tokens, num_heads, head_dim), dq, delta = q.shape, _like(q), _like(lse)
    kernels.dq_kernel[num_heads, key_lists.shape[0]](
        q, k, v, o, do, lse, delta, dq, visible_3t, key_lists, q.stride(0), k.stride(0),
        num_tokens, head_dim, num_heads // k.shape[1], key_lists.stride(0), scale, scale * _LOG2_E, _cap_log2(softcap),
        **_constants(tile, head_dim, q.dtype), num_warps=_warps(tile, softcap is not None), num_stages=tile.num_stages,
    )  # fmt: skip
    return dq, delta


def dk_and_dv(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, visible_3t: Tensor, query_lists: Tensor,
    scale: float, tile: Tile, softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk and dv [T, Hkv, D]. Contiguous inputs, scale >= 0."""
    (num_tokens, num_heads, head_dim), num_kv_heads = q.shape, k.shape[1]
    dk, dv = _like(k), _like(v)
    for parts in _parts(tile, head_dim, q.dtype):
        kernels.dkv_kernel[num_kv_heads, query_lists.shape[0]](
            q, k, v, do, lse, delta, dk, dv, visible_3t, query_lists, q.stride(0), k.stride(0),
            num_tokens, head_dim, num_heads // num_kv_heads, query_lists.stride(0), scale, scale * _LOG2_E,
            _cap_log2(softcap), **parts, num_warps=_warps(tile, softcap is not None), num_stages=tile.num_stages,
        )  # fmt: skip
    return dk, dv


def _warps(tile: Tile, capped: bool) -> int:
    """The warps of a launch: tanh and its slope need registers, which four warps do not have left."""
    return max(tile.num_warps, 8) if capped else tile.num_warps


def _cap_log2(softcap: float | None) -> float | None:
    return None if softcap is None else softcap * _LOG2_E


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def _like(x: Tensor) -> Tensor:
    return _empty(x.shape, x.dtype, x.device)


def _padded(head_dim: int) -> int:
    return next(size for size in (64, 128, 256) if size >= head_dim)


def _constants(tile: Tile, head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    padded = _padded(head_dim)
    emulate = dtype == torch.bfloat16 and interpreted()
    return {
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "BLOCK_D": padded,
        "PADDED": padded != head_dim,
        "PRECISION": "ieee" if dtype == torch.float32 else "emulate" if emulate else None,
    }


def _parts(tile: Tile, head_dim: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Constants of each launch of `dkv_kernel`: one, or two where dk and dv together do not fit the registers."""
    split = _padded(head_dim) == 256 and dtype != torch.float32
    parts = [(True, False), (False, True)] if split else [(True, True)]
    return [_constants(tile, head_dim, dtype) | {"DK": dk, "DV": dv} for dk, dv in parts]


# Bytes of registers that a thread may spill, the most that Triton 3.6, 3.7 and 3.9 report; 0 for all that are not here.
# The large numbers are those of tiles that were the fastest on an H200 all the same.
_SPILLS = {
    "forward/d64/32-bit/large": 8,
    "forward/d64-padded/32-bit/large": 8,
    "forward/d128/32-bit/large": 8,
    "forward/d256/16-bit/large": 40,
    "forward/d256-padded/16-bit/large": 40,
    "dq/d128/16-bit/large": 8,
    "dq/d256/16-bit/large": 136,
    "dq/d256-padded/16-bit/large": 136,
    "dq/d128-padded/32-bit/small": 8,
    "dq/d256/32-bit/small": 8,
    "dkv/d128/16-bit/large": 196,
    "dkv/d128-padded/16-bit/large": 332,
    "dkv/d64-padded/16-bit/small": 8,
    "dkv/d128/16-bit/small": 8,
    "dkv/d128-padded/16-bit/small": 56,
    "dk/d256/16-bit/large/softcap": 64,
    "forward/d256-padded/32-bit/large/softcap": 8,  # by Triton 3.7 for sm_100
    "forward/d256-padded/32-bit/large/softcap/sinks": 8,
}


# What each variant of a kernel is given; only the forward reads the sinks.
_GIVEN: tuple[tuple[str, ...], ...] = ((), ("cap_log2",), ("p_sinks",), ("cap_log2", "p_sinks"))


def aot_kernels() -> list[AotKernel]:
    """Every kernel x padded head size (exactly filled or not) x dtype x device class, with softcap and sinks or not.

    A window changes no kernel.
    """
    found = []
    for table, capabilities in ((_LARGE, (90, 100)), (_SMALL, (80,))):
        for (padded, itemsize), tiles in table.items():
            for dtype, head_dim in product(TRITON_NAMES, (padded, padded - 16)):
                if dtype.itemsize != itemsize:
                    continue
                dq, forward_ = (_constants(tile, head_dim, dtype) for tile in (tiles.dq, tiles.forward))
                for kernel, tile, constants in (
                    (kernels.forward_kernel, tiles.forward, forward_),
                    (kernels.dq_kernel, tiles.dq, dq),
                    *((kernels.dkv_kernel, tiles.dkv, parts) for parts in _parts(tiles.dkv, head_dim, dtype)),
                ):
                    for given in _GIVEN if kernel is kernels.forward_kernel else _GIVEN[:2]:
                        options = dict.fromkeys(set(kernel.arg_names) & {"cap_log2", "p_sinks"} - set(given))
                        found.append(_entry(kernel, tile, constants | options, dtype, capabilities))
    every = [tiles for table in (_LARGE, _SMALL) for tiles in table.values()]
    sizes = {(_blocks(tiles.forward), _blocks(tiles.dkv)) for tiles in every}
    return found + triton_plan.aot_kernels(sizes)


def _entry(
    kernel: Any, tile: Tile, constants: dict[str, Any], dtype: torch.dtype, capabilities: tuple[int, ...]
) -> AotKernel:
    padded, name = constants["BLOCK_D"], kernel.__name__.removesuffix("_kernel")
    size = f"d{padded}-padded" if constants["PADDED"] else f"d{padded}"
    kind = "large" if 90 in capabilities else "small"
    part = name if constants.get("DK", True) and constants.get("DV", True) else "dk" if constants["DK"] else "dv"
    arguments = [argument for argument in kernel.arg_names if argument not in constants]
    configuration = f"{part}/{size}/{8 * dtype.itemsize}-bit/{kind}"
    variant = "/softcap" * ("cap_log2" in arguments) + "/sinks" * ("p_sinks" in arguments)
    types = {"p_lse": "*fp32", "p_delta": "*fp32", "p_visible": "*i32", "p_lists": "*i32"}
    types |= {"scale": "fp32", "scale_log2": "fp32", "cap_log2": "fp32", "p_sinks": "*fp32"}
    pointers = [argument for argument in arguments if argument.startswith("p_")]
    return AotKernel(
        name=f"prefix_attention_{part}/{size}/{TRITON_NAMES[dtype]}/{kind}{variant}",
        kernel=kernel,
        signature={
            argument: types.get(argument, f"*{TRITON_NAMES[dtype]}" if argument in pointers else "i32")
            for argument in arguments
        },
        constexprs=constants,
        num_warps=_warps(tile, "cap_log2" in arguments),
        num_stages=tile.num_stages,
        aligned=(*pointers, "stride_q", "stride_k", "head_dim"),
        wgmma=dtype != torch.float32 and 90 in capabilities,
        max_spill_bytes=max(_SPILLS.get(configuration + suffix, 0) for suffix in ("", variant)),
        capabilities=capabilities,
        # of the softcap's backward the part that needs the most registers is enough for a quick check
        rare=is_rare(variant, 0 if constants["PADDED"] or part in ("dq", "dv") else padded, dtype)
        or (constants["PADDED"] and dtype == torch.float32),
    )
