"""Decides which implementation of an operator runs (triton, native or torch), and says why.

    explain("sample", "cpu")            # Choice(backend="native", why="...")
    with use_backend("torch"): ...      # a test or a user forces one
    MACPO_BACKEND=torch python ...      # the same from outside

An operator's own `backend=` argument is the strictest: it raises where that operator lacks the backend.
`use_backend` and MACPO_BACKEND force every operator that has the backend; the others keep their default.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from macpo.kernels import native, triton_support

Backend: TypeAlias = Literal["triton", "native", "torch"]

BACKENDS: tuple[Backend, ...] = ("triton", "native", "torch")

# The backends of each operator. `native` is listed only where bench/bench_native.py shows a gain of
# 1.3x or more over torch's own composition; `torch` is everywhere.
IMPLEMENTED: dict[str, tuple[Backend, ...]] = {
    "linear_logp": ("triton", "native", "torch"),
    "pair_loss": ("triton", "native", "torch"),
    "prefix_attention": ("triton", "torch"),
    "paged_attention": ("triton", "torch"),
    "slot_attention": ("native", "torch"),
    "sample": ("triton", "native", "torch"),
}

_forced: ContextVar[Backend | None] = ContextVar("macpo_backend", default=None)


class BackendError(RuntimeError):
    """The backend that was asked for does not exist here; the message names the operator and the reason."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend that runs and the reason in words."""

    backend: Backend
    why: str


def explain(op: str, device: torch.device | str, backend: str | None = None) -> Choice:
    """The backend that `op` uses for tensors on `device`.

    Args:
        op: name of the public function, a key of `IMPLEMENTED`.
        device: where its tensors live.
        backend: the operator's own `backend=` argument, None for the default rules.

    Raises:
        BackendError: the forced backend is unknown, or is not there for this operator and device.
    """
    kind = torch.device(device).type
    if backend is not None:
        return Choice(_checked(op, kind, backend), f"backend={backend!r} was passed to {op}")
    forced, source = _forced.get(), "use_backend"
    if forced is None and os.environ.get("MACPO_BACKEND"):
        forced, source = _known(os.environ["MACPO_BACKEND"]), "MACPO_BACKEND"
    if forced is not None:
        if forced in IMPLEMENTED[op]:
            return Choice(_checked(op, kind, forced), f"{source} forces {forced}")
        return Choice("torch", f"{source} forces {forced}, which {op} does not have")
    if kind != "cpu":
        why_not = triton_support.why_not(kind)
        if "triton" in IMPLEMENTED[op] and not why_not:
            return Choice("triton", f"{kind.upper()} tensors and Triton is installed")
        return Choice("torch", why_not or f"{op} has no other backend for {kind} tensors")
    if "native" not in IMPLEMENTED[op]:
        return Choice("torch", f"{op} has no other backend for CPU tensors")
    if native.module is None:
        return Choice("torch", native.why_absent)
    return Choice("native", "CPU tensors and the native extension is built")


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Force a backend inside the `with` block for every operator that has it.

    Raises:
        BackendError: the name is unknown, or the native extension is not built.
    """
    token = _forced.set(_known(backend))
    try:
        yield
    finally:
        _forced.reset(token)


def _known(name: str) -> Backend:
    for backend in BACKENDS:
        if name == backend:
            if backend == "native" and native.module is None:
                raise BackendError(f"backend 'native' cannot be used: {native.why_absent}")
            return backend
    raise BackendError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")


def _checked(op: str, kind: str, name: str) -> Backend:
    backend = _known(name)
    if backend not in IMPLEMENTED[op]:
        raise BackendError(f"{op} has no {backend!r} backend in this version; it has: {', '.join(IMPLEMENTED[op])}")
    if backend == "native" and kind != "cpu":
        raise BackendError(f"{op}: backend 'native' is for CPU tensors, these are on {kind}")
    if backend == "triton" and (why_not := triton_support.why_not(kind)):
        raise BackendError(f"{op}: backend 'triton' cannot be used: {why_not}")
    return backend
