"""Packages from three top-level folders, and the native extension built by CMake.

`pip install .` or `pip install -e .`. Where the extension does not build, torch runs instead and one line says so;
MACPO_NATIVE=1 makes that an error, MACPO_NATIVE=0 leaves the extension out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
FOLDERS = {"macpo": "macpo", "macpo.kernels": "kernels", "macpo.engine": "engine", "macpo.recipes": "recipes"}
NATIVE = os.environ.get("MACPO_NATIVE", "")
if NATIVE not in ("", "0", "1"):
    raise SystemExit(f"error: MACPO_NATIVE is {NATIVE!r}. Fix: set it to 0 or 1, or not at all.")


class CMakeBuild(build_ext):
    """Builds every extension with the project's CMakeLists.txt; setuptools only warns where an optional one fails."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self._cmake(target.parent)
        except (OSError, subprocess.CalledProcessError) as error:
            if self.editable_mode:  # an older build would be loaded in its place
                (ROOT / "kernels" / target.name).unlink(missing_ok=True)
            if isinstance(error, subprocess.CalledProcessError):
                reason = f"{' '.join(map(str, error.cmd[:3]))} ended with code {error.returncode}"
            else:
                reason = str(error)
            raise CompileError(
                f"{reason}. On CPUs torch runs instead, which takes 1.3 times as long or more for each "
                "operator that has a native kernel. Fix: install a C++17 compiler and install again."
            ) from error
        if not target.exists():
            raise SystemExit(f"error: CMake finished, but {target} is not there")

    def _cmake(self, output: Path) -> None:
        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        nanobind = subprocess.check_output([sys.executable, "-m", "nanobind", "--cmake_dir"], text=True).strip()
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            "--fresh",  # an isolated build's paths do not outlive it
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dnanobind_DIR={nanobind}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


extension = Extension("macpo.kernels._native", sources=[], optional=NATIVE != "1")
setup(
    packages=[
        name if not sub else f"{name}.{sub}" for name, folder in FOLDERS.items() for sub in ["", *find_packages(folder)]
    ],
    package_dir=FOLDERS,
    ext_modules=[] if NATIVE == "0" else [extension],
    cmdclass={"build_ext": CMakeBuild},
)
