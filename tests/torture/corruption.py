"""Spoil every file of a finished and of a half-finished run in turn, and see what each command says.

    python tests/torture/corruption.py --minutes 20 --seed 0

A file is flipped (one bit), truncated to half, deleted, or replaced by a folder or a FIFO; then come `macpo status`,
`macpo report` and `macpo run` again. Right is: detected (an error of one line with code 2 to 5, by `run`), or harmless
(`run` ends with 0, and everything it holds is as in an undisturbed run). Prints a table by kind of file.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shim import Call, Kill, preloaded
from states import State, differences, is_note, remove, replace, show, state_of
from world import Run
from zygote import Ended, Orders, Zygote

LIMIT_S = 60.0
DETECTED = {2, 3, 4, 5}


def flip(path: Path, draw: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    if raw:
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    path.write_bytes(raw)


def truncate(path: Path, draw: random.Random) -> None:
    os.truncate(path, path.stat().st_size // 2)


def delete(path: Path, draw: random.Random) -> None:
    path.unlink()


def folder(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


def fifo(path: Path, draw: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


WAYS: tuple[Callable[[Path, random.Random], None], ...] = (flip, truncate, delete, folder, fifo)


@dataclass
class Table:
    """(kind of file, way) -> how often each outcome; and what is neither detected nor harmless."""

    cells: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{'file':44} {'spoilt':9} what `run` does: exit code and how often"]
        for (kind, way), outcomes in sorted(self.cells.items()):
            lines.append(f"{kind:44} {way:9} " + ", ".join(f"{what} x {n}" for what, n in outcomes.most_common()))
        total = sum(sum(outcomes.values()) for outcomes in self.cells.values())
        return "\n".join([*lines, f"corruption: {total} spoilt files, {len(self.findings)} findings"])


def kind_of(relative: Path) -> str:
    """The name of a file without what differs between files of one kind."""
    stage = relative.parts[0] if len(relative.parts) > 1 else ""
    name = re.sub(r"\d+", "N", "/".join(relative.parts[1:] if stage else relative.parts))
    if stage == "cache":
        return f"cache/{re.sub(r'[0-9a-f]{16,}|[0-9a-fN]{20,}', 'KEY', name)}"
    return f"{'STAGE.tmp' if stage.endswith('.tmp') else 'STAGE'}/{name}" if stage else name


@dataclass(frozen=True, slots=True)
class Case:
    """One file of a run that is `label`, in the folder `source`, and what is done to it."""

    label: str
    source: Path
    file: Path
    way: Callable[[Path, random.Random], None]

    @property
    def kind(self) -> tuple[str, str]:
        return f"{self.label}: {kind_of(self.file)}", self.way.__name__


def cases(sources: Mapping[str, Path], draw: random.Random, per_kind: int | None) -> list[Case]:
    """Every file of the folders with every way, or so many files of a kind, in random order."""
    found = [
        Case(label, source, path.relative_to(source), way)
        for label, source in sources.items()
        for path in sorted(source.rglob("*"))
        if path.is_file() and not path.is_symlink()
        for way in WAYS
    ]
    draw.shuffle(found)
    taken: Counter[tuple[str, str]] = Counter()
    kept = []
    for case in found:
        taken[case.kind] += 1
        if per_kind is None or taken[case.kind] <= per_kind:
            kept.append(case)
    return kept


def spoil(run: Run, case: Case, draw: random.Random, table: Table) -> None:
    """Spoil one file, give the commands, and judge what they do."""
    replace(run.folder, case.source)
    case.way(run.folder / case.file, draw)
    where = f"{case.label}, {case.file} {case.way.__name__}"
    for words in (("status", run.folder), ("report", run.folder), run.words):
        ended = run.zygote.macpo(words, Orders(limit_s=LIMIT_S))
        table.findings += [f"{where}: {words[0]} {said}" for said in _wrong(ended)]
    harmless = ended.code == 0
    lines = differences(_but_notes(run.wanted), _but_notes(state_of(run.folder))) if harmless else []
    if lines:
        table.findings.append(f"{where}: run ends with 0, but {show(lines)}")
    outcome = (
        "0, and as it was" if harmless and not lines else f"{ended.code}" + (", and not as it was" if lines else "")
    )
    table.cells.setdefault(case.kind, Counter())[outcome] += 1


def _but_notes(state: State) -> State:
    """Without what nothing depends on: timings, logs, and cached reference log-probs.

    Whoever reads a cache entry verifies it and computes a spoilt one again (tests/engine/training/test_reference.py);
    nobody reads those of a finished run.
    """
    return {name: digest for name, digest in state.items() if not (is_note(name) or name.startswith("cache/"))}


def _wrong(ended: Ended) -> list[str]:
    if ended.code == 0 or (ended.code in DETECTED and _is_said(ended.printed)):
        return []
    return [f"ends with {ended.code}: {ended.last_line}"]


def _is_said(printed: str) -> bool:
    """Whether every line from the first error on is one, and printable."""
    lines = printed.splitlines()
    at = next((number for number, line in enumerate(lines) if line.startswith("error: ")), len(lines))
    return at < len(lines) and all(line.startswith("error: ") and line.isprintable() for line in lines[at:])


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many (default: when all are done)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--skip", type=int, default=0, help="leave out so many of the files, which come in the order of the seed"
    )
    parser.add_argument("--per-kind", type=int, help="so many files of a kind, such as a stage's manifest.json")
    return parser.parse_args(words)


def main() -> int:
    options = arguments()
    control, scratch = preloaded()
    try:
        run = Run(Zygote(control, scratch, scratch / "run"))
        table = torture(run, run.make_clean().calls, options)
    finally:
        remove(scratch)
    for line in table.findings:
        print(f"finding: {line}")
    print(table)
    return 1 if table.findings else 0


def torture(run: Run, calls: list[Call], options: argparse.Namespace) -> Table:
    """The cases that there is time for. `calls`: those of the undisturbed run that change files."""
    table, half = Table(), run.zygote.scratch / "half"
    _interrupt(run, half, calls)
    draw, began = random.Random(options.seed), time.monotonic()
    every = cases({"finished": run.clean, "half": half}, draw, options.per_kind)
    print(f"{len(every)} files and ways to spoil them", flush=True)
    for case in every[options.skip :]:
        if (time.monotonic() - began) / 60 > options.minutes:
            break
        spoil(run, case, draw, table)
    return table


def _interrupt(run: Run, half: Path, calls: list[Call]) -> None:
    """The state of a run that was killed while it trained, with a checkpoint and a RUNNING marker among its files."""
    saved = [call.number for call in calls if call.name == "rename" and re.search(r"/checkpoint/step-\d+$", call.path)]
    remove(run.folder)
    run.zygote.macpo(run.words, Orders(Kill(saved[len(saved) // 2], "after")))
    replace(half, run.folder)


if __name__ == "__main__":
    sys.exit(main())
