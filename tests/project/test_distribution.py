"""What is published: the archive holds the repository, the wheel its packages' files, and neither needs a compiler.

`.ci/wheel` builds both and tries them in empty folders.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools.command.egg_info import FileList

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"macpo": "macpo", "kernels": "macpo/kernels", "engine": "macpo/engine", "recipes": "macpo/recipes"}
"""Where a folder of the repository is installed."""
NOT_INSTALLED = "kernels/csrc/"
"""What the extension is compiled from."""
ONLY_IN_THE_REPOSITORY: set[str] = set()
"""Files that the source archive leaves out."""


@pytest.fixture(scope="module")
def repository() -> set[str]:
    """Every file that git has or would take."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository: this is an unpacked source archive")
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).exists()}


def setup(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Call setup.py on a machine on which nothing is found, no compiler either."""
    env = {**os.environ, "PATH": "", "MACPO_NATIVE": "", **environment}
    return subprocess.run([sys.executable, "setup.py", *words], cwd=ROOT, env=env, capture_output=True, text=True)


def test_the_source_archive_holds_the_repository(repository: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    archive = FileList()
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        if line and not line.startswith("#"):
            archive.process_template_line(line)
    assert {os.path.normpath(name) for name in archive.files} == repository - ONLY_IN_THE_REPOSITORY


def test_the_wheel_holds_every_file_of_the_packages(repository: set[str], tmp_path: Path) -> None:
    done = setup("build_py", "--build-lib", str(tmp_path))
    assert done.returncode == 0, done.stderr
    wheel = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    parts = (name.partition("/") for name in repository if not name.startswith(NOT_INSTALLED))
    assert wheel == {f"{FOLDERS[folder]}/{rest}" for folder, _, rest in parts if folder in FOLDERS}


def built(tmp_path: Path, native: str) -> subprocess.CompletedProcess[str]:
    folders = ("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    return setup("build_ext", *folders, MACPO_NATIVE=native)


def test_without_a_compiler_the_extension_is_left_out_and_a_line_says_what_that_costs(tmp_path: Path) -> None:
    done = built(tmp_path, "")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))
    last = done.stderr.strip().splitlines()[-1]
    assert "_native" in last and "1.3 times as long" in last and "install a C++17 compiler" in last


def test_an_extension_that_was_asked_for_must_build(tmp_path: Path) -> None:
    done = built(tmp_path, "1")
    assert done.returncode != 0 and "install a C++17 compiler" in done.stderr


@pytest.mark.parametrize(("native", "said"), [("0", ""), ("yes", "error: MACPO_NATIVE is 'yes'")])
def test_an_extension_that_is_not_wanted_is_not_tried(tmp_path: Path, native: str, said: str) -> None:
    done = built(tmp_path, native)
    assert bool(done.returncode) == bool(said)
    assert said in done.stderr and "C++17" not in done.stderr
