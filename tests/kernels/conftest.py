"""Half of the time of Triton's interpreter goes into finding the language's builtins; here they are found once."""

from __future__ import annotations

import inspect
from typing import Any

from macpo.kernels import triton_support


def find_builtins_once() -> None:
    """Replace the interpreter's search, made anew by every call of a jit function, by one before the first call.

    What it does with the builtins that it finds stays its own.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch_attr = getattr(interpreter, "_patch_attr", None)
    if patch_attr is None or not hasattr(interpreter, "_patch_builtin"):  # another version searches in its own way
        return
    places = [tl, tl.core, tl.tensor, tl.math, getattr(tl.core, "tensor_descriptor_base", tl.tensor)]
    names = {id(p): [name for name, member in inspect.getmembers(p) if tl.core.is_builtin(member)] for p in places}

    def patch_builtin(place: Any, *rest: Any) -> None:
        for name in names[id(place)]:
            member = getattr(place, name)
            if tl.core.is_builtin(member):  # those that an outer call has replaced are none
                patch_attr(place, name, member, *rest)

    interpreter._patch_builtin = patch_builtin


if triton_support.INSTALLED and triton_support.interpreted():
    find_builtins_once()
