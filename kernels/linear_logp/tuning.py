"""Chooses the product that makes a chunk's logits, from committed measurements, never by a search at run time.

- "vendor": the vendor's GEMM writes float32 products, a row kernel reads them.
- "epilogue": our own GEMM (`triton_gemm`, on a CPU `native.head_logp`) reduces each tile to log-prob partials as it is
  computed. Scoring then never has logits in memory; for a loss each tile leaves its exponentials, which are the
  gradient but for a factor a row.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

from macpo.kernels import native

Route: TypeAlias = Literal["vendor", "epilogue"]

# (compute capability, "score" or "loss") -> the faster route for 16-bit heads, by bench.bench_linear_logp and
# bench.bench_pair_loss on an H200 (the loss before its exponentials were referred to the target's logit). Others have
# not been measured and use the vendor's.
FASTER: dict[tuple[int, str], Route] = {(9, "score"): "epilogue", (9, "loss"): "epilogue"}


@torch.compiler.assume_constant_result
def route_of(
    route: str | None, backend: str, device: torch.device, dtype: torch.dtype, *, score: bool, lora: bool = False,
    softcap: bool = False, sharded: bool = False, contiguous: bool = True,
) -> str:  # fmt: skip
    """Return the route of one call: the one asked for, else the faster one by the table.

    Raises:
        ValueError: the name is unknown, or the epilogue was asked for where it does not exist.
    """
    if route not in (None, "vendor", "epilogue"):
        raise ValueError(f"unknown route {route!r}; known: vendor, epilogue")
    reason = ""
    if backend == "native" and not (dtype == torch.bfloat16 and native.has_bf16_gemm()):
        reason = f"the native one is for bfloat16 on a CPU with AVX512-BF16, the inputs are {dtype}"
    elif backend == "native" and softcap:
        reason = "the native one has no softcap"
    elif backend == "torch":
        reason = "the torch backend has none"
    elif dtype == torch.float64:
        reason = "its accumulators are float32, the inputs float64"
    elif lora:
        reason = "a LoRA is added to products in memory"
    elif softcap and not score:
        reason = "it does not keep the slope of a softcap"
    elif dtype == torch.float16 and not score:
        reason = "float16 cannot hold exponentials of any size"
    elif sharded:
        reason = "its base is the target's logit, which another process may have"
    elif not contiguous:
        reason = "rows of hidden states or weights are not contiguous"
    if route == "epilogue" and reason:
        raise ValueError(f"route 'epilogue' cannot be used: {reason}")
    if route is None and not reason and backend == "native":
        return "epilogue"
    if route is None and not reason and device.type == "cuda" and dtype != torch.float32:
        major, _ = torch.cuda.get_device_capability(device)
        return FASTER.get((major, "score" if score else "loss"), "vendor")
    return route or "vendor"
