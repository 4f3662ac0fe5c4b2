"""Packages from three top-level folders, and the native extension built by CMake.

`pip install .` or `pip install -e .`; MACPO_NATIVE=0 leaves the extension out (the torch backend then runs).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
FOLDERS = {"macpo": "macpo", "macpo.kernels": "kernels", "macpo.engine": "engine", "macpo.recipes": "recipes"}


class CMakeBuild(build_ext):
    """Builds every extension with the project's CMakeLists.txt."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        nanobind = subprocess.check_output([sys.executable, "-m", "nanobind", "--cmake_dir"], text=True).strip()
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            "--fresh",  # an isolated build's paths do not outlive it
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dnanobind_DIR={nanobind}",
        ]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"error: the native extension did not build: {error}. "
                "Fix: install a C++17 compiler, or set MACPO_NATIVE=0 to go without it."
            ) from error
        if not target.exists():
            raise SystemExit(f"error: CMake finished, but {target} is not there")


packages = [
    name if not sub else f"{name}.{sub}" for name, folder in FOLDERS.items() for sub in ["", *find_packages(folder)]
]
native = os.environ.get("MACPO_NATIVE", "1") != "0"
setup(
    packages=packages,
    package_dir=FOLDERS,
    ext_modules=[Extension("macpo.kernels._native", sources=[])] if native else [],
    cmdclass={"build_ext": CMakeBuild},
)
