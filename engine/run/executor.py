"""One stage from start to commit: verify inputs, RUNNING marker, run, sync, hash, manifest, drop scratch, rename, sync.

Every rank runs the stage's function; rank 0 does everything else and tells the others how it went.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from macpo.engine import files
from macpo.engine.distributed.agree import is_main, on_main, stopped
from macpo.engine.errors import IntegrityError, MacpoError, PeerError, Stopped, is_failure
from macpo.engine.faults import point
from macpo.engine.processes import StopFlag, return_memory
from macpo.engine.removal import is_file, is_folder, remove, remove_leftovers
from macpo.engine.run.context import StageContext
from macpo.engine.run.folder import RunFolder, read_timing
from macpo.engine.run.keys import key_of
from macpo.engine.run.manifest import RUNNING, STAGE_LOG, TIMING, Manifest
from macpo.engine.run.stages import Graph, Stage
from macpo.engine.run.status import fits

if TYPE_CHECKING:
    from macpo.engine.distributed.world import World


@dataclass
class Executor:
    """Runs stages of one graph in one process (of each rank). `verified`: (name, digest) hashed in this run already."""

    run: RunFolder
    graph: Graph
    stop: StopFlag
    world: World | None = None
    verified: set[tuple[str, str]] = field(default_factory=set)

    def execute(self, stage: Stage, digests: Mapping[str, str]) -> dict[str, Any]:
        """Returns {"digest", "seconds", "counts"} on every rank. `digests`: of the input stages, by name.

        Raises: what the stage raises; IntegrityError if an input no longer verifies; Stopped; PeerError.
        """
        plan = on_main(self.world, lambda: self._prepare(stage, digests))
        folder, timing = Path(plan["folder"]), plan["timing"]
        inputs = {name: Path(path) for name, path in plan["inputs"].items()}
        if not plan["ready"]:
            needed = frozenset(map(Path, plan["needed"]))
            context = StageContext(stage.name, folder, inputs, self.stop, self.world, needed=needed)
            context.counts.update(timing.get("counts", {}))
            began, before = time.monotonic(), timing.get("seconds", 0.0)
            try:
                self._call(stage, context)
            except BaseException:
                with contextlib.suppress(MacpoError):  # an interrupted attempt's time counts; its error goes first
                    self._note_time(folder, before + time.monotonic() - began, context.counts)
                raise
            timing = self._note_time(folder, before + time.monotonic() - began, context.counts)
            point("stage-ran")
        digest = on_main(self.world, lambda: self._commit(stage, folder, digests, plan["ready"]))
        self.verified.add((stage.name, digest))
        return {"digest": digest, **timing}

    def _note_time(self, folder: Path, seconds: float, counts: Mapping[str, Any]) -> dict[str, Any]:
        timing = {"seconds": round(seconds, 3), "counts": dict(counts)}
        if is_main(self.world):
            files.write_json(folder / TIMING, timing)
        return timing

    def _prepare(self, stage: Stage, digests: Mapping[str, str]) -> dict[str, Any]:
        inputs = {name: str(self._verified_input(name, digests[name])) for name in stage.inputs.values()}
        key = key_of(stage.kind, stage.settings, _inputs(stage, digests))
        folder = self.run.partial(stage.name)
        if folder and is_folder(folder):
            remove_leftovers(folder)
            if self._is_complete(folder, stage, digests):
                return {"folder": str(folder), "inputs": inputs, "ready": True, "timing": read_timing(folder)}
        if folder and not _was_running(folder, key):
            self.run.discard(stage.name, partial=True)
            folder = None
        if folder is None:
            folder = self.run.path / (self.graph.folder_name(stage.name) + ".tmp")
            folder.mkdir()
            files.fsync_dir(self.run.path)
            point("stage-created")
            files.write_json(folder / RUNNING, {"key": key, "stage": stage.name})
        _keep_what_goes_on(folder, stage)
        point("stage-started")
        timing, needed = read_timing(folder), self._needed()
        return {"folder": str(folder), "inputs": inputs, "ready": False, "timing": timing, "needed": needed}

    def _needed(self) -> list[str]:
        """The folders of finished stages that unfinished ones read."""
        finished = self.run.finished()
        readers = [stage for stage in self.graph.stages if stage.name not in finished]
        read = {name for stage in readers for name in stage.inputs.values()}
        return [str(path) for name, path in finished.items() if name in read]

    def _verified_input(self, name: str, digest: str) -> Path:
        folder = self.run.committed(name)
        if folder is None:
            raise IntegrityError(f"the finished stage {name} is gone", "run the same command again to redo it")
        if (name, digest) not in self.verified:
            manifest = Manifest.read(folder)
            manifest.verify(folder, full=True)
            if manifest.digest != digest:
                raise IntegrityError("the stage changed while the run went on", "run it again", file=str(folder))
            self.verified.add((name, digest))
        return folder

    def _is_complete(self, folder: Path, stage: Stage, digests: Mapping[str, str]) -> bool:
        """Killed between manifest and rename: everything is there, only the last steps are missing."""
        try:
            manifest = Manifest.read(folder)
            manifest.verify(folder, full=True, scratch=stage.work.scratch)
        except (MacpoError, OSError):
            return False
        return fits(stage, manifest, _inputs(stage, digests))

    def _call(self, stage: Stage, context: StageContext) -> None:
        world = self.world if self.world is not None and self.world.size > 1 else None
        try:
            try:
                stage.work.run(context)
                return_memory()
                state = "ok"
            except Stopped:
                if world is None:
                    raise
                state = "stopped"
            if world is not None and "stopped" in world.gather(state):
                raise stopped(stage.name, world)
        except Stopped:
            raise
        except BaseException as error:
            if not is_failure(error):
                raise
            error.add_note(f"in stage {stage.name}")
            if world is None:
                raise
            raise self._blame(context, world.rank, error) from error

    @staticmethod
    def _blame(context: StageContext, rank: int, error: BaseException) -> BaseException:
        """A rank that fails leaves its message in a file, and one that loses its peer reports what it finds there."""
        if not isinstance(error, PeerError):
            text = str(error) if isinstance(error, MacpoError) else f"{type(error).__name__}: {error}"
            files.atomic_write(context.dir / f"error-rank{rank}.log", text)
            return error
        for path in sorted(context.dir.glob("error-rank*.log")):
            other = path.stem.removeprefix("error-rank")
            return PeerError(f"rank {other} failed in {context.name}: {path.read_text()}", "see that rank's message")
        (problem,) = error.problems
        return PeerError(f"in stage {context.name}: {problem.message}", problem.fix, file=problem.file)

    def _commit(self, stage: Stage, folder: Path, digests: Mapping[str, str], ready: bool) -> str:
        if ready:
            manifest = Manifest.read(folder)
        else:
            remove_leftovers(folder)
            inputs, scratch = _inputs(stage, digests), stage.work.scratch
            with files.explained(folder):
                manifest = Manifest.of(folder, stage.name, stage.kind, stage.settings, inputs, scratch)
                point("stage-hashed")
                manifest.write(folder)
            point("stage-manifest")
        for name in stage.work.scratch:  # only now: until the manifest is there, a kill would cost what it holds
            remove(folder / name, folder)
        (folder / RUNNING).unlink(missing_ok=True)
        files.fsync_dir(folder)
        point("stage-unmarked")
        folder.rename(self.run.path / self.graph.folder_name(stage.name))
        point("stage-renamed")
        files.fsync_dir(self.run.path)
        point("stage-committed")
        return manifest.digest


def _inputs(stage: Stage, digests: Mapping[str, str]) -> dict[str, str]:
    """What the stage calls each input -> the digest of its content."""
    return {alias: digests[name] for alias, name in stage.inputs.items()}


def _was_running(folder: Path, key: str) -> bool:
    """Whether an interrupted attempt at exactly this work lies in the folder."""
    try:
        marker = files.read_json(folder / RUNNING) if is_folder(folder) and is_file(folder / RUNNING) else None
    except MacpoError:
        return False
    return isinstance(marker, dict) and marker.get("key") == key


def _keep_what_goes_on(folder: Path, stage: Stage) -> None:
    """Delete what an interrupted attempt wrote, but for what this one goes on with.

    What a library had half written is gone then, so both attempts commit the same files.
    """
    kept = {RUNNING, TIMING, STAGE_LOG, *stage.work.continued}
    for path in folder.iterdir():
        if not (is_folder(path) if path.name in stage.work.scratch else path.name in kept and is_file(path)):
            remove(path, folder)
