"""The GEMMs of a head, shared by linear_logp and pair_loss: logits of a chunk, gradients of the inputs.

`shard.py` has the head of a process that holds a part of the vocabulary.

For every loss of log-probs, d loss / d z = g_row * d with d = d logp / d z: one scalar a row. d goes into the GEMMs
as it is, and g scales the small operands: dX = g (d W) by rows, dW = d' (g h). So d never waits for g, and no pass
over [n, V] is spent on it.

Precision: products that become logits, and everything summed over chunks, are float32 (float64 for float64). With
16-bit inputs d and g h are rounded to that dtype before a gradient GEMM, and dX is rounded once after it.
Legend: n rows of a chunk, h hidden size, v vocabulary, r rank of the LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from macpo.kernels import native
from macpo.kernels.linear_logp import rows
from macpo.kernels.wide_products import is_emulated

# Size of a default chunk's logits, or of its d where no logits are kept. On a GPU this is 512 and 1,024 response tokens
# at a vocabulary of 128 Ki, where the GEMMs are near full speed; beside the gradients 4,096 then need under 0.30 GB.
CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
# Bytes per row and vocabulary entry: float32 logits; d in 16 bits, and one sum per 256 entries.
ROW_BYTES = {"vendor": 4.0, "epilogue": 2.0 + 4 / 256}
ROW_MULTIPLE = 128
TRANSPOSE_ROWS = 128
# Elements that are converted at a time where there is no 16-bit GEMM with float32 output.
CONVERT_ELEMENTS = 2**21


def chunks(begin: int, end: int, chunk_rows: int) -> Iterator[slice]:
    """Consecutive slices of at most `chunk_rows` rows: as few as there can be, and of nearly one size.

    A small last chunk would read all of W for a few rows. Sizes are multiples of the vendor's tiles of 256 or 128 rows
    where the limit is one.
    """
    unit = next(unit for unit in (2 * ROW_MULTIPLE, ROW_MULTIPLE, 1) if chunk_rows % unit == 0)
    num_chunks, num_units = -(-(end - begin) // chunk_rows), -(-(end - begin) // unit)
    for index in range(num_chunks):
        start, stop = (begin + unit * (num_units * i // num_chunks) for i in (index, index + 1))
        yield slice(start, min(stop, end))


def default_chunk_rows(vocab: int, device: str, route: str = "vendor") -> int:
    """Rows whose logits or d fit `CHUNK_BYTES`, a multiple of 128 where there are so many; at least 1."""
    fit = int(CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) / (ROW_BYTES[route] * vocab))
    return max(1, fit // ROW_MULTIPLE * ROW_MULTIPLE or fit)


@dataclass(frozen=True, slots=True)
class Needs:
    """The inputs that take gradient."""

    hidden: bool
    weight: bool
    bias: bool
    lora_a: bool
    lora_b: bool

    @property
    def head(self) -> bool:
        """Whether anything takes gradient whose GEMM sums over rows, and so needs g of every row."""
        return self.weight or self.bias or self.lora_a or self.lora_b

    @property
    def any(self) -> bool:
        return self.hidden or self.head


class Gradient(NamedTuple):
    """Results computed from a chunk's logits; d logp / d z = factor * d by rows."""

    logp_n: Tensor
    lse_n: Tensor
    d_nv: Tensor
    factor_n: Tensor | None = None
    """None stands for 1."""


