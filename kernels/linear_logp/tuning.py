"""Which product makes a chunk's logits on which device: committed measurements, never a search at run time.

- "vendor": the vendor's GEMM writes float32 products, a row kernel reads them.
- "epilogue": our own GEMM (`triton_gemm`) reduces each tile to log-prob partials as it is computed. Scoring then never
  has logits in memory; for a loss the products are stored once and read once.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

Route: TypeAlias = Literal["vendor", "epilogue"]

# (torch.cuda.get_device_name, "score" or "loss") -> the faster route by bench/bench_linear_logp.py. Empty: nothing has
# been measured on a GPU yet.
FASTER: dict[tuple[str, str], Route] = {}


@torch.compiler.assume_constant_result
def route_of(
    route: str | None, backend: str, device: torch.device, dtype: torch.dtype, has_lora: bool, score: bool
) -> str:
    """The route of one call: what was asked for, else what is faster by the table.

    Raises:
        ValueError: the name is unknown, or the epilogue was asked for where it does not exist.
    """
    if route not in (None, "vendor", "epilogue"):
        raise ValueError(f"unknown route {route!r}; known: vendor, epilogue")
    reason = ""
    if backend != "triton":
        reason = f"it belongs to the triton backend, this is {backend}"
    elif dtype == torch.float64:
        reason = "its accumulators are float32, the inputs float64"
    elif has_lora:
        reason = "a LoRA is added to products in memory"
    if route == "epilogue" and reason:
        raise ValueError(f"route 'epilogue' cannot be used: {reason}")
    if route is None and not reason and device.type == "cuda":
        return FASTER.get((torch.cuda.get_device_name(device), "score" if score else "loss"), "vendor")
    return route or "vendor"
