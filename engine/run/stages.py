"""The stage graph of a run: what each stage depends on, and the key that says whether its result still holds.

A stage has a kind, settings and inputs. Two stages that agree in all three are one: `Graph.add` returns the one that is
there, so ablation arms share what they have in common. Neither code nor where it lies is part of a key.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from macpo.engine.errors import ConfigError
from macpo.engine.run.keys import key_of

if TYPE_CHECKING:
    from macpo.engine.run.context import StageContext


_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    `kind`: what the stage does, by a name that outlives the code's layout; part of the key.
    `settings`: JSON-able; everything the outputs depend on besides the inputs (config slice, seed, file digests).
    `inputs`: alias -> name of an earlier stage. `cost`: relative duration, a hint for scheduling only.
    """

    name: str
    kind: str
    run: Callable[[StageContext], None]
    settings: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)
    cost: float = 1.0


class Graph:
    """Stages in the order they were added; inputs must have been added before."""

    def __init__(self) -> None:
        self._stages: dict[str, Stage] = {}
        self._identity: dict[str, str] = {}
        self._by_identity: dict[str, str] = {}

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
        return list(self._stages).index(name) + 1

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
        """Cost of the longest chain that begins at each stage: the order in which free workers take them."""
        longest: dict[str, float] = {}
        for stage in reversed(self.stages):
            users = [longest[other.name] for other in self.stages if stage.name in other.inputs.values()]
            longest[stage.name] = stage.cost + max(users, default=0.0)
        return longest
