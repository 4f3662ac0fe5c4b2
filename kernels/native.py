"""The one place that loads the C++ CPU kernels (`macpo.kernels._native`, built by CMakeLists.txt).

`module` is None where the extension is missing or does not load; `why_absent` says why, and the torch backend runs.
The functions take CPU tensors and share them without a copy where their layout is one that the kernels read.
Legend: n rows, h hidden size, v vocabulary.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from macpo.kernels.sampling.params import SampleParams

module: ModuleType | None
try:
    module = import_module("macpo.kernels._native")
    why_absent = ""
except ImportError as error:
    module = None
    why_absent = (
        f"the native extension is not built or does not load ({error}); torch takes 1.3 times as long or more for each "
        "operator that has a native kernel; `pip install .` with a C++17 compiler builds it"
    )

# A second thread does not pay for fewer floats than this.
PARALLEL_ELEMENTS = 2**17
# The same bound for a weight in panels, whose rows take a few products each.
PANEL_ELEMENTS = 2**16


def _loaded() -> ModuleType:
    if module is None:
        raise ImportError(why_absent)
    return module


# The extension takes anything that speaks DLPack; numpy arrays are handed over 3x faster than tensors.
_HAS_NUMPY = find_spec("numpy") is not None


def _view(x: Tensor) -> Any:
    x = x.detach().contiguous()
    return x.numpy() if _HAS_NUMPY else x


def _strided(x: Tensor) -> Any:
    """Share x with its strides; 16-bit floats are passed as their bits."""
    x = x.detach()
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.view(torch.int16)
    return x.numpy() if _HAS_NUMPY else x


def _optional(x: Tensor | None) -> Any:
    return None if x is None else _view(x)


def _threads(elements: int) -> int:
    return torch.get_num_threads() if elements >= PARALLEL_ELEMENTS else 1


def _layout(z_nv: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, bool]:
    """Return z as the kernels address it: [n, v], or [v, n] and True where its rows lie side by side."""
    if z_nv.dtype != torch.float32 or z_nv.dim() != 2:
        raise ValueError(f"z must be float32 [n, v], got {z_nv.dtype} {list(z_nv.shape)}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"a gradient is float32, bfloat16 or float16, got {dtype}")
    if z_nv.stride(1) == 1:
        return z_nv, False
    if z_nv.stride(0) == 1:
        return z_nv.T, True
    raise ValueError(f"one axis of z must be contiguous, got strides {z_nv.stride()}")


def _in_place(z: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the front of each of z's rows, as `dtype`."""
    return z if dtype == torch.float32 else z.view(dtype)[:, : z.shape[1]]


def _as(out_nv: Tensor, dtype: torch.dtype, lanes: bool) -> Tensor:
    """Return the memory for d, laid out as z; the extension checks its shape."""
    if out_nv.dtype != dtype:
        raise ValueError(f"d is {dtype}, its memory {out_nv.dtype}")
    return out_nv.T if lanes else out_nv


