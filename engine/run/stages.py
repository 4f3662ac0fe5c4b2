"""The stage graph of a run: what each stage depends on, and the key that says whether its result still holds.

A stage has a kind, settings and inputs. Two stages that agree in all three are one: `Graph.add` returns the one that is
there, so ablation arms share what they have in common. Neither code nor where it lies is part of a key.
"""

from __future__ import annotations

import difflib
import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from macpo.engine.errors import ConfigError
from macpo.engine.run.context import StageContext
from macpo.engine.run.keys import key_of

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


class StageInputs(BaseModel):
    """Names of the earlier stages whose folders a stage reads: a field each, or a mapping for several alike."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    def by_alias(self) -> dict[str, str]:
        """What keys and manifests call each input, `field` or `field:key` -> name of the stage."""
        found: dict[str, str] = {}
        for field in type(self).model_fields:
            value = getattr(self, field)
            if isinstance(value, str):
                found[field] = value
            elif value is not None:
                found |= {f"{field}:{key}": name for key, name in value.items()}
        return found


class StageWork(BaseModel, ABC):
    """What a stage does; a subclass per kind of stage, whose fields are its settings.

    The key hashes the settings and the content of the inputs. Left out are fields with `exclude=True`, which say where
    the stage runs, and those that have their default: a kind can gain a setting without making finished runs stale.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants", defer_build=True)

    name: ClassVar[str]
    """Name of the kind; part of the key, so it outlives the code's layout."""
    doing: ClassVar[str] = ""
    """What such a stage does, in a few words for who watches the run."""
    weight: ClassVar[float] = 1.0
    """Relative duration of such stages."""
    scratch: ClassVar[tuple[str, ...]] = ()
    """Folders in the stage's folder that an interrupted attempt resumes from, such as checkpoints; no outputs, they are
    deleted when the stage commits."""
    continued: ClassVar[tuple[str, ...]] = ()
    """Files that an interrupted attempt leaves for the next one to go on with, such as metrics.jsonl. Whatever else it
    wrote is deleted before the next one starts, so both commit the same files."""
    inputs: StageInputs = StageInputs()

    def settings(self) -> dict[str, Any]:
        """What the outputs depend on besides the inputs (slice of the recipe, seed, digests of files), as JSON."""
        kept = {
            name
            for name, field in type(self).model_fields.items()
            if name != "inputs" and (field.is_required() or getattr(self, name) != field.default)
        }
        return self.model_dump(mode="json", include=kept)

    def portable(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings of this kind of stage, its own or those of a manifest, in which content stands for its path.

        Keys are made of it, so they depend neither on how a path is written nor on where the files lie.
        """
        return settings

    def duration(self) -> float:
        """Relative duration of this stage: a hint for the order in which parallel jobs take stages."""
        return self.weight

    def goes_on_from(self, folder: Path) -> str:
        """Where the next attempt goes on, by what an interrupted one left in `folder`; empty where it begins anew."""
        return ""

    @abstractmethod
    def run(self, ctx: StageContext) -> None:
        """Write the outputs into `ctx.dir`. Every rank calls it."""


@dataclass(frozen=True)
class Stage:
    """One step of a run, under a name that is unique in it."""

    name: str
    work: StageWork

    @property
    def kind(self) -> str:
        return self.work.name

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        return self.work.portable(self.work.settings())

    @functools.cached_property
    def inputs(self) -> dict[str, str]:
        """Alias -> name of an earlier stage."""
        return self.work.inputs.by_alias()


class Graph:
    """Stages in the order they were added; inputs must have been added before."""

    def __init__(self) -> None:
        self._stages: dict[str, Stage] = {}
        self._identity: dict[str, str] = {}
        self._by_identity: dict[str, str] = {}
        self._numbers: dict[str, int] = {}

    def add(self, stage: Stage) -> str:
        """Adds the stage, or finds the equal one that is there. Returns: the name to use as an input.

        Raises: ConfigError for a name that is not [A-Za-z0-9._-]+ or is taken by a different stage;
        ValueError for an unknown input or settings that are not JSON.
        """
        name = stage.name
        if not _NAME.fullmatch(name) or name.endswith((".tmp", ".trash")):
            raise ConfigError(f"{name!r} cannot name a stage", "use letters, digits, '.', '_' and '-'", field="name")
        missing = [other for other in stage.inputs.values() if other not in self._stages]
        if missing:
            raise ValueError(f"stage {name!r} needs {missing[0]!r}, which was not added before it")
        inputs = {alias: self._identity[other] for alias, other in stage.inputs.items()}
        identity = key_of(stage.kind, stage.settings, inputs)
        if identity in self._by_identity:
            return self._by_identity[identity]
        if name in self._stages:
            raise ConfigError(f"two different stages are called {name!r}", "give one another name", field="name")
        self._stages[name] = stage
        self._numbers[name] = len(self._stages)
        self._identity[name] = identity
        self._by_identity[identity] = name
        return name

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(self._stages.values())

    def stage(self, name: str) -> Stage:
        """Raises: ConfigError, with the nearest name, for a stage that is not in the graph."""
        if name not in self._stages:
            near = difflib.get_close_matches(name, self._stages, 1)
            fix = f"did you mean {near[0]!r}" if near else f"use one of {', '.join(self._stages) or 'none'}"
            raise ConfigError(f"there is no stage {name!r}", fix)
        return self._stages[name]

    def identity(self, name: str) -> str:
        """Hash of everything the stage depends on, known before anything ran."""
        return self._identity[name]

    def number(self, name: str) -> int:
        """Position in the run, from 1."""
        return self._numbers[name]

    def folder_name(self, name: str) -> str:
        width = max(2, len(str(len(self._stages))))
        return f"{self.number(name):0{width}d}-{name}"

    def downstream(self, names: Iterable[str]) -> list[str]:
        """These stages and all that depend on them, in graph order."""
        reached = set(names)
        for stage in self.stages:
            if reached & set(stage.inputs.values()):
                reached.add(stage.name)
        return [name for name in self._stages if name in reached]

    def urgency(self) -> dict[str, float]:
        """Weight of the longest chain that begins at each stage: the order in which free workers take them."""
        longest: dict[str, float] = {}
        after = dict.fromkeys(self._stages, 0.0)
        for stage in reversed(self.stages):
            longest[stage.name] = stage.work.duration() + after[stage.name]
            for name in stage.inputs.values():
                after[name] = max(after[name], longest[stage.name])
        return longest
