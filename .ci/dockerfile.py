"""Read a Dockerfile, and run its steps in virtual environments where no Docker runs.

    python .ci/dockerfile.py FOLDER [TORCH_FLAGS=...]

Every stage gets a folder in FOLDER in place of its root, and an environment in place of its Python. Steps for root
(packages of the system, users) are named and left out, and so is everything that only Docker does.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOR_ROOT = ("apt-get ", "useradd ")


@dataclass(frozen=True)
class Step:
    """An instruction and its text, continuation lines joined; `stage` is the name after AS, "" before the first."""

    stage: str
    word: str
    text: str


def steps(source: str) -> list[Step]:
    """All instructions of a Dockerfile. Raises ValueError for a line that is none."""
    found: list[Step] = []
    stage = ""
    lines = [line for line in source.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        match = re.fullmatch(r"(ARG|CMD|COPY|ENTRYPOINT|ENV|FROM|RUN|USER|WORKDIR) +(.+)", line)
        if match is None:
            raise ValueError(f"not an instruction: {line}")
        word, text = match[1], " ".join(match[2].split())
        if word == "FROM":
            stage = text.rpartition(" AS ")[2]
        found.append(Step(stage, word, text))
    return found


def run(source: str, folder: Path, environment: Mapping[str, str]) -> Path:
    """Run the steps; returns the folder of the last stage's commands. Raises CalledProcessError."""
    roots: dict[str, Path] = {}
    here = Path("/")
    for step in steps(source):
        if step.word == "FROM":
            base = step.text.partition(" ")[0]
            roots[step.stage] = roots.get(base, folder / step.stage)
            if base not in roots:
                subprocess.run([sys.executable, "-m", "venv", roots[step.stage] / "usr"], check=True)
            continue
        if not step.stage:
            continue
        root = roots[step.stage]
        if step.word == "WORKDIR":
            here = root / step.text.lstrip("/")
            here.mkdir(parents=True, exist_ok=True)
        elif step.word == "COPY":
            copy(step.text.split(), roots, root, here)
        elif step.word == "RUN" and step.text.startswith(FOR_ROOT):
            print(f"left out, for root: {step.text}", flush=True)
        elif step.word == "RUN":
            command = re.sub(r"(?<![\w./])/(?=[a-z])", f"{root}/", step.text)
            print(f"{step.stage}: {command}", flush=True)
            path = f"{root}/usr/bin:{os.environ['PATH']}"
            subprocess.run(["sh", "-c", command], cwd=here, env={**os.environ, **environment, "PATH": path}, check=True)
    return root / "usr" / "bin"


def copy(words: list[str], roots: Mapping[str, Path], root: Path, here: Path) -> None:
    """COPY [--from=STAGE] SOURCE TARGET; the context is what git holds."""
    if words[0].startswith("--from="):
        shutil.copytree(roots[words[0].removeprefix("--from=")] / words[1].lstrip("/"), root / words[2].lstrip("/"))
        return
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).split("\0"):
        if name and words[0] in (".", name) and (ROOT / name).exists():
            target = here / words[1] / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[2:])
    print(run((ROOT / "Dockerfile").read_text(), Path(sys.argv[1]).resolve(), given) / "macpo")