@dataclass(frozen=True, slots=True)
class Head:
    """Weights and scalars of a head, and what computes its rows."""

    weight_vh: Tensor
    bias_v: Tensor | None
    lora_a_rh: Tensor | None
    lora_b_vr: Tensor | None
    lora_scaling: float
    scale: float
    softcap: float | None
    backend: str
    route: str = "vendor"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of logits, log-probs and sums."""
        return torch.promote_types(self.weight_vh.dtype, torch.float32)

    @property
    def native_gemm(self) -> bool:
        """Whether the native extension computes 16-bit products with float32 output."""
        return self.backend == "native" and self.weight_vh.dtype == torch.bfloat16 and native.has_bf16_gemm()

    def transposed(self, num_rows: int) -> bool:
        """Whether a chunk's z is the transposed view of a [V, n] buffer.

        The native row kernels take both layouts. MKL's float32 product of a wide chunk is faster transposed; for a few
        rows its rounding would depend on their number more often. The native 16-bit product is always transposed.
        """
        wide = self.weight_vh.dtype == torch.float32 and num_rows >= TRANSPOSE_ROWS
        return self.backend == "native" and (wide or self.native_gemm)

    @property
    def row_bias(self) -> Tensor | None:
        return None if self.bias_v is None else self.bias_v.to(self.dtype)

    def buffer(self, num_rows: int, *, score: bool = False) -> Tensor:
        """Memory for one chunk, used by all: logits, or d on the epilogue route, which scores without any."""
        num_elements = num_rows * self.weight_vh.shape[0]
        if self.route == "epilogue":
            return self.weight_vh.new_empty(0 if score else num_elements)
        return self.empty(num_elements)

    def block_rows(self, num_rows: int, chunk_rows: int, needs: Needs) -> int:
        """Rows whose d is in memory at once: a chunk, or for a trained 16-bit W as many as make d the size of W.

        One product for dW is then one of several hundred or thousand rows, and its float32 sum is read and written
        so much less often: at V = 128,256 and H = 4,096 that sum is 2.1 GB, a chunk's d 0.13 GB. Where all rows fit
        into a d of twice that size they are one block: no float32 sum is needed then, and no more memory in all.
        """
        size = self.weight_vh.shape[1]
        if not needs.weight or self.weight_vh.dtype.itemsize != 2:
            return chunk_rows
        return max(chunk_rows, 2 * size if size < num_rows <= 2 * size else size)

    def block(self, num_rows: int, chunk_rows: int, needs: Needs) -> Tensor | None:
        """Memory for the d of a block of at most `num_rows` rows; None where d may lie in the chunk's."""
        rows_held = min(num_rows, self.block_rows(num_rows, chunk_rows, needs))
        return None if rows_held <= chunk_rows else self.weight_vh.new_empty(rows_held * self.weight_vh.shape[0])

    def chunk_buffer(self, block: Tensor | None, num_rows: int) -> Tensor:
        """Memory for one chunk as `buffer`; on the epilogue route the block serves, since d is written into it."""
        return block if block is not None and self.route == "epilogue" else self.buffer(num_rows)

    def empty(self, *shape: int) -> Tensor:
        """Allocate memory with the dtype and on the device of the logits."""
        return self.weight_vh.new_empty(shape, dtype=self.dtype)

    def logits(self, hidden_nh: Tensor, buffer: Tensor) -> Tensor:
        """z = h W' + s (h A') B' [n, V], in the buffer's memory."""
        vocab, num_rows = self.weight_vh.shape[0], hidden_nh.shape[0]
        flat = buffer[: num_rows * vocab]
        z_nv = flat.view(vocab, num_rows).T if self.transposed(num_rows) else flat.view(num_rows, vocab)
        if self.native_gemm:
            native.bf16_logits(hidden_nh, self.weight_vh, z_nv.T)
        else:
            product_(hidden_nh, self.weight_vh, z_nv)
        if self.lora_b_vr is not None:
            # The rank is small: float32, so that nothing of the product is rounded to 16 bits.
            z_nv.addmm_(self.lora_rows(hidden_nh), self.lora_b_vr.to(z_nv.dtype).T)
        return z_nv

    def lora_rows(self, hidden_nh: Tensor) -> Tensor:
        """s h A' [n, r] in float32."""
        assert self.lora_a_rh is not None
        return (hidden_nh.to(self.dtype) @ self.lora_a_rh.to(self.dtype).T).mul_(self.lora_scaling)

    def score_rows(self, chunk_rows: int) -> int:
        """Rows to score at once: with no logits in memory, as many as have partial sums the size of a chunk of them."""
        return 64 * chunk_rows if self.route == "epilogue" else chunk_rows

    def score(self, hidden_nh: Tensor, target_n: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """Log-prob and logsumexp [n]; the epilogue route needs no buffer."""
        if self.route != "epilogue":
            z_nv = self.logits(hidden_nh, buffer)
            row_logp = rows.kernels(z_nv, self.backend).row_logp
            logp_n, lse_n = row_logp(z_nv, target_n, self.row_bias, self.scale, self.softcap)
            return logp_n, lse_n
        if self.backend == "native":
            return native.head_logp(hidden_nh, self.weight_vh, target_n, self.row_bias, self.scale)[:2]
        from macpo.kernels.linear_logp.triton_gemm import gemm_logp

        return gemm_logp(hidden_nh, self.weight_vh, target_n, self.row_bias, self.scale, self.softcap)

    def differentiate(
        self, hidden_nh: Tensor, target_n: Tensor, buffer: Tensor, block: Tensor | None = None
    ) -> Gradient:
        """Log-probs and the gradient of the logits: in `block`, chunk by chunk, or perhaps in the buffer's memory."""
        num_rows, vocab = hidden_nh.shape[0], self.weight_vh.shape[0]
        if block is None and self.route != "epilogue":
            return self._differentiate(hidden_nh, target_n, buffer, None)
        flat = (buffer if block is None else block)[: num_rows * vocab]
        d_nv = flat.view(vocab, num_rows).T if self.transposed(num_rows) else flat.view(num_rows, vocab)
        if self.route == "epilogue":
            inputs = hidden_nh, self.weight_vh, target_n, self.row_bias, self.scale
            if self.backend == "native":
                logp_n, lse_n, factor_n = native.head_logp(*inputs, d_nv)
            else:
                from macpo.kernels.linear_logp.triton_gemm import gemm_logp_dlogits

                logp_n, lse_n, factor_n = gemm_logp_dlogits(*inputs, d_nv)
            return Gradient(logp_n, lse_n, d_nv, factor_n)
        logp_n, lse_n = (hidden_nh.new_empty(num_rows, dtype=self.dtype) for _ in range(2))
        for part in chunks(0, num_rows, buffer.numel() // vocab):
            found = self._differentiate(hidden_nh[part], target_n[part], buffer, d_nv[part])
            logp_n[part], lse_n[part] = found.logp_n, found.lse_n
        return Gradient(logp_n, lse_n, d_nv)

    def _differentiate(self, hidden_nh: Tensor, target_n: Tensor, buffer: Tensor, out_nv: Tensor | None) -> Gradient:
        """`differentiate` of one chunk by way of its logits; d is written to `out_nv` where that is given."""
        scalars = self.row_bias, self.scale, self.softcap, self.weight_vh.dtype
        z_nv = self.logits(hidden_nh, buffer)
        return Gradient(*rows.kernels(z_nv, self.backend).row_logp_dlogits_(z_nv, target_n, *scalars, out_nv))

    def differentiate_again(self, hidden_nh: Tensor, target_n: Tensor, lse_n: Tensor, buffer: Tensor) -> Gradient:
        """The gradient of rows whose logsumexp an earlier pass found; perhaps in the buffer's memory."""
        if self.route == "epilogue":
            return self.differentiate(hidden_nh, target_n, buffer)
        return Gradient(lse_n, lse_n, self.dlogits_(self.logits(hidden_nh, buffer), target_n, lse_n))

    def dlogits_(self, z_nv: Tensor, target_n: Tensor, lse_n: Tensor, out_nv: Tensor | None = None) -> Tensor:
        scalars = self.row_bias, self.scale, self.softcap, self.weight_vh.dtype
        d_nv: Tensor = rows.kernels(z_nv, self.backend).row_dlogits_(z_nv, target_n, lse_n, *scalars, out_nv)
        return d_nv


class Gradients:
    """Gradients of the inputs, summed over chunks.

    Args:
        head: the head.
        hidden: [N, H]: all rows.
        needs: the inputs whose gradients are computed.
        whole: all rows will come in one `add`, so that the one product for dW rounds it to W's dtype itself.

    Attributes:
        hidden: [N, H] in hidden's dtype: d W per row, before g and the row's own factor; `row_factors` has both.
        factor_n: [N] float32, `Gradient.factor_n` of the rows added; None stands for 1.
        weight, bias, lora_a, lora_b: float32 sums of g d ..., in the shapes of these inputs (weight: see `whole`).
    """

    def __init__(self, head: Head, hidden: Tensor, needs: Needs, *, whole: bool = False) -> None:
        self.head, self.rows, self.needs = head, hidden, needs
        self.factor_n: Tensor | None = None
        self.hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs.hidden else None
        # The first product overwrites dW, which saves a pass over it.
        self.weight_is_set = hidden.shape[0] == 0
        self.weight = None
        if needs.weight and whole and not self.weight_is_set and head.weight_vh.dtype != head.dtype:
            self.weight = torch.empty_like(head.weight_vh, memory_format=torch.contiguous_format)
        elif needs.weight:
            self.weight = head.empty(*head.weight_vh.shape)
        if self.weight is not None and self.weight_is_set:
            self.weight.zero_()
        self.bias = self._zeros(head.bias_v) if needs.bias else None
        self.lora_a = self._zeros(head.lora_a_rh) if needs.lora_a else None
        self.lora_b = self._zeros(head.lora_b_vr) if needs.lora_b else None

    def _zeros(self, like: Tensor | None) -> Tensor:
        assert like is not None
        return torch.zeros(like.shape, dtype=self.head.dtype, device=like.device)

    def row_factors(self, grad_n: Tensor) -> Tensor:
        """What the rows of `hidden` still have to be multiplied by, given g [N]: one product, one rounding."""
        return grad_n if self.factor_n is None else grad_n * self.factor_n

    def add(self, part: slice, found: Gradient, grad_n: Tensor | None = None) -> None:
        """Add the rows `part` with gradient d; g = grad_n [n] is needed where the head takes gradient.

        hidden[part] = d W + s (d B) A; weight += d' (g h), bias += d' g, lora_b += d' (g u) with u = s h A',
        lora_a += s (g d B)' h.
        """
        head, hidden_nh, d_nv, factor_n = self.head, self.rows[part], found.d_nv, found.factor_n
        through_nr = self._through_lora(d_nv) if head.lora_b_vr is not None else None
        if self.hidden is not None:
            dx_nh = self.hidden[part]
            _input_product_(d_nv, head.weight_vh, dx_nh)
            if factor_n is not None:
                if self.factor_n is None:
                    self.factor_n = factor_n.new_empty(self.rows.shape[0])
                self.factor_n[part] = factor_n
            if through_nr is not None and head.lora_a_rh is not None:
                dx_nh.copy_((through_nr @ head.lora_a_rh.to(head.dtype)).add_(dx_nh))
        if not self.needs.head:
            return
        assert grad_n is not None
        grad_n1 = (grad_n if factor_n is None else grad_n * factor_n)[:, None]
        if self.weight is not None:
            add_product_(self.weight, d_nv, hidden_nh * grad_n1, head.backend, overwrite=not self.weight_is_set)
            self.weight_is_set = True
        if self.bias is not None:
            add_product_(self.bias[:, None], d_nv, grad_n1)
        if self.lora_b is not None:
            add_product_(self.lora_b, d_nv, head.lora_rows(hidden_nh) * grad_n1, head.backend)
        if self.lora_a is not None and through_nr is not None:
            self.lora_a.addmm_((through_nr * grad_n1).T, hidden_nh.to(head.dtype))

    def _through_lora(self, d_nv: Tensor) -> Tensor:
        """s d B [n, r] in float32."""
        assert self.head.lora_b_vr is not None
        b_vr = self.head.lora_b_vr
        out_nr = torch.zeros(d_nv.shape[0], b_vr.shape[1], dtype=self.head.dtype, device=d_nv.device)
        add_product_(out_nr, d_nv.T, b_vr)
        return out_nr.mul_(self.head.lora_scaling)


def product_(a_nh: Tensor, b_vh: Tensor, out_nv: Tensor) -> None:
    """out = a b', accumulated in float32 (float64 for float64)."""
    if a_nh.dtype == out_nv.dtype and out_nv.is_contiguous():
        torch.mm(a_nh, b_vh.T, out=out_nv)
    elif a_nh.dtype == out_nv.dtype:
        torch.mm(b_vh, a_nh.T, out=out_nv.T)
    elif a_nh.is_cuda:
        torch.mm(a_nh, b_vh.T, out_dtype=out_nv.dtype, out=out_nv)
    else:
        a_nh = a_nh.to(out_nv.dtype)
        for part in _convert_blocks(b_vh):
            out_nv[:, part] = a_nh @ b_vh[part].to(out_nv.dtype).T


def add_product_(
    out_vk: Tensor, d_nv: Tensor, x_nk: Tensor, backend: str = "torch", *, overwrite: bool = False
) -> None:
    """out += d' x, accumulated in float32; x is rounded to d's dtype first, which is exact where d is float32.

    With `overwrite` out = d' x, whatever out held; out may then have d's dtype, to which the float32 sum is rounded.
    """
    x_nk, d_vn = x_nk.to(d_nv.dtype), d_nv.T
    if d_nv.dtype == out_vk.dtype:
        torch.mm(d_vn, x_nk, out=out_vk) if overwrite else out_vk.addmm_(d_vn, x_nk)
    elif d_nv.is_cuda and overwrite:
        torch.mm(d_vn, x_nk, out_dtype=out_vk.dtype, out=out_vk)
    elif d_nv.is_cuda:
        torch.addmm(out_vk, d_vn, x_nk, out_dtype=out_vk.dtype, out=out_vk)
    elif backend == "native" and d_nv.dtype == torch.bfloat16 and native.has_bf16_gemm() and d_vn.stride(1) == 1:
        native.bf16_accumulate_(out_vk, d_vn, x_nk, overwrite=overwrite)
    else:
        x_nk = x_nk.to(out_vk.dtype)
        for part in _convert_blocks(d_vn):
            out_vk[part].addmm_(d_vn[part].to(out_vk.dtype), x_nk, beta=0 if overwrite else 1)


def _input_product_(d_nv: Tensor, weight_vh: Tensor, out_nh: Tensor) -> None:
    """out = d W, accumulated in float32 and rounded once."""
    if not is_emulated(d_nv.dtype, d_nv.device):
        torch.mm(d_nv, weight_vh, out=out_nh)
        return
    wide_nh = torch.zeros(out_nh.shape, dtype=torch.float32)
    for part in _convert_blocks(weight_vh):
        wide_nh.addmm_(d_nv[:, part].float(), weight_vh[part].float())
    out_nh.copy_(wide_nh)


def _convert_blocks(x_vk: Tensor) -> Iterator[slice]:
    step = max(1, CONVERT_ELEMENTS // max(1, x_vk.shape[1]))
    return (slice(start, start + step) for start in range(0, x_vk.shape[0], step))
