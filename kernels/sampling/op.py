"""sample: draw one token a row, reproducibly."""

from __future__ import annotations

import torch
from torch import Tensor

from macpo.kernels import native
from macpo.kernels.backend import explain
from macpo.kernels.sampling import torch_impl
from macpo.kernels.sampling.params import SampleParams
from macpo.kernels.sampling.philox import ATTEMPT_BITS, BLOCK_BITS, POSITION_BITS, SAMPLE_BITS

MAX_POSITION, MAX_ATTEMPT, MAX_SAMPLE = 2**POSITION_BITS - 1, 2**ATTEMPT_BITS - 1, 2**SAMPLE_BITS - 1
MAX_VOCAB = 4 * 2**BLOCK_BITS


@torch.no_grad()
def sample(
    logits: Tensor,
    params: SampleParams,
    request_keys: Tensor,
    positions: Tensor,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a token for each row from its filtered distribution, by the Gumbel-max trick.

    Filters apply in Hugging Face's order (repetition penalty, temperature, top-k, top-p, min-p) and keep the same
    tokens. Noise is Philox4x32-10 of (seed; request id, sample, attempt, position, token), so the draw of a row
    depends on its own logits, settings and keys alone. A row with a NaN or infinite logit gives a NaN raw log-prob and
    an id that means nothing.

    Args:
        logits: [B, V] float; computed on in float32.
        params: settings of the B rows.
        request_keys: [B, 3] int64: request id (0 .. 2**63 - 1), sample (< 4096), attempt (< 1024).
        positions: [B] int64: index of the drawn token in its sequence (< 2**22).
        backend: force one; default by device (`macpo.kernels.backend`).

    Returns:
        token ids [B] int64; raw log-probs [B] float32, of the untouched logits; processed log-probs [B] float32, of
        the filtered and renormalised distribution (0 at temperature 0).

    Raises:
        ValueError: shapes or dtypes that do not fit, or (CPU only, not to wait for a device) keys out of range.
        BackendError: the forced backend is not there.
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be float [B, V], got {logits.dtype} {list(logits.shape)}")
    batch, vocab = logits.shape
    if len(params) != batch:
        raise ValueError(f"params are for {len(params)} rows, logits have {batch}")
    if params.seen is not None and params.seen.shape[1] != vocab:
        raise ValueError(f"params.seen has {params.seen.shape[1]} tokens, logits have {vocab}")
    if request_keys.shape != (batch, 3) or request_keys.dtype != torch.int64:
        raise ValueError(
            f"request_keys must be int64 [{batch}, 3], got {request_keys.dtype} {list(request_keys.shape)}"
        )
    if positions.shape != (batch,) or positions.dtype != torch.int64:
        raise ValueError(f"positions must be int64 [{batch}], got {positions.dtype} {list(positions.shape)}")
    if not 0 < vocab <= MAX_VOCAB:
        raise ValueError(f"the vocabulary must have 1..{MAX_VOCAB} tokens, got {vocab}")
    if request_keys.device.type == "cpu" and batch:
        _check_keys(request_keys, positions)
    choice = explain("sample", logits.device, backend)
    if not batch:
        return positions.clone(), logits.new_empty(0, dtype=torch.float32), logits.new_empty(0, dtype=torch.float32)
    # Without noise and filters torch's argmax is as fast, so only an explicit backend="native" takes greedy batches.
    if choice.backend == "native" and (backend == "native" or not params.facts["greedy"]):
        return native.sample(logits, params, request_keys, positions)
    return torch_impl.sample(logits, params, request_keys, positions)


def _check_keys(request_keys: Tensor, positions: Tensor) -> None:
    """Counter fields must not spill into one another: that would repeat noise."""
    highest = (2**63 - 1, MAX_SAMPLE, MAX_ATTEMPT)
    low, high = request_keys.amin(0).tolist(), request_keys.amax(0).tolist()
    for name, smallest, largest, limit in zip(("request id", "sample", "attempt"), low, high, highest, strict=True):
        if smallest < 0 or largest > limit:
            raise ValueError(f"{name} must be in 0..{limit}, got {smallest}..{largest}")
    first, last = (int(value) for value in positions.aminmax())
    if first < 0 or last > MAX_POSITION:
        raise ValueError(f"positions must be in 0..{MAX_POSITION}, got {first}..{last}")
