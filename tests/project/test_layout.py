"""The shape of the code: who may import whom, what folders and files may hold, and the tree in CONTRIBUTING.md."""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("kernels", "engine", "macpo")  # imported as macpo.kernels, macpo.engine and macpo

# Who may import whom: a folder, or a module directly in engine/ or macpo/, and what it may import besides itself.
# Everything goes down: macpo -> engine -> kernels, and each table has the lowest floor first.
GROUND = (
    "config connection console errors faults files foreign hardware model_folders opening paths processes progress "
    "removal unpacking"
)
MAY_IMPORT = {
    "kernels": {"kernels": ""},
    "engine": {
        "__init__": "",
        "errors": "",
        "faults": "errors",
        "unpacking": "errors",
        "opening": "errors",
        "files": "errors faults opening unpacking",
        "foreign": "errors",
        "model_folders": "errors files foreign opening paths",
        "removal": "errors faults files",
        "console": "errors faults files processes",
        "connection": "errors",
        "paths": "errors",
        "config": "errors connection paths",
        "hardware": "",
        "processes": "errors",
        "progress": "console",
        "recipe": GROUND,
        "distributed": GROUND,
        "data": f"{GROUND} distributed kernels",  # distributed: a batch is divided among ranks; kernels: segments
        "run": f"{GROUND} distributed",
        "models": f"{GROUND} distributed data kernels",
        "scoring": f"{GROUND} distributed data models",
        # slots and pool are two runners inside generation: each knows the requests and sequences, not the other.
        "generation/slots": f"{GROUND} generation kernels",
        "generation/pool": f"{GROUND} distributed generation kernels",
        "generation": f"{GROUND} distributed data models generation/slots generation/pool kernels",
        "training": f"{GROUND} distributed data models scoring run kernels",  # run: keys of cached reference log-probs
        "planning": f"{GROUND} distributed data models scoring training kernels",
        "train": f"{GROUND} recipe distributed",
    },
    "macpo": {
        "__init__": "engine kernels commands notebook",
        "data": "engine",
        "demo_world": "engine",
        "evaluation": "engine",
        "integrations": "engine kernels",
        "judging/settings": "engine",
        "judging": "engine evaluation judging/settings",
        "data_settings": "engine demo_world",
        "agent_settings": "engine data_settings",
        "scorer_settings": "engine data_settings",
        "config": "engine data evaluation demo_world data_settings agent_settings judging/settings scorer_settings",
        "method": "engine data evaluation demo_world data_settings agent_settings scorer_settings config",
        # kernels: losses
        "standalone": "engine kernels data evaluation demo_world data_settings agent_settings scorer_settings config "
        "method",
        "iteration": "engine config method",
        "methods": "engine judging agent_settings config method iteration",
        "comparison": "engine demo_world evaluation config method methods",
        "report": "engine demo_world evaluation judging comparison",
        "annotation": "engine evaluation report",
        "bundled": "",
        "recipe_kinds": "engine bundled config method methods standalone",
        # kernels: `macpo env` says which of their backends run
        "commands": "engine kernels bundled data evaluation demo_world judging judging/settings report annotation "
        "agent_settings scorer_settings config method methods comparison standalone recipe_kinds",
        "notebook": "engine bundled evaluation report recipe_kinds commands",
        "arguments": "engine bundled",
        "cli": "engine report config recipe_kinds commands arguments",
        "__main__": "cli",
    },
}

