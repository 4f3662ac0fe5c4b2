"""MACPO: weak-to-strong alignment by multi-agent contrastive preference optimisation.

The method is arXiv 2410.07672 (Lyu et al., ICLR 2025). Three packages, each usable alone:
`macpo.kernels` (operators), `macpo.engine` (training, generation, scoring), `macpo` (the method).

The names here are what a notebook needs (docs/python.md); each is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from macpo.commands.policies.opening import load_policy
    from macpo.commands.policies.policy import Policy, score
    from macpo.engine.errors import MacpoError
    from macpo.engine.generation import Generator, SamplingParams
    from macpo.kernels import pair_loss
    from macpo.notebook.results import Run
    from macpo.notebook.running import run

__version__ = "0.1.0"
__all__ = [
    "Generator",
    "MacpoError",
    "Policy",
    "Run",
    "SamplingParams",
    "__version__",
    "load_policy",
    "pair_loss",
    "run",
    "score",
]
_HOMES = {
    "Generator": "macpo.engine.generation",
    "MacpoError": "macpo.engine.errors",
    "Policy": "macpo.commands.policies.policy",
    "Run": "macpo.notebook.results",
    "SamplingParams": "macpo.engine.generation",
    "load_policy": "macpo.commands.policies.opening",
    "pair_loss": "macpo.kernels",
    "run": "macpo.notebook.running",
    "score": "macpo.commands.policies.policy",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
