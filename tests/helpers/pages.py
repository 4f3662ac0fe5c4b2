"""The code blocks of the documentation, and a reader who does what a page says, in order.

    ```sh                     commands, run line by line
    ```python                 run in the page's own namespace
    ```yaml                   a part of a recipe, whose settings must exist
    ```yaml title="f.yaml"    a file, written before what follows; so is any other block with a title
    ```text                   what the commands above print, abridged: `…` is anything, and other numbers will do

An HTML comment on the line above a block says more: `<!-- not run: REASON -->`, or `<!-- block: NAME -->` for a test
that runs blocks by name.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from commands import ROOT, macpo

from macpo.commands.tooling import reference
from macpo.engine.recipe.tree import Node, parse

FENCE = re.compile(
    r"^(?:<!-- (?P<said>not run|block): (?P<about>.+?) -->\n)?```(?P<info>[^\n`]*)\n(?P<text>.*?)^```$", re.M | re.S
)
RUNNABLE = ("sh", "python", "yaml")
SHELL = re.compile(r"[|<>$;&*]")
NUMBER = re.compile(r"[+-]?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block: where it stands, its language, and what the comment above it says."""

    line: int
    language: str
    title: str
    name: str
    not_run: str
    text: str


def blocks_of(page: str) -> list[Block]:
    """Every fenced block of a page, which is named by its path in the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for fence in FENCE.finditer(text):
        language, _, rest = fence["info"].partition(" ")
        title = re.fullmatch(r'title="([^"]+)"', rest)
        assert title or not rest, f"{page}: {fence['info']!r}"
        line, file = text.count("\n", 0, fence.start("info")) + 1, title[1] if title else ""
        said = {fence["said"]: fence["about"]}
        about = said.get("block", ""), said.get("not run", "")
        found.append(Block(line, language, file, *about, fence["text"]))
    assert text.count("```") == 2 * len(found), f"{page}: a block that is not fenced by lines of its own"
    return found


def blocks_for(page: str, **counts: int) -> dict[str, list[str]]:
    """Texts by language, for a test that runs a page's blocks itself; a block that it does not expect is an error."""
    found: dict[str, list[str]] = {language: [] for language in counts}
    for block in blocks_of(page):
        if block.language in RUNNABLE and not block.not_run:
            assert block.language in counts, f"{page}:{block.line}: nothing runs this block"
            found[block.language].append(block.text)
    assert {language: len(texts) for language, texts in found.items()} == counts, page
    return found


def named_blocks(page: str) -> dict[str, str]:
    """Texts of the Python blocks by name, for a test that runs them itself; one without a name is an error."""
    (texts,) = blocks_for(page, python=sum(block.language == "python" for block in blocks_of(page))).values()
    found = {block.name: block.text for block in blocks_of(page) if block.language == "python"}
    assert len(found) == len(texts) and "" not in found, f"{page}: every Python block needs a name of its own"
    return found


def lines_of(text: str) -> list[str]:
    """The commands of a block; a backslash at the end of a line continues it."""
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


@dataclass
class Reader:
    """Does what a page says in the working folder."""

    page: str
    names: dict[str, Any] = field(default_factory=dict)
    printed: list[str] = field(default_factory=list)

    def follow(self) -> None:
        for block in blocks_of(self.page):
            where = f"{self.page}:{block.line}"
            assert block.language, f"{where}: a block without a language"
            if block.not_run:
                continue
            if block.title:
                Path(block.title).parent.mkdir(parents=True, exist_ok=True)
                Path(block.title).write_text(block.text)
            elif block.language == "sh":
                self.printed = [line for command in lines_of(block.text) for line in run(command, where)]
            elif block.language == "python":
                self.printed = self.execute(block.text, where)
            elif block.language == "yaml":
                unknown = settings_of(block.text) - known_settings()
                assert not unknown, f"{where}: no recipe has {sorted(unknown)}"
            elif block.language == "text":
                missing = not_printed(block.text, self.printed)
                assert not missing, f"{where}: not printed: {missing}\nprinted:\n" + "\n".join(self.printed)

    def execute(self, text: str, where: str) -> list[str]:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(text, where, "exec"), self.names)
        return out.getvalue().splitlines()


def run(command: str, where: str) -> list[str]:
    """Run one command and return what it prints; `macpo` without a shell's signs runs in this process."""
    words = shlex.split(command, comments=True)
    if words[:1] != ["macpo"] or SHELL.search(command.partition(" #")[0]):
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        done = subprocess.run(
            ["bash", "-ec", command], env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{where}: {command}\n{done.stdout}{done.stderr}"
        return (done.stdout + done.stderr).splitlines()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = macpo(*words[1:])
    assert code == 0, f"{where}: {command}\n{out.getvalue()}{err.getvalue()}"
    return (out.getvalue() + err.getvalue()).splitlines()


def not_printed(shown: str, printed: Iterable[str]) -> list[str]:
    """Those of the shown lines that no printed line looks like."""
    there = [shape(line) for line in printed]
    patterns = {line: ".*".join(map(re.escape, shape(line).split("…"))) for line in shown.splitlines() if line.strip()}
    return [line for line, pattern in patterns.items() if not any(re.fullmatch(pattern, each) for each in there)]


def shape(line: str) -> str:
    """A line without what differs from run to run: numbers, how many of them follow each other, widths of columns."""
    words = re.sub(r"--+", "--", " ".join(NUMBER.sub("0", line).split()))
    return re.sub(r"(?<!\S)(\S+)( \1(?!\S))+", r"\1", words)


def settings_of(recipe: str) -> set[str]:
    """Dotted names of all settings that a part of a recipe sets, with 0 for each place in a list."""

    def names(node: Node, path: str) -> set[str]:
        if isinstance(node.value, dict):
            inner = [(child, f"{path}.{key}" if path else key) for key, child in node.value.items()]
        else:
            inner = [(child, f"{path}.0") for child in node.value] if isinstance(node.value, list) else []
        return {path} | {name for child, where in inner for name in names(child, where)} - {""}

    return {name for name in names(parse(recipe, "a page", []), "") if name and not name.endswith(".0")}


def known_settings() -> set[str]:
    """Dotted names of the settings of all kinds of recipes."""
    return {name for page in reference.pages().values() for name in re.findall(r'<a id="([^"]+)"></a>', page)}