def row_logp(
    z_nv: Tensor, target_n: Tensor, bias_v: Tensor | None = None, scale: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and logsumexps of the rows, [n] float32, from raw products z = h W'.

    The logits are y = softcap * tanh(scale * (z + bias) / softcap), or scale * (z + bias) without softcap.

    Args:
        z_nv: [n, v] float32, row-major or the transposed view of [v, n]; rows may be padded.
        target_n: [n] int64.
        bias_v: [v] float32 or None.

    Raises:
        ValueError: another dtype or layout, shapes that do not fit, targets outside the vocabulary.
    """
    z, lanes = _layout(z_nv)
    logp_n, lse_n = torch.empty(z_nv.shape[0]), torch.empty(z_nv.shape[0])
    _loaded().row_logp(
        _strided(z), lanes, _optional(bias_v), scale, softcap or 0.0,
        _view(target_n), _view(logp_n), _view(lse_n), _threads(z.numel()),
    )  # fmt: skip
    return logp_n, lse_n


def row_partials(
    z_nv: Tensor, target_n: Tensor, bias_v: Tensor | None = None, scale: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Partial sums of a softmax over more tokens than z holds, [n] float32; arguments and errors as `row_logp`.

    Returns:
        (largest logit m, sum of exp(y - m) over all tokens but the target, the target's logit).
    """
    z, lanes = _layout(z_nv)
    top_n, rest_n, hit_n = (torch.empty(z_nv.shape[0]) for _ in range(3))
    _loaded().row_partials(
        _strided(z), lanes, _optional(bias_v), scale, softcap or 0.0,
        _view(target_n), _view(top_n), _view(rest_n), _view(hit_n), _threads(z.numel()),
    )  # fmt: skip
    return top_n, rest_n, hit_n


def row_logp_dlogits_(
    z_nv: Tensor, target_n: Tensor, bias_v: Tensor | None, scale: float, softcap: float | None, dtype: torch.dtype,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`row_logp` and d = d logp / d z = (onehot - softmax(y)) * (1 - (y / softcap) ** 2) * scale in `dtype`.

    d takes z's place and layout; 16-bit d (rounded to nearest, ties to even) the front of each of z's rows, so that
    its stride is 2 * z's. (Products read it as fast as a dense d, and nothing is allocated.) With `out` [n, v], of
    z's layout, d lies there.
    """
    z, lanes = _layout(z_nv, dtype)
    d = _in_place(z, dtype) if out is None else _as(out, dtype, lanes)
    logp_n, lse_n = torch.empty(z_nv.shape[0]), torch.empty(z_nv.shape[0])
    _loaded().row_logp_dlogits(
        _strided(z), lanes, _optional(bias_v), scale, softcap or 0.0, _view(target_n), _view(logp_n), _view(lse_n),
        _strided(d), dtype == torch.float16, _threads(z.numel()),
    )  # fmt: skip
    return logp_n, lse_n, d.T if lanes else d


def row_dlogits_(
    z_nv: Tensor, target_n: Tensor, lse_n: Tensor, bias_v: Tensor | None, scale: float, softcap: float | None,
    dtype: torch.dtype, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """d of `row_logp_dlogits_` from a known logsumexp."""
    z, lanes = _layout(z_nv, dtype)
    d = _in_place(z, dtype) if out is None else _as(out, dtype, lanes)
    _loaded().row_dlogits(
        _strided(z), lanes, _optional(bias_v), scale, softcap or 0.0, _view(target_n), _view(lse_n), _strided(d),
        dtype == torch.float16, _threads(z.numel()),
    )  # fmt: skip
    return d.T if lanes else d


def has_bf16_gemm() -> bool:
    """Whether `bf16_logits` and `bf16_accumulate_` run here: x86-64 with AVX512-BF16."""
    return module is not None and bool(module.has_bf16_gemm())


def _need_bf16_gemm(name: str, *operands: Tensor) -> None:
    if not has_bf16_gemm():
        raise RuntimeError(f"{name} needs the native extension and a CPU with AVX512-BF16")
    if any(x.dtype != torch.bfloat16 or x.dim() != 2 for x in operands):
        raise ValueError(f"{name} takes bfloat16 matrices, got {[(x.dtype, list(x.shape)) for x in operands]}")


def bf16_logits(hidden_nh: Tensor, weight_vh: Tensor, out_vn: Tensor | None = None) -> Tensor:
    """hidden weight' of bfloat16 matrices, summed and returned in float32: the transposed view of a [v, n] buffer.

    Sums run over 128 values of h at a time and these over h, whatever n, v and the threads are. The buffer is `out_vn`
    where that is given.

    Raises:
        RuntimeError: this CPU cannot (`has_bf16_gemm`). ValueError: other dtypes, or sizes that do not fit.
    """
    _need_bf16_gemm("bf16_logits", hidden_nh, weight_vh)
    z_vn = torch.empty(weight_vh.shape[0], hidden_nh.shape[0]) if out_vn is None else out_vn
    weight = weight_vh if weight_vh.stride(1) == 1 else weight_vh.contiguous()
    _loaded().bf16_gemm(_strided(weight), _strided(hidden_nh.T), _strided(z_vn), False, _threads(weight.numel()))
    return z_vn.T


def bf16_accumulate_(dweight_vh: Tensor, d_vn: Tensor, hidden_nh: Tensor, *, overwrite: bool = False) -> Tensor:
    """dweight += d hidden of bfloat16 matrices; d [v, n] as `row_logp_dlogits_` leaves it, transposed back.

    With `overwrite` dweight = d hidden, whatever dweight held.

    Raises:
        RuntimeError, ValueError: as `bf16_logits`; a d or dweight (float32) whose rows are not contiguous.
    """
    _need_bf16_gemm("bf16_accumulate_", d_vn, hidden_nh)
    if dweight_vh.dtype != torch.float32:
        raise ValueError(f"dweight must be float32, got {dweight_vh.dtype}")
    operands, threads = (_strided(d_vn), _strided(hidden_nh), _strided(dweight_vh)), _threads(dweight_vh.numel())
    _loaded().bf16_gemm(*operands, not overwrite, threads)
    return dweight_vh


def head_logp(
    hidden_nh: Tensor, weight_vh: Tensor, target_n: Tensor, bias_v: Tensor | None, scale: float,
    d_nv: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Log-probs and logsumexps of a bfloat16 head's targets, with no logits in memory, and their gradient in `d_nv`.

    d logp / d z = factor * d by rows, as `linear_logp/triton_gemm.py` has it. Sums run in one order, whatever n, other
    rows and the threads are.

    Args:
        hidden_nh, weight_vh: [n, h] and [v, h] bfloat16; columns contiguous, h at least 1.
        target_n: [n] int64.
        bias_v: [v] float32 or None; logits are scale * (z + bias).
        d_nv: the transposed view of a [v, n] bfloat16 buffer, or None.

    Returns:
        (logp, lse, factor), [n] float32.

    Raises:
        RuntimeError: this CPU cannot (`has_bf16_gemm`). ValueError: dtypes, layouts or sizes that do not fit, targets
            outside the vocabulary.
    """
    _need_bf16_gemm("head_logp", hidden_nh, weight_vh, *(() if d_nv is None else (d_nv,)))
    logp_n, lse_n, factor_n = (torch.empty(hidden_nh.shape[0]) for _ in range(3))
    _loaded().head_logp(
        _strided(hidden_nh), _strided(weight_vh), _optional(bias_v), scale, _view(target_n), _view(logp_n),
        _view(lse_n), _view(factor_n), None if d_nv is None else _strided(d_nv.T), _threads(weight_vh.numel()),
    )  # fmt: skip
    return logp_n, lse_n, factor_n


def has_panels() -> bool:
    """Whether this machine has `Panels` (AVX-512)."""
    return module is not None and bool(module.has_panels())


class Panels:
    """A copy of weight [O, I] float32 in panels of 32 outputs, for products with a few rows at the memory's speed.

    The copy outlives changes of the weight; `bias` [O] float32 is shared.

    Raises:
        RuntimeError: this CPU has no AVX-512 (`has_panels`). ValueError: another dtype or layout.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        if not has_panels():
            raise RuntimeError("Panels need the native extension and a CPU with AVX-512")
        if weight.dtype != torch.float32 or weight.dim() != 2:
            raise ValueError(f"a weight is float32 [O, I], got {weight.dtype} {list(weight.shape)}")
        self.num_outputs = weight.shape[0]
        panels = torch.empty(-(-weight.shape[0] // 32) * 32 * weight.shape[1])
        self.nbytes: int = panels.nbytes
        self._panels, self._bias = _view(panels), _optional(bias)
        self._large = panels.numel() >= PANEL_ELEMENTS
        _loaded().pack_panels(_strided(weight.contiguous()), self._panels, _threads(weight.numel()))

    def product(self, x: Tensor) -> Tensor:
        """x [N, I] -> x W' + b [N, O], float32. An element's sum runs in an order of I alone.

        Raises:
            ValueError: sizes that do not fit together.
        """
        y = torch.empty(x.shape[0], self.num_outputs)
        threads = torch.get_num_threads() if self._large else 1
        _loaded().panel_product(_view(x), self._panels, self._bias, y.numpy() if _HAS_NUMPY else y, threads)
        return y


def fits_slot_attention(q: Tensor) -> bool:
    """Whether `slot_attention` takes these queries [b, heads, size]: float32, and a head size from 16 to 128."""
    return q.dtype == torch.float32 and 16 <= q.shape[2] <= 128 and bool(_loaded().has_slot_attention())


def slot_attention(
    q: Tensor, k_slots: Tensor, v_slots: Tensor, lens: Tensor, scale: float, window: int | None,
    softcap: float | None = None, sinks: Tensor | None = None, new_k: Tensor | None = None,
    new_v: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One query token a sequence over its slot, float32; see `paged_attention/slots.py`. Last axes are contiguous.

    new_k, new_v [B, Hkv, D] are written to each sequence's last token first.

    Raises:
        ValueError: sizes that do not fit together, a length outside the slot.
    """
    out = torch.empty(q.shape)
    logits = None if sinks is None else sinks.float()
    elements = 2 * q.shape[0] * k_slots.shape[1] * k_slots.shape[2] * q.shape[2]
    _loaded().slot_attention(
        _strided(q), _strided(k_slots), _strided(v_slots), _view(lens), scale, window or 0, softcap or 0.0,
        _optional(logits), None if new_k is None else _strided(new_k), None if new_v is None else _strided(new_v),
        _view(out), _threads(elements),
    )  # fmt: skip
    return out


def sample(
    logits: Tensor, params: SampleParams, request_keys: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [B, V] -> token ids [B] int64, raw and processed log-probs [B] float32; see `sampling/op.py`."""
    batch = logits.shape[0]
    ids, raw, processed = torch.empty(batch, dtype=torch.int64), torch.empty(batch), torch.empty(batch)
    _loaded().sample(
        _view(logits.float()), *map(_view, params.settings), _optional(params.seen), _view(request_keys),
        _view(positions), _view(ids), _view(raw), _view(processed), _threads(logits.numel()),
    )  # fmt: skip
    return ids, raw, processed


def token_words(seed: Tensor, request_keys: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """32 random bits for every (row, token), int64 [B, K]; see `sampling/philox.py`."""
    words = torch.empty(tokens.shape, dtype=torch.int64)
    _loaded().token_words(_view(seed), _view(request_keys), _view(positions), _view(tokens), _view(words))
    return words
