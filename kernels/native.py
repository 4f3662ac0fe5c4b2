"""The one place that loads the C++ CPU kernels (`macpo.kernels._native`, built by CMakeLists.txt).

`module` is None where the extension is missing or does not load; `why_absent` says why, and the torch backend runs.
The functions take contiguous CPU tensors, shared without a copy.
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
        f"the native extension is not built or does not load ({error}); "
        "`pip install .` with a C++17 compiler builds it, until then the torch backend runs"
    )

# Fewer floats than this are not worth waking a second thread for.
PARALLEL_ELEMENTS = 2**17


def _loaded() -> ModuleType:
    if module is None:
        raise ImportError(why_absent)
    return module


# The extension takes anything that speaks DLPack; numpy arrays are handed over 3x faster than tensors.
_HAS_NUMPY = find_spec("numpy") is not None


def _view(x: Tensor) -> Any:
    x = x.detach().contiguous()
    return x.numpy() if _HAS_NUMPY else x


def _threads(elements: int) -> int:
    return torch.get_num_threads() if elements >= PARALLEL_ELEMENTS else 1


def row_logp(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """logits [N, V] float32, target [N] int64 -> the targets' log-probs and the rows' logsumexp, [N] float32."""
    logp, lse = torch.empty(logits.shape[0]), torch.empty(logits.shape[0])
    _loaded().row_logp(_view(logits), _view(target), _view(logp), _view(lse), _threads(logits.numel()))
    return logp, lse


def row_dlogits_(logits: Tensor, target: Tensor, lse: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    """logits [N, V] float32 -> scale * (onehot - softmax) * (1 - (logits / softcap) ** 2), in place.

    Raises:
        ValueError: logits that are not contiguous; the result would be written to a copy.
    """
    if not logits.is_contiguous():
        raise ValueError("row_dlogits_ works in place on contiguous logits")
    _loaded().row_dlogits(
        _view(logits), _view(target), _view(lse), logit_scale, softcap or 0.0, _threads(logits.numel())
    )
    return logits


def sample(
    logits: Tensor, params: SampleParams, request_keys: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [B, V] -> token ids [B] int64, raw and processed log-probs [B] float32; see `sampling/op.py`."""
    batch = logits.shape[0]
    ids, raw, processed = torch.empty(batch, dtype=torch.int64), torch.empty(batch), torch.empty(batch)
    _loaded().sample(
        _view(logits.float()),
        _view(params.seed),
        _view(params.temperature),
        _view(params.top_p),
        _view(params.top_k),
        _view(params.min_p),
        _view(params.repetition_penalty),
        None if params.seen is None else _view(params.seen),
        _view(request_keys),
        _view(positions),
        _view(ids),
        _view(raw),
        _view(processed),
        _threads(logits.numel()),
    )
    return ids, raw, processed


def token_words(seed: Tensor, request_keys: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """32 random bits for every (row, token), int64 [B, K]; see `sampling/philox.py`."""
    words = torch.empty(tokens.shape, dtype=torch.int64)
    _loaded().token_words(_view(seed), _view(request_keys), _view(positions), _view(tokens), _view(words))
    return words
