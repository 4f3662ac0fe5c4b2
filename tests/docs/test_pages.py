"""Every code block of every page is run here, by a test of its own page, or says on the page why it is not.

A page that no other test claims is followed from its first block to its last, in an empty folder or in one that holds
what `PREPARED` puts there; see tests/helpers/pages.py.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT
from pages import Reader, blocks_of, known_settings, not_printed, settings_of
from standalone_runs import make_base

from macpo import bundled
from macpo.commands.tooling import reference
from macpo.method.steps import Steps
from macpo.recipe_kinds import KINDS

PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [*(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "README.md"]
)
SMALLER = {
    r"(teacher|student)_documents: \d+": r"\1_documents: 80",
    r"student_prompts: \d+": "student_prompts: 20",
    r"test_prompts: \d+": "test_prompts: 12",
    r"hidden_size: \d+": "hidden_size: 16",
    r"num_layers: \d+": "num_layers: 1",
    r"max_new_tokens: \d+": "max_new_tokens: 12",
    r"^iterations: \d+": "iterations: 1",
    r"jobs: \d+": "jobs: 1",
    r"epochs: \d+": "epochs: 1",
    r"own_topics: 3": "teacher_pairs: 24",
}
"""What makes the package's recipes, as the pages run them, a matter of seconds."""


def claimed() -> dict[str, list[str]]:
    """Page -> the test modules that name it in a call of `blocks_for` or `named_blocks`."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("blocks_for", "named_blocks"):
                assert isinstance(node.args[0], ast.Constant), f"{path.name}:{node.lineno}: name the page itself"
                found.setdefault(str(node.args[0].value), []).append(path.name)
    return found


CLAIMED = claimed()


def two_models(folder: Path) -> None:
    """Pairs of one's own, a weak and a strong model with tokenizers, all tiny."""
    rows = [
        {"prompt": f"how do i sit {i} ?", "chosen": f"sure {i} , take care .", "rejected": "go away ."}
        for i in range(200)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_base(folder / "weak", context=128)
    make_base(folder / "strong", hidden_size=32, context=128)


PREPARED: dict[str, Callable[[Path], None]] = {"docs/data.md": two_models, "docs/models.md": two_models}


@pytest.fixture
def small_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(bundled.folder(), tmp_path / "recipes")
    for path in (tmp_path / "recipes").glob("*.yaml"):
        text = path.read_text()
        for pattern, replacement in SMALLER.items():
            text = re.sub(pattern, replacement, text, flags=re.M)
        path.write_text(text)
    monkeypatch.setattr(bundled, "folder", lambda: tmp_path / "recipes")


@pytest.mark.parametrize("page", [page for page in PAGES if page not in CLAIMED])
def test_what_a_page_says_works(
    page: str, tmp_path: Path, small_recipes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    folder = tmp_path / "reader"
    folder.mkdir()
    monkeypatch.chdir(folder)
    PREPARED.get(page, lambda _: None)(folder)
    Reader(page).follow()


def test_pages_that_tests_name_are_there() -> None:
    assert not CLAIMED.keys() - set(PAGES)


def test_languages_are_those_that_a_reader_can_follow() -> None:
    known = {"sh", "python", "yaml", "text"}
    blocks = [(page, block) for page in PAGES for block in blocks_of(page)]
    assert not [
        f"{page}:{block.line}: {block.language!r}"
        for page, block in blocks
        if not block.title and block.language not in known
    ]


def test_a_block_that_does_not_work_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def follow(text: str) -> Any:
        (tmp_path / "page.md").write_text(text)
        return Reader(str(tmp_path / "page.md")).follow()

    follow('```sh title="a.sh"\necho 12 of 300 stages\n```\n\n```sh\nbash a.sh\n```\n\n```text\n7 of … stages\n```\n')
    follow("<!-- not run: it needs a GPU -->\n```sh\nfalse\n```\n")
    follow("```yaml\nteachers:\n  - {name: a, tuning: {rank: 4}}\nsampling: {top_k: 0}\n```\n")
    for wrong, why in (
        ("```sh\nfalse\n```\n", "page.md:1: false"),
        ("```sh\nmacpo status nowhere\n```\n", "there is no recipe"),
        ("```sh\necho a\n```\n\n```text\nb\n```\n", "not printed"),
        ("```yaml\nsampling: {topk: 0}\n```\n", "sampling.topk"),
        ("```\na\n```\n", "without a language"),
        ("```python\nassert False, 'no'\n```\n", "no"),
    ):
        with pytest.raises(AssertionError, match=re.escape(why)):
            follow(wrong)


def test_numbers_are_free_and_words_are_not() -> None:
    assert not not_printed("student  0.75  +0.01 …\n", ["a", "student   0.746  0.756  -0.006 up"])
    assert not_printed("student 0.75\nteacher 1\n", ["student 0.7", "teachers 2"]) == ["teacher 1"]


def test_the_page_of_the_method_names_the_steps_that_there_are() -> None:
    rows = re.findall(r"^\| [^|]+ \| (`[^|]+) \|", (ROOT / "docs/how-it-works/method.md").read_text(), flags=re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)} - {"Steps"}
    assert len(named) > 5 and all(callable(getattr(Steps, name)) for name in named)


# --- docs/recipe-reference ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_todays(kind: str) -> None:
    """`macpo schema --markdown docs/recipe-reference` writes it anew."""
    assert (ROOT / "docs" / "recipe-reference" / f"{kind}.md").read_text() == reference.pages()[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_has_one_anchor_and_a_meaning(kind: str) -> None:
    page = reference.pages()[kind]
    anchors = re.findall(r'<a id="([^"]+)"></a>', page)
    assert len(anchors) == len(set(anchors))
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ") and "`" in line]
    assert rows and not [row for row in rows if not row[-1].strip(" |")]
    links = re.findall(r"\]\(#([^)]+)\)", page)
    assert links and not set(links) - set(anchors)


def test_every_setting_that_a_recipe_can_set_is_in_the_reference() -> None:
    names = known_settings()
    for name in bundled.names():
        text = (bundled.folder() / f"{name}.yaml").read_text()
        found = {each for each in settings_of(text) if not each.startswith(("ablations.", "data.columns."))}
        assert not found - names, name
