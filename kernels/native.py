"""The one place that loads the C++ CPU kernels (`macpo.kernels._native`, built by CMakeLists.txt).

`module` is None where the extension is missing or does not load; `why_absent` says why, and the torch backend runs.
The functions take contiguous CPU tensors, shared without a copy (DLPack).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from macpo.kernels.sampling.params import SampleParams

module: ModuleType | None
try:
    from macpo.kernels import _native

    module = _native
    why_absent = ""
except ImportError as error:
    module = None
    why_absent = (
        f"the native extension is not built or does not load ({error}); "
        "`pip install .` with a C++17 compiler builds it, until then the torch backend runs"
    )

# Fewer floats than this are not worth waking a second thread for.
PARALLEL_ELEMENTS = 2**17


def _loaded() -> ModuleType:
    if module is None:
        raise ImportError(why_absent)
    return module


def _threads(elements: int) -> int:
    return torch.get_num_threads() if elements >= PARALLEL_ELEMENTS else 1


def row_logp(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """logits [N, V] float32, target [N] int64 -> the targets' log-probs and the rows' logsumexp, [N] float32."""
    logp, lse = torch.empty(2, logits.shape[0]).unbind(0)
    _loaded().row_logp(logits.detach(), target.contiguous(), logp, lse, _threads(logits.numel()))
    return logp, lse


def row_dlogits_(logits: Tensor, target: Tensor, lse: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    """logits [N, V] float32 -> scale * (onehot - softmax) * (1 - (logits / softcap) ** 2), in place."""
    _loaded().row_dlogits(
        logits, target.contiguous(), lse.contiguous(), logit_scale, softcap or 0.0, _threads(logits.numel())
    )
    return logits


def sample(
    logits: Tensor, params: SampleParams, request_keys: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [B, V] -> token ids [B] int64, raw and processed log-probs [B] float32; see `sampling/op.py`."""
    logits = logits.detach().float().contiguous()
    ids = torch.empty(logits.shape[0], dtype=torch.int64)
    raw, processed = torch.empty(2, logits.shape[0]).unbind(0)
    _loaded().sample(
        logits,
        params.seed,
        params.temperature,
        params.top_p,
        params.top_k,
        params.min_p,
        params.repetition_penalty,
        None if params.seen is None else params.seen.contiguous(),
        request_keys.contiguous(),
        positions.contiguous(),
        ids,
        raw,
        processed,
        _threads(logits.numel()),
    )
    return ids, raw, processed


def token_words(seed: Tensor, request_keys: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """32 random bits for every (row, token), int64 [B, K]; see `sampling/philox.py`."""
    words = torch.empty(tokens.shape, dtype=torch.int64)
    _loaded().token_words(
        seed.contiguous(), request_keys.contiguous(), positions.contiguous(), tokens.contiguous(), words
    )
    return words
