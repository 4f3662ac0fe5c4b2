"""The head's product with an epilogue of its own in Triton: log-probs, and their gradient, without logits in memory.

A persistent grid walks tiles of [BLOCK_N rows, BLOCK_V tokens]. With base_n = the target's logit of row n, found by a
dot product before, each tile ends in one sum a row of e = exp(y - base) over all tokens but the target, and in the
target's logit where the tile holds it. `triton_join` adds the tiles of a row in a fixed order. Results do not depend on
the number of programs, so neither on the device's size.

For a gradient the tiles leave e itself, in the gradient's dtype: e of every likely token is at least 1, so 16 bits hold
it to half a unit. With minus the sum of the others in the target's place it is the gradient
but for one factor a row, d logp / d z = factor e, which the row's results of later products take. Where the target is
about 70 nats below the best token e becomes too large; a second kernel finds such rows and computes them anew.
bfloat16 and float16 products are exact with float32 accumulators; float32 inputs are multiplied as IEEE float32
(input_precision="ieee"), not TF32: exact, and without tensor cores.
Legend: n rows, h hidden size, v vocabulary, t vocabulary tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from macpo.kernels.linear_logp.triton_join import bases, join, repair
from macpo.kernels.linear_logp.triton_math import cap, dot, load_block, narrow
from macpo.kernels.triton_support import TRITON_NAMES, AotKernel


@dataclass(frozen=True, slots=True)
class GemmConfig:
    """Tile sizes and launch options of the product."""

    block_n: int
    block_v: int
    block_h: int
    num_warps: int
    num_stages: int
    group_n: int
    """Row blocks that are walked before the next vocabulary block, so that both stay in the cache."""


# On an H200 (`bench.tune`) LARGE is the fastest; LARGE_GRADIENT was level with it before tiles left by descriptor. The
# others are not measured: chosen so that no register spills, and by the bytes that a tile draws from the cache.
# Capability 9 and 10 have the shared memory for the first three, OLDER fits 99 KiB.
LARGE = GemmConfig(128, 256, 64, 8, 4, 16)
LARGE_GRADIENT = GemmConfig(128, 256, 64, 8, 3, 16)  # a stage less, for the tile that is on its way to memory
MEDIUM = GemmConfig(128, 128, 64, 8, 4, 16)
FEW = GemmConfig(64, 128, 64, 4, 4, 1)
OLDER = GemmConfig(128, 128, 32, 8, 3, 16)
IEEE = GemmConfig(64, 64, 16, 4, 2, 16)
FEW_ROWS = 64


@triton.jit(do_not_specialize=["num_rows", "num_programs", "has_bias", "capped"])
def gemm_logp_kernel(
    hidden, weight, p_target, p_bias, p_base, p_rest, p_y, d, stride_hidden, stride_weight, num_rows, vocab, width,
    num_programs, has_bias, capped, scale, softcap,
    TMA: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP_N: tl.constexpr,
):  # fmt: skip
    """Partial sums [T, N] of the rows' e, target logits [N], and e [N, V] where d is."""
    num_blocks_n = tl.cdiv(num_rows, BLOCK_N)
    num_blocks_v = tl.cdiv(vocab, BLOCK_V)
    for tile in tl.range(tl.program_id(0), num_blocks_n * num_blocks_v, num_programs):
        group = tile // (GROUP_N * num_blocks_v)
        within = tile % (GROUP_N * num_blocks_v)
        size = tl.minimum(num_blocks_n - group * GROUP_N, GROUP_N)
        block_n = group * GROUP_N + within % size
        block_v = within // size
        start_n, start_v = block_n * BLOCK_N, block_v * BLOCK_V

        z_nv = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for start_h in range(0, width, BLOCK_H):
            h_nh = load_block(hidden, start_n, start_h, num_rows, width, stride_hidden, BLOCK_N, BLOCK_H, TMA)
            w_vh = load_block(weight, start_v, start_h, vocab, width, stride_weight, BLOCK_V, BLOCK_H, TMA)
            z_nv = dot(h_nh, w_vh.T, z_nv)

        row_n = start_n + tl.arange(0, BLOCK_N)
        col_v = start_v + tl.arange(0, BLOCK_V)
        m_n, m_v = row_n < num_rows, col_v < vocab
        if has_bias != 0:
            z_nv += tl.load(p_bias + col_v, mask=m_v, other=0.0)[None, :]
        if capped != 0:  # noqa: SIM108
            y_nv = softcap * cap(z_nv * scale / softcap)[0]
        else:
            y_nv = z_nv * scale
        if start_v + BLOCK_V > vocab:
            y_nv = tl.where(m_v[None, :], y_nv, float("-inf"))
        target_n = tl.load(p_target + row_n, mask=m_n, other=-1)
        owned_n = (target_n >= start_v) & (target_n < tl.minimum(start_v + BLOCK_V, vocab))
        if tl.max(owned_n.to(tl.int32), axis=0) != 0:  # most tiles hold no row's target
            here_nv = (target_n - start_v).to(tl.int32)[:, None] == tl.arange(0, BLOCK_V)[None, :]
            tl.store(p_y + row_n, tl.sum(tl.where(here_nv, y_nv, 0.0), axis=1), mask=m_n & owned_n)
            y_nv = tl.where(here_nv, float("-inf"), y_nv)
        e_nv = tl.exp(y_nv - tl.load(p_base + row_n, mask=m_n, other=0.0)[:, None])
        tl.store(p_rest + block_v.to(tl.int64) * num_rows + row_n, tl.sum(e_nv, axis=1), mask=m_n)
        if d is not None:
            if TMA:
                d.store([start_n, start_v], narrow(e_nv, hidden.dtype))
            else:
                at_nv = row_n.to(tl.int64)[:, None] * vocab + col_v[None, :]
                tl.store(d + at_nv, narrow(e_nv, d.dtype.element_ty), mask=m_n[:, None] & m_v[None, :])


