"""What the machine has and lacks, and an environment in which the checkout runs without being installed.

Standard library only: the suite starts at once, holds no GPU memory, and says so where torch itself is missing.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Distributions that a part or a peer may use.
PACKAGES = (
    *("torch", "triton", "transformers", "peft", "tokenizers", "pydantic", "pyyaml", "datasets", "scipy", "rich"),
    *("jinja2", "matplotlib", "pytest", "hypothesis", "trl", "liger-kernel", "cut-cross-entropy", "flash-attn"),
    "bitsandbytes",
)
NEEDED = ("torch", "transformers", "peft", "pydantic")  # without these no part runs
SOURCES = ("kernels", "engine", "macpo", "bench", "tests")
LINKS = {"kernels": "kernels", "engine": "engine", "recipes": "recipes"}  # name in the package macpo -> folder


def lacking(names: tuple[str, ...]) -> list[str]:
    """Return the modules that cannot be imported here."""
    return [name for name in names if find_spec(name) is None]


def has_cuda() -> bool:
    """Ask a process of its own, so that this one holds nothing of a GPU."""
    code = "import torch; raise SystemExit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def describe() -> dict[str, Any]:
    """Return versions, what is missing, and the state of the GPU, for the archive."""
    versions, missing = {"python": platform.python_version()}, []
    for distribution in PACKAGES:
        try:
            versions[distribution] = version(distribution)
        except PackageNotFoundError:
            missing.append(distribution)
    if not list((ROOT / "kernels").glob("_native*.so")):
        missing.append("native extension")
    return {"versions": versions, "missing": missing, "cpus": os.cpu_count(), "gpu": _nvidia_smi(), "code": code()}


def _nvidia_smi() -> str:
    fields = "name,driver_version,clocks.sm,power.draw,temperature.gpu,memory.used"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def code() -> str:
    """Return a digest of all Python and C++ sources: results of other code are not taken over."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".hpp"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of the parts.

    Where the package is not installed, `folder` gets a tree of links in which kernels/ and engine/ lie inside macpo/,
    as setup.py installs them. PYTHONPATH of the caller stays: what the machine lacks can be given there.
    """
    paths = [str(ROOT)]
    if not _installed():
        package = folder / "macpo"
        package.mkdir()
        for path in (ROOT / "macpo").iterdir():
            (package / path.name).symlink_to(path)
        for name, source in LINKS.items():
            (package / name).symlink_to(ROOT / source)
        paths.insert(0, str(folder))
    if before := os.environ.get("PYTHONPATH"):
        paths.append(before)
    changes = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **changes}


def _installed() -> bool:
    code = "from importlib.util import find_spec; print(find_spec('macpo.kernels').origin)"
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    return done.returncode == 0 and Path(done.stdout.strip()).resolve().is_relative_to(ROOT)