MODULES = sorted(path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MAX_LINES = 400
MAX_MODULES = 20
MAX_PARAMETERS, MAX_LONG_SIGNATURES = 7, 7
MAX_TREE_LINES = 40
TREE_PAGE = ROOT / "CONTRIBUTING.md"
SOURCES = [
    path
    for folder in (*PACKAGES, "tests", "bench", "recipes", "examples")
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


def ours(path: Path) -> list[tuple[int, str]]:
    """Line and path ("engine/data/pack") of every import of ours in a file; the version is everyone's to read."""
    found = [(line, target) for line, target in imports(ast.parse(path.read_text())) if target.startswith("macpo")]
    return [(line, location(target)) for line, target in found if target != "macpo.__version__"]


def location(target: str) -> str:
    """ "macpo.engine.data.pack.Pack" -> "engine/data/pack/Pack"."""
    parts = target.split(".")
    return "/".join(parts[1:] if parts[1:] and parts[1] in ("engine", "kernels") else parts)


def floor(path: str) -> tuple[str, str]:
    """Package and longest key of its table that holds a module; the key is "" where the table does not know it."""
    package, _, inside = path.partition("/")
    if package == "kernels":
        return package, package
    keys = [key for key in MAY_IMPORT[package] if inside == key or inside.startswith(f"{key}/")]
    return package, max(keys, key=len, default="")


def wrong_imports(path: Path) -> Iterator[str]:
    package, own = floor(path.relative_to(ROOT).with_suffix("").as_posix())
    if not own:
        yield f"MAY_IMPORT does not say what {name(path)} may import"
        return
    allowed = MAY_IMPORT[package][own].split()
    for line, target in imports(ast.parse(path.read_text())):
        if target.startswith("."):
            yield f"{name(path)}:{line}: relative import"
    for line, target in ours(path):
        other, key = floor(target)
        if not (key in (own, *allowed) if other == package else other in allowed):
            yield f"{name(path)}:{line}: {package}/{own} must not import {target}"


def test_imports_go_down_and_are_absolute():
    assert not [wrong for path in MODULES for wrong in wrong_imports(path)]


def test_no_modules_import_each_other_in_a_circle():
    """Imports inside functions and under TYPE_CHECKING count too."""
    modules = {name(path.parent if path.name == "__init__.py" else path.with_suffix("")): path for path in MODULES}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        targets = ({target, target.rpartition("/")[0]} & modules.keys() for _, target in ours(path))
        graph[module] = {max(found, key=len) for found in targets if found} - {module}
    assert graph["macpo/cli"] and graph["engine/training/trainer"]
    TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_the_import_rule_is_seen_inside_functions_too():
    code = "def f():\n    from macpo import iteration\n    import macpo.engine.training.trainer\nfrom . import x"
    found = [target for _, target in imports(ast.parse(code))]
    assert found == [".x", "macpo.iteration", "macpo.engine.training.trainer"]
    assert [floor(location(target)) for target in found[1:]] == [("macpo", "iteration"), ("engine", "training")]
    assert floor("engine/generation/pool/runner") == ("engine", "generation/pool")
    assert floor("macpo/unknown") == ("macpo", "")


def test_no_module_bears_a_standard_library_name():
    """torchrun puts the script's folder first on the path: engine/queue.py would replace `queue` for everyone."""
    names = {path: path.parent.name if path.name == "__init__.py" else path.stem for path in MODULES}
    assert not [name(path) for path, stem in names.items() if stem in sys.stdlib_module_names]


def test_every_folder_with_modules_is_a_package():
    assert not [name(path.parent) for path in MODULES if not (path.parent / "__init__.py").exists()]


def test_files_are_short():
    lengths = {name(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert len(lengths) > 300
    assert not {path: length for path, length in lengths.items() if length > MAX_LINES}, "split these"


def test_folders_are_small():
    folders = Counter(name(path.parent) for top in (*PACKAGES, "bench", "tests") for path in (ROOT / top).rglob("*.py"))
    assert not {folder: count for folder, count in folders.items() if count > MAX_MODULES}


def test_the_entry_file_is_an_entry():
    assert len((ROOT / "engine" / "train.py").read_text().splitlines()) < 100


def long_signatures(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Name and number of parameters, `self` not counted, of functions that have too many."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            names += [each.arg for each in (node.args.vararg, node.args.kwarg) if each]
            count = len([each for each in names if each not in ("self", "cls")])
            if count > MAX_PARAMETERS:
                yield node.name, count


def test_few_functions_have_many_parameters():
    """In the engine, the method and the benchmarks; operators and their tests take as many as the mathematics has."""
    files = (path for top in ("engine", "macpo", "bench") for path in sorted((ROOT / top).rglob("*.py")))
    found = [(name(path), *each) for path in files for each in long_signatures(ast.parse(path.read_text()))]
    assert len(found) <= MAX_LONG_SIGNATURES, found
    assert [
        *long_signatures(ast.parse("def f(self, a, b, c, d, e, f, g): ...\ndef g(a, b, c, d, e, f, *g, **h): ..."))
    ] == [("g", 8)]


def test_no_command_takes_an_abbreviated_option():
    """`macpo demo --seed 3` once was `--seeds 3`: 215 stages instead of 60."""
    calls = re.compile(r"\bArgumentParser\((?!\s*allow_abbrev=False)")
    files = [*MODULES, *TESTS, *sorted((ROOT / "bench").rglob("*.py"))]
    assert not [name(path) for path in files if path != Path(__file__) and calls.search(path.read_text())]
    assert calls.search("argparse.ArgumentParser(description='x')")


def test_stages_read_their_settings_by_attribute():
    """`ctx.settings["name"]` would hide a misspelt or missing setting until the stage runs."""
    assert not [name(path) for path in MODULES if "ctx.settings[" in path.read_text()]


def test_each_test_module_has_its_own_name():
    """Test folders are no packages, so that pytest imports every module by its bare name; helpers are on that path."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_tests_import_only_helpers():
    shared = ("helpers", "operators", "torture")
    loose = [path for path in TESTS if path.parent.name not in shared and not re.match(r"test_|conftest\.", path.name)]
    assert not loose, "what tests share lies in tests/helpers, what tortures runs and loaders in tests/torture"
    stems = {path.stem for path in TESTS if path.stem.startswith("test_")}
    for path in TESTS:
        roots = {target.split(".")[0] for _, target in imports(ast.parse(path.read_text()))}
        assert not roots & {*stems, "tests", "conftest"}, f"{name(path)} imports another test"


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


OWN_FILES = {"macpo/data/spool.py": "marshal"}
"""Modules that write and read back a nameless file of their own process, which nothing else can have written to."""


def test_nothing_reads_or_writes_pickle():
    files = [*MODULES, *sorted((ROOT / "bench").rglob("*.py"))]
    found = [(name(path), each) for path in files for each in unsafe(ast.parse(path.read_text()))]
    assert not [(file, each) for file, each in found if each.rpartition(": ")[2] != OWN_FILES.get(file)]


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


# --- The tree of CONTRIBUTING.md ---------------------------------------------------------------------------------
# The rule: under the first heading that holds the word "Layout", the first fenced block is the tree. A line is
#     <2 spaces a level><names separated by blanks>  # what it is
# A name that ends with "/" is a folder; deeper lines belong to the last line above that is less deep and whose first
# name is a folder. Names are relative to that folder and may hold slashes. Blank lines are free.
# Every name must exist. Named must be: every folder of the repository, every module directly in kernels/, engine/ and
# macpo/ (`__init__.py` apart), and every folder of modules or the folder that it lies in.

IGNORED = {"build", "dist", "runs", "__pycache__", "node_modules"}


def annotated_tree(text: str) -> list[str]:
    """Paths named in a page's layout block, folders with their slash."""
    block = re.search(r"^#+[^\n]*\bLayout\b.*?^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block, "there is no fenced block under a heading with the word Layout"
    lines = block[1].splitlines()
    assert len(lines) <= MAX_TREE_LINES, f"the tree has {len(lines)} lines"
    paths: list[str] = []
    folders: dict[int, str] = {-1: ""}
    for line in lines:
        entry = re.split(r"\s#(?:\s|$)", line)[0]
        if not entry.strip():
            continue
        indent = len(entry) - len(entry.lstrip(" "))
        assert indent % 2 == 0, f"odd indent in {line!r}"
        level = indent // 2
        assert level - 1 in folders, f"{line!r} is not below a folder"
        names = [folders[level - 1] + part for part in entry.split()]
        paths += names
        folders = {depth: folder for depth, folder in folders.items() if depth < level}
        if names[0].endswith("/"):
            folders[level] = names[0]
    return paths


def test_the_tree_parser():
    block = "a/  # one\n  b.py c.py   # two\n  d/\n    e.py\n\nf.md"
    text = f"# a\n```\nno/\n```\n## The Layout\ntext\n```text\n{block}\n```\n"
    assert annotated_tree(text) == ["a/", "a/b.py", "a/c.py", "a/d/", "a/d/e.py", "f.md"]
    for bad in ("a/\n   b.py", "a.py\n  b.py", "a/\n    b.py"):
        with pytest.raises(AssertionError):
            annotated_tree(f"# Layout\n```\n{bad}\n```\n")


def test_the_tree_names_only_what_exists():
    for path in annotated_tree(TREE_PAGE.read_text()):
        there = (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file()
        assert there, f"the layout names {path}, which does not exist"


def test_the_tree_is_complete():
    named = set(annotated_tree(TREE_PAGE.read_text()))
    tops = (path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))
    wanted = {f"{top.name}/" for top in tops if top.name not in IGNORED and top.suffix != ".egg-info"}
    wanted |= {name(path) for path in MODULES if path.parent.parent == ROOT and path.name != "__init__.py"}
    sources = (path for path in SOURCES if path.suffix != ".yaml")
    wanted |= {f"{name(path.parent)}/" for path in sources if f"{name(path.parent.parent)}/" not in named}
    assert not wanted - named, f"the layout does not name {sorted(wanted - named)}"
