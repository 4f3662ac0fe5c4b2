"""The shape of the code: who may import whom, what files may hold, and the README's annotated tree."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Import name of each top-level folder, and what it may import of ours: macpo -> engine -> kernels, never back.
PACKAGES = {"kernels": "macpo.kernels", "engine": "macpo.engine", "macpo": "macpo"}
MAY_IMPORT = {
    "kernels": ("macpo.kernels",),
    "engine": ("macpo.kernels", "macpo.engine"),
    "macpo": ("macpo",),
}
MODULES = sorted(path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py"))
MAX_LINES = 500
SOURCES = [
    path
    for folder in (*PACKAGES, "tests", "bench", "recipes")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".py", ".cpp", ".hpp", ".yaml"}
]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported anywhere in a module, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (f"{node.module}." if node.module else "")
            for alias in node.names:
                yield node.lineno, base + alias.name


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_go_down_and_are_absolute(path):
    allowed = MAY_IMPORT[path.relative_to(ROOT).parts[0]]
    for line, target in imports(ast.parse(path.read_text())):
        where = f"{name(path)}:{line}"
        assert not target.startswith("."), f"{where}: relative import"
        if target == "macpo" or target.startswith("macpo."):
            # The version belongs to the distribution, so everyone may ask for it.
            fine = target == "macpo.__version__" or any(target == a or target.startswith(a + ".") for a in allowed)
            assert fine, f"{where}: {path.relative_to(ROOT).parts[0]}/ must not import {target}"


def test_the_import_rule_is_seen_inside_functions_too():
    code = "def f():\n    from macpo import agents\n    import macpo.engine.training.trainer\nfrom . import x"
    assert [target for _, target in imports(ast.parse(code))] == [
        ".x",
        "macpo.method.answers",
        "macpo.engine.training.trainer",
    ]


def test_no_module_bears_a_standard_library_name():
    """torchrun puts the script's folder first on the path: engine/queue.py would replace `queue` for everyone."""
    names = {path: path.parent.name if path.name == "__init__.py" else path.stem for path in MODULES}
    assert not [name(path) for path, stem in names.items() if stem in sys.stdlib_module_names]


def test_every_folder_with_modules_is_a_package():
    assert not [name(path.parent) for path in MODULES if not (path.parent / "__init__.py").exists()]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_files_are_short(path):
    num_lines = len(path.read_text().splitlines())
    assert num_lines < MAX_LINES, f"{name(path)} has {num_lines} lines: split it"


def test_the_entry_file_is_an_entry():
    assert len((ROOT / "engine" / "train.py").read_text().splitlines()) < 100


UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {
    ("torch", "load"),
    ("torch", "save"),
    ("dist", "all_gather_object"),  # these send pickles
    ("dist", "gather_object"),
    ("dist", "broadcast_object_list"),
    ("dist", "scatter_object_list"),
}


def unsafe(tree: ast.AST) -> list[str]:
    """What in a module reads or writes pickles."""
    found = [f"line {line}: {target}" for line, target in imports(tree) if target.split(".")[0] in UNSAFE_MODULES]
    found += [
        f"line {line}: {target}" for line, target in imports(tree) if target.startswith("torch.distributed.checkpoint")
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
            owner = "dist" if owner == "distributed" else owner
            if (owner, node.attr) in UNSAFE_CALLS:
                found.append(f"line {node.lineno}: {owner}.{node.attr}")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append(f"line {node.value.lineno}: allow_pickle")
    return found


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "bench").glob("*.py"))], ids=name)
def test_nothing_reads_or_writes_pickle(path):
    assert not unsafe(ast.parse(path.read_text()))


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "import torch\ntorch.load('x')",
        "torch.save({}, 'x')",
        "np.load(f, allow_pickle=True)",
        "import torch.distributed.checkpoint as dcp",
        "from torch.distributed import checkpoint",
        "torch.distributed.all_gather_object(a, b)",
    ],
)
def test_the_pickle_rule_sees(code):
    assert unsafe(ast.parse(code))


# --- README ------------------------------------------------------------------------------------------------------
# The rule: under the first heading that holds the word "Layout", the first fenced block is the tree. A line is
#     <2 spaces a level><names separated by blanks>  # what it is
# A name that ends with "/" is a folder; deeper lines belong to the last line above that is less deep and whose first
# name is a folder. Names are relative to that folder and may hold slashes. Blank lines are free.
# Every name must exist. Every folder of the repository, and every module and folder directly in kernels/, engine/ and
# macpo/ (`__init__.py` apart), must be named.

IGNORED = {"build", "dist", "runs", "__pycache__", "node_modules"}


def readme_tree(text: str) -> list[str]:
    """Paths named in the README's layout block, folders with their slash."""
    block = re.search(r"^#+[^\n]*\bLayout\b.*?^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block, "README.md has no fenced block under a heading with the word Layout"
    paths: list[str] = []
    folders: dict[int, str] = {-1: ""}
    for line in block[1].splitlines():
        entry = re.split(r"\s#(?:\s|$)", line)[0]
        if not entry.strip():
            continue
        indent = len(entry) - len(entry.lstrip(" "))
        assert indent % 2 == 0, f"README tree: odd indent in {line!r}"
        level = indent // 2
        assert level - 1 in folders, f"README tree: {line!r} is not below a folder"
        names = [folders[level - 1] + part for part in entry.split()]
        paths += names
        folders = {depth: folder for depth, folder in folders.items() if depth < level}
        if names[0].endswith("/"):
            folders[level] = names[0]
    return paths


def test_the_tree_parser():
    block = "a/  # one\n  b.py c.py   # two\n  d/\n    e.py\n\nf.md"
    text = f"# a\n```\nno/\n```\n## The Layout\ntext\n```text\n{block}\n```\n"
    assert readme_tree(text) == ["a/", "a/b.py", "a/c.py", "a/d/", "a/d/e.py", "f.md"]
    for bad in ("a/\n   b.py", "a.py\n  b.py", "a/\n    b.py"):
        with pytest.raises(AssertionError):
            readme_tree(f"# Layout\n```\n{bad}\n```\n")


def test_readme_tree_names_only_what_exists():
    for path in readme_tree((ROOT / "README.md").read_text()):
        there = (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file()
        assert there, f"README.md's layout names {path}, which does not exist"


def test_readme_tree_is_complete():
    named = set(readme_tree((ROOT / "README.md").read_text()))
    wanted = set()
    for folder in sorted(ROOT.iterdir()):
        if folder.is_dir() and not folder.name.startswith(".") and folder.name not in IGNORED:
            wanted.add(folder.name + "/")
    wanted = {folder for folder in wanted if not folder.endswith(".egg-info/")}
    for top in PACKAGES:
        for child in sorted((ROOT / top).iterdir()):
            if child.is_dir() and child.name not in IGNORED:
                wanted.add(f"{top}/{child.name}/")
            elif child.suffix == ".py" and child.name != "__init__.py":
                wanted.add(f"{top}/{child.name}")
    assert not wanted - named, f"README.md's layout does not name {sorted(wanted - named)}"
