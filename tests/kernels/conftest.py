"""Half of the time of Triton's interpreter goes into finding the language's builtins; here they are found once."""

from __future__ import annotations

import inspect
from functools import cache
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

    @cache
    def builtins_of(place: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(place) if tl.core.is_builtin(member)]

    def patch_builtin(place: Any, *rest: Any) -> None:
        names = builtins_of(place)
        if not names or not tl.core.is_builtin(getattr(place, names[0])):  # an outer call has replaced them all
            return
        for name in names:
            member = getattr(place, name)
            if tl.core.is_builtin(member):
                patch_attr(place, name, member, *rest)

    for place in (tl, tl.core, tl.tensor, tl.math):  # while none of them is replaced
        builtins_of(place)
    interpreter._patch_builtin = patch_builtin


if triton_support.INSTALLED and triton_support.interpreted():
    find_builtins_once()
