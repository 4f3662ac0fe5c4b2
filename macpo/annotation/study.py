"""What a run's folder keeps of an annotation: `annotation/items.json`, fixed by seed and content when it is begun.

It lies beside the run's stages and changes none of them. A later start reads it, so people go on where they were; other
settings, or responses that the run has made anew since, are refused instead of mixed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from macpo.annotation.design import (
    CHOSEN,
    REJECTED,
    Design,
    Item,
    Pair,
    Showing,
    deal,
    draw,
    items_of,
    name_of,
    share,
    showings,
)
from macpo.engine.data.records import Pair as HumanPair
from macpo.engine.data.records import read_records
from macpo.engine.errors import ConfigError, DataError, IntegrityError
from macpo.engine.files import explained, read_bytes, read_json, sha256, write_json
from macpo.engine.paths import FIX
from macpo.report.annotated import ANNOTATION
from macpo.report.policy_names import named, policy_name
from macpo.report.run_reader import RunReader

ITEMS = "items.json"
_AWAY = "move that folder away to begin another study"


class _Content(BaseModel):
    """`items.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: int
    design: Design
    sources: dict[str, str]
    """SHA-256 of each policy's `evaluation.jsonl`."""
    items: tuple[Item, ...]
    equal: dict[str, tuple[str, ...]]
    showings: tuple[tuple[Showing, ...], ...]


@dataclass(frozen=True)
class Study:
    """One annotation of a run's responses: what is shown to whom."""

    folder: Path
    content: _Content
    digest: str
    """SHA-256 of `items.json`, which the files of judgements name."""

    @property
    def design(self) -> Design:
        return self.content.design

    @property
    def equal(self) -> Mapping[str, tuple[str, ...]]:
        """By pair of policies, the prompts to which both gave the same response."""
        return self.content.equal

    @cached_property
    def items(self) -> dict[str, Item]:
        return {item.id: item for item in self.content.items}

    def showings(self, person: int) -> tuple[Showing, ...]:
        return self.content.showings[person]

    def extent(self) -> str:
        """Return in words how much is asked, also where the run has fewer prompts than the design."""
        pairs = [item for item in self.items.values() if item.kind == "pair"]
        prompts = {item.prompt_id for item in pairs}.union(*self.equal.values())
        few = f" (of {self.design.prompts}: the run has no more)" if len(prompts) < self.design.prompts else ""
        return f"{len(prompts)} prompts{few}, {len(pairs)} pairs of responses that differ"

    def changed(self) -> list[str]:
        """Return the policies whose responses the run no longer has as they were drawn."""
        found = _sources(RunReader(self.folder.parent), self.design)
        return [policy for policy, digest in self.content.sources.items() if found.get(policy) != digest]


def begin(run_dir: Path, given: Mapping[str, Any]) -> Study:
    """Open the study of a run, or begin it with the settings given and the defaults of the others.

    Raises:
        ConfigError (2): settings that make no sense, that an existing study does not have, or a policy that the run has
            not; also where the run has made the responses anew.
        DataError (3): the run has no responses to compare, or no human pairs for gold checks.
        IntegrityError (5): `items.json` is not what was written.
    """
    folder = Path(run_dir) / ANNOTATION
    reader = RunReader(run_dir)
    if "pairs" in given:
        full = [tuple(policy_name(named(reader, policy)) for policy in pair) for pair in given["pairs"]]
        given = {**given, "pairs": full}
    with explained(folder):
        folder.mkdir(exist_ok=True)
    with locked(folder):
        if os.path.lexists(folder / ITEMS):
            study = open_study(run_dir)
            _same(study, given)
            if changed := study.changed():
                problem = f"the run has other responses of {', '.join(changed)} now than when {ITEMS} was made"
                raise ConfigError(problem, _AWAY, file=folder)
            return study
        write_json(folder / ITEMS, _made(reader, _design(reader, given)).model_dump(mode="json"))
    return open_study(run_dir)


def open_study(run_dir: Path) -> Study:
    """Read the study of a run. Raises DataError where there is none, IntegrityError for a damaged one."""
    path = Path(run_dir) / ANNOTATION / ITEMS
    if not os.path.lexists(path):
        raise DataError("nobody has been asked about this run", "start `macpo annotate RUN` first", file=path)
    try:
        content = _Content.model_validate(read_json(path))
        items = {item.id for item in content.items}
        if content.version != 1 or any(each.item not in items for shown in content.showings for each in shown):
            raise ValueError("unknown version or item")
    except (ValidationError, ValueError, DataError) as error:
        raise IntegrityError("not what `macpo annotate` wrote", f"put it back, or {_AWAY}", file=path) from error
    return Study(path.parent, content, sha256(path))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context in which no other process begins a study or takes a place in it; lasts as long as a file is written."""
    with explained(folder):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _design(reader: RunReader, given: Mapping[str, Any]) -> Design:
    settings = {"pairs": [_last_and_first(reader)], **given} if "pairs" not in given else dict(given)
    try:
        return Design.model_validate(settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = "--" + str(first["loc"][0] if first["loc"] else "pairs").replace("_", "-")
        problem, _, fix = first["msg"].removeprefix("Value error, ").partition(FIX)
        raise ConfigError(problem, fix or "see macpo annotate --help", field=field) from None


def _last_and_first(reader: RunReader) -> Pair:
    """The student after its last iteration against the student before the first."""
    students = [name for name, agent in reader.summary["agents"].items() if agent["role"] == "student"]
    found = sorted((e for e in reader.evaluations if e.agent in students[:1]), key=lambda e: e.iteration)
    if len(found) < 2:
        raise ConfigError("the run has no student at two iterations", "name policies with --pairs", field="--pairs")
    return policy_name(found[-1]), policy_name(found[0])


def _same(study: Study, given: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first setting that the study was begun with otherwise."""
    had = study.design.model_dump(mode="json")
    for name, value in given.items():
        value = [list(pair) for pair in value] if name == "pairs" else value
        if had[name] != value:
            shown = ",".join(map(":".join, had[name])) if name == "pairs" else f"{had[name]:g}"
            problem = f"the study was begun with {shown}"
            raise ConfigError(problem, f"leave the option out, or {_AWAY}", file=study.folder, field=_option(name))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _sources(reader: RunReader, design: Design) -> dict[str, str]:
    """SHA-256 of each policy's `evaluation.jsonl`; policies that are gone are not among them."""
    found = {}
    for policy in sorted({name for pair in design.pairs for name in pair}):
        with contextlib.suppress(ConfigError):
            found[policy] = sha256(named(reader, policy).responses)
    return found


def _made(reader: RunReader, design: Design) -> _Content:
    responses: dict[str, dict[str, dict[str, Any]]] = {}
    for policy in sorted({name for pair in design.pairs for name in pair}):
        evaluation = named(reader, policy)
        rows = {row["prompt_id"]: row for row in evaluation.rows() if "answer" in row}
        if not rows:
            fix = "name policies of a run of `recipe: macpo`"
            raise DataError(f"{policy} has no responses that can be compared", fix, file=evaluation.folder.path)
        responses[policy] = rows
    items, equal = items_of(design, responses)
    if not items:
        raise DataError(
            "no two responses differ", "name other policies with --pairs", file=reader.path, field="--pairs"
        )
    asked = {item.prompt_id for item in items}
    num_gold = share(len(items) * design.judges / design.annotators, design.gold_checks)
    items += _gold_checks(reader, design, num_gold, asked)
    gold = frozenset(item.id for item in items if item.kind == "gold")
    return _Content(
        version=1,
        design=design,
        sources=_sources(reader, design),
        items=tuple(items),
        equal={name: tuple(same) for name, same in equal.items()},
        showings=tuple(tuple(showings(dealt, gold, at, design)) for at, dealt in enumerate(deal(items, design))),
    )


def _gold_checks(reader: RunReader, design: Design, count: int, asked: set[str]) -> list[Item]:
    """Human test pairs, those of prompts that are not asked about otherwise first."""
    if not count:
        return []
    paths = [stage.path / "test.jsonl" for stage in reader.stages if stage.name == "data"]
    if not paths or not paths[0].exists():
        raise DataError("the run has no human test pairs", "leave out --gold-checks", file=reader.path)
    rows = [
        pair
        for pair in read_records(paths[0], HumanPair)
        if pair.chosen != pair.rejected and pair.chosen_parts is None and pair.rejected_parts is None
    ]
    rows.sort(key=lambda pair: (pair.prompt.id in asked, draw(design.seed, "gold", pair.prompt.id, pair.chosen)))
    return [
        Item(
            id=name_of("gold", pair.prompt.id, pair.chosen, pair.rejected),
            kind="gold",
            policies=(CHOSEN, REJECTED),
            prompt_id=pair.prompt.id,
            prompt=tuple(pair.prompt.messages),
            answers=(pair.chosen, pair.rejected),
        )
        for pair in rows[:count]
    ]


def whole_rows(path: Path) -> bytes:
    """Return a file's content up to its last line end, without a line that is being written or was torn."""
    content = read_bytes(path)
    return content[: content.rfind(b"\n") + 1]
