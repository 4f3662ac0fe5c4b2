"""sample: draw one token a row, reproducibly."""

from __future__ import annotations

import torch
from torch import Tensor

from macpo.kernels.sampling import library
from macpo.kernels.sampling.params import SampleParams
from macpo.kernels.sampling.philox import BLOCK_BITS

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
    a meaningless id.

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
        ValueError: shapes or dtypes that do not fit (float64 logits on backend "triton" among them), or (CPU only, not
            to wait for a device) keys out of range.
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
    if torch.compiler.is_compiling():
        facts = params.facts
        ids, raw, processed = torch.ops.macpo.sample(
            logits, *params.settings, params.seen, request_keys, positions, facts["penalised"], facts["greedy"],
            facts["any_greedy"], list(facts["top_ks"]), facts["top_p"], facts["min_p"], backend,
        )  # fmt: skip
        return ids, raw, processed
    return library.run_sample(logits, params, request_keys, positions, backend)
