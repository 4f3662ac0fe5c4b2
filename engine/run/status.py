"""How each stage of a graph stands in a run folder, and why: done, stale, pending, damaged."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from macpo.engine.errors import ConfigError, IntegrityError, Problem
from macpo.engine.run.folder import RunFolder
from macpo.engine.run.keys import changes, filled, key_of
from macpo.engine.run.manifest import Manifest, code_version
from macpo.engine.run.stages import Graph, Stage

if TYPE_CHECKING:
    pass


@dataclass
class StageState:
    """`reasons`: the differing fields of a stale stage; `after`: it is stale only because that stage is."""

    state: str
    folder: Path | None = None
    manifest: Manifest | None = None
    reasons: list[str] = field(default_factory=list)
    after: str = ""
    error: IntegrityError | None = None

    @property
    def why(self) -> str:
        if self.error:
            return self.error.problems[0].message
        return "; ".join(self.reasons) or (f"comes after {self.after}" if self.after else "")


def survey(run: RunFolder, graph: Graph, redo: Collection[str] = ()) -> dict[str, StageState]:
    """Every stage's state; files are compared by size and time stamp, and by hash where the stamp differs.

    `redo`: stages that will be done again anyway, so that nobody needs to look at them.
    """
    found: dict[str, StageState] = {}
    for stage in graph.stages:
        found[stage.name] = StageState("pending") if stage.name in redo else _stand(run, stage, found)
    return found


def _stand(run: RunFolder, stage: Stage, found: dict[str, StageState]) -> StageState:
    folder = run.committed(stage.name)
    if folder is None:
        partial = run.partial(stage.name)
        return StageState("pending", partial, reasons=["interrupted, goes on from where it was"] if partial else [])
    try:
        manifest = Manifest.read(folder)
        manifest.verify(folder, full=False)
    except IntegrityError as error:
        return StageState("damaged", folder, error=error)
    reasons = differences(stage, manifest, found)
    if reasons:
        return StageState("stale", folder, manifest, reasons)
    before = [name for name in stage.inputs.values() if found[name].state in ("stale", "damaged")]
    if before:
        return StageState("stale", folder, manifest, after=before[0])
    return StageState("done", folder, manifest)


def fits(stage: Stage, manifest: Manifest, inputs: Mapping[str, str]) -> bool:
    """Whether the manifest's stage was made from exactly what this one would be; `inputs`: alias -> digest."""
    before, now = _compared(stage, manifest)
    return key_of(manifest.kind, before, manifest.inputs) == key_of(stage.kind, now, inputs)


def _compared(stage: Stage, manifest: Manifest) -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest's settings and the stage's, both without paths, and what is unknown in one as in the other."""
    before = filled(stage.work.portable(dict(manifest.settings)), stage.settings)
    return before, filled(stage.settings, before)


def differences(stage: Stage, manifest: Manifest, found: dict[str, StageState]) -> list[str]:
    """What a finished stage was made from that is no longer so; inputs count where they are done themselves."""
    before, settings = _compared(stage, manifest)
    reasons = changes(before, settings)
    if manifest.kind != stage.kind:
        reasons.append(f"kind: {manifest.kind} -> {stage.kind}")
    digests = dict(manifest.inputs)
    for alias, name in stage.inputs.items():
        now = found[name]
        digest = now.manifest.digest if now.state == "done" and now.manifest else digests.get(alias, "")
        if digests.pop(alias, None) != digest or not digest:
            reasons.append(f"input {alias}: {name} has other content")
    reasons += [f"input {alias}: removed" for alias in digests]
    if not reasons and not fits(stage, manifest, manifest.inputs):
        reasons.append("settings")  # equal when shown, different in JSON (1 and 1.0)
    return reasons


def refuse_stale(run: RunFolder, graph: Graph, found: dict[str, StageState], allowed: Collection[str]) -> None:
    """Raises: ConfigError naming the changed fields and every stage that they make stale, unless all are `allowed`."""
    direct = [name for name, each in found.items() if each.state == "stale" and each.reasons]
    if set(direct) <= set(allowed):
        return
    first = next(name for name in direct if name not in allowed)
    fix = f"undo the change, use a new run folder, or run with --rerun-stale or --from {first}"
    problems = [
        Problem(f"changed since {name} was done: {reason}", fix, str(found[name].folder))
        for name in direct
        for reason in found[name].reasons
    ]
    stale = [name for name in graph.downstream(direct) if run.committed(name)]
    count = f"{len(stale)} finished stage{'s' if len(stale) > 1 else ''}"
    problems.append(Problem(f"this makes {count} stale: {', '.join(stale)}", fix, str(run.path)))
    raise ConfigError(problems=problems)


def code_changes(found: dict[str, StageState]) -> str:
    """One line about stages that another version of the code made; empty if there are none."""
    now = code_version()
    older: dict[str, list[str]] = {}
    for name, each in found.items():
        if each.manifest and any(each.manifest.created.get(part) != now[part] for part in now):
            made = each.manifest.created
            label = (
                f"{made.get('version', 'an unknown version')}{'@' + made['commit'][:10] if made.get('commit') else ''}"
            )
            older.setdefault(label, []).append(name)
    parts = [f"{len(names)} by {label} (first: {names[0]})" for label, names in older.items()]
    if not parts:
        return ""
    label = f"{now['version']}{'@' + now['commit'][:10] if now['commit'] else ''}"
    return f"warning: the code is {label}, finished stages were made {', '.join(parts)}; they are kept"


@dataclass(frozen=True)
class StageStatus:
    """Where a stage stands, for people and for `summary.json`; `counts` is what the stage noted (tokens, …)."""

    name: str
    folder: str
    state: Literal["done", "running", "stale", "pending", "damaged"]
    why: str = ""
    seconds: float | None = None
    counts: Mapping[str, Any] = field(default_factory=dict)
