"""The one place that loads the C++ CPU kernels (`macpo.kernels._native`, built by CMakeLists.txt).

`module` is None where the extension is missing or does not load; `why_absent` says why, and the torch backend runs.
"""

from __future__ import annotations

from types import ModuleType

module: ModuleType | None
why_absent: str
try:
    from macpo.kernels import _native as module  # type: ignore[attr-defined,no-redef]

    why_absent = ""
except ImportError as error:
    module = None
    why_absent = (
        f"the native extension is not built or does not load ({error}); "
        "`pip install .` with a C++17 compiler builds it, until then the torch backend runs"
    )