def gemm_logp(
    hidden_nh: Tensor, weight_vh: Tensor, target_n: Tensor, bias_v: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Log-prob of each row's target and the row's logsumexp, straight from hidden states and the head.

    Args:
        hidden_nh: [N, H] float32, bfloat16 or float16; columns contiguous.
        weight_vh: [V, H], dtype of hidden; columns contiguous.
        target_n: [N] int64; outside [0, V) the row's log-prob is NaN.
        bias_v: [V] or None.
        scale, softcap: logits are softcap * tanh(scale * (z + bias) / softcap), without softcap scale * (z + bias).

    Returns:
        (logp [N] float32, never above 0; lse [N] float32, never below the row's largest logit).

    Raises:
        ValueError: another dtype, or columns that are not contiguous.
    """
    logp_n, lse_n, _ = _gemm_logp(hidden_nh, weight_vh, target_n, bias_v, scale, softcap, None)
    return logp_n, lse_n


def gemm_logp_dlogits(
    hidden_nh: Tensor, weight_vh: Tensor, target_n: Tensor, bias_v: Tensor | None, scale: float, d_nv: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`gemm_logp` without a softcap, and d logp / d z = (onehot - softmax) * scale as factor * d, by rows.

    Args:
        d_nv: [N, V], dtype of hidden, but not float16, whose range is too small; contiguous; overwritten.

    Returns:
        (logp [N], lse [N], factor [N]), float32.

    Raises:
        ValueError: as `gemm_logp`; d is not contiguous, of that shape and of hidden's dtype.
    """
    if d_nv.shape != (hidden_nh.shape[0], weight_vh.shape[0]) or not d_nv.is_contiguous():
        raise ValueError(f"d must be contiguous [N, V], got {list(d_nv.shape)}, strides {d_nv.stride()}")
    if d_nv.dtype != hidden_nh.dtype:
        raise ValueError(f"d must be {hidden_nh.dtype} as the head is, got {d_nv.dtype}")
    if d_nv.dtype == torch.float16:
        raise ValueError("float16 cannot hold exponentials of any size")
    return _gemm_logp(hidden_nh, weight_vh, target_n, bias_v, scale, None, d_nv)


def _gemm_logp(
    hidden_nh: Tensor, weight_vh: Tensor, target_n: Tensor, bias_v: Tensor | None, scale: float, softcap: float | None,
    d_nv: Tensor | None, tma: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (num_rows, width), vocab, device = hidden_nh.shape, weight_vh.shape[0], hidden_nh.device
    if hidden_nh.dtype not in TRITON_NAMES or hidden_nh.stride(1) != 1 or weight_vh.stride(1) != 1:
        raise ValueError(
            f"need float32, bfloat16 or float16 with contiguous columns, got {hidden_nh.dtype}, "
            f"strides {hidden_nh.stride()} and {weight_vh.stride()}"
        )
    if num_rows == 0:
        logp_n, lse_n, factor_n = (torch.empty(0, dtype=torch.float32, device=device) for _ in range(3))
        return logp_n, lse_n, factor_n
    target_n, bias_v = target_n.contiguous(), None if bias_v is None else bias_v.to(torch.float32).contiguous()
    head = (hidden_nh, weight_vh, target_n, bias_v, scale, softcap)
    base_n = bases(*head)
    major, num_processors = _device(device)
    config = choose(hidden_nh.dtype, num_rows, major, gradient=d_nv is not None)
    described = [x for x in (hidden_nh, weight_vh, d_nv) if x is not None]
    tma = tma and major >= 9 and config is not IEEE and all(map(_describable, described))
    num_parts = triton.cdiv(vocab, config.block_v)
    rest_tn = torch.empty(num_parts, num_rows, dtype=torch.float32, device=device)
    # NaN stays where the target is no token.
    y_n = torch.full((num_rows,), float("nan"), dtype=torch.float32, device=device)
    num_programs = min(triton.cdiv(num_rows, config.block_n) * num_parts, num_processors * (8 // config.num_warps))
    blocks = [config.block_n, config.block_h], [config.block_v, config.block_h], [config.block_n, config.block_v]
    gemm_logp_kernel[(num_programs,)](
        TensorDescriptor.from_tensor(hidden_nh, blocks[0]) if tma else hidden_nh,
        TensorDescriptor.from_tensor(weight_vh, blocks[1]) if tma else weight_vh,
        target_n, base_n if bias_v is None else bias_v, base_n, rest_tn, y_n,
        TensorDescriptor.from_tensor(d_nv, blocks[2]) if tma and d_nv is not None else d_nv,
        hidden_nh.stride(0), weight_vh.stride(0), num_rows, vocab, width, num_programs,
        int(bias_v is not None), int(softcap is not None), scale, softcap or 1.0,
        **_meta(config, tma), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    found = join(rest_tn, y_n, base_n, target_n, scale, d_nv)
    repair(*head, *found, d_nv)
    return found


def choose(dtype: torch.dtype, num_rows: int, major: int, *, gradient: bool) -> GemmConfig:
    """The configuration for inputs of `dtype` on a device of compute capability `major`."""
    if dtype == torch.float32:
        return IEEE
    if num_rows <= FEW_ROWS:
        return FEW
    if major not in (9, 10):
        return OLDER
    if major == 10:
        return MEDIUM
    return LARGE_GRADIENT if gradient else LARGE


def _device(device: torch.device) -> tuple[int, int]:
    """(compute capability, multiprocessors); the interpreter is taken for a small device of capability 9."""
    if device.type != "cuda":
        return 9, 4
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.multi_processor_count


def _describable(x: Tensor) -> bool:
    """Whether a tensor-map of the hardware can describe it: 16-byte steps from a 16-byte address."""
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 and x.stride(0) >= x.shape[1]


def _meta(config: GemmConfig, tma: bool) -> dict[str, int | bool]:
    blocks = {"BLOCK_N": config.block_n, "BLOCK_V": config.block_v, "BLOCK_H": config.block_h}
    return {"TMA": tma, **blocks, "GROUP_N": config.group_n}


def aot_kernels() -> list[AotKernel]:
    """The product in every configuration that the launcher chooses."""
    integers = ("num_rows", "vocab", "width", "num_programs", "has_bias", "capped")
    common = {
        "p_target": "*i64",
        **dict.fromkeys(("p_bias", "p_base", "p_rest", "p_y"), "*fp32"),
        **dict.fromkeys(("stride_hidden", "stride_weight"), "i64"),
        **dict.fromkeys(integers, "i32"),
        **dict.fromkeys(("scale", "softcap"), "fp32"),
    }
    cases = [  # configuration, its name, whether with z, capabilities
        (LARGE, "large", (False,), (90,)),
        (LARGE_GRADIENT, "large", (True,), (90,)),
        (MEDIUM, "medium", (False, True), (100,)),
        (OLDER, "older", (False, True), (80,)),
        (FEW, "few", (False, True), (80, 90, 100)),
        (IEEE, "ieee", (False, True), (80, 90, 100)),
    ]
    kernels = []
    for dtype, name in TRITON_NAMES.items():
        for config, size, keeps, capabilities in cases:
            if (config is IEEE) != (dtype == torch.float32):
                continue
            for keep, tma in product(keeps, (False, True)):
                able = tuple(capability for capability in capabilities if capability >= 90 or not tma)
                if not able or (tma and config is IEEE) or (keep and dtype == torch.float16):
                    continue
                signature = dict(common)
                constexprs: dict[str, Any] = _meta(config, tma)
                tiles = {"hidden": (config.block_n, config.block_h), "weight": (config.block_v, config.block_h)}
                if keep:
                    tiles["d"] = (config.block_n, config.block_v)
                else:
                    constexprs["d"] = None
                for operand, (rows, columns) in tiles.items():
                    signature[operand] = f"tensordesc<{name}[{rows}, {columns}]>" if tma else f"*{name}"
                aligned = [argument for argument, kind in signature.items() if kind.startswith("*") or kind == "i64"]
                kernels.append(
                    AotKernel(
                        f"linear_logp_gemm/{name}/{size}" + "/tma" * tma + "/gradient" * keep,
                        gemm_logp_kernel,
                        signature,
                        constexprs,
                        config.num_warps,
                        config.num_stages,
                        aligned=(*aligned, "vocab", "width"),
                        wgmma=config is not IEEE,
                        max_spill_bytes=0 if tma or size != "large" else 64,  # for what descriptors cannot describe
                        capabilities=able,
                        rare=not tma and size == "large",  # few heads have rows that descriptors cannot describe
                    )
                )
    return kernels
