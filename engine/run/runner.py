"""Runs a stage graph in a folder: skips what is done, resumes what was interrupted, refuses what is stale.

Kill it anywhere and call it again: stages that were committed stay, the others go on or start anew.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from macpo.engine import files
from macpo.engine.console import notice, notices_once, say
from macpo.engine.distributed.agree import is_main, on_main, stopped, unpack_error
from macpo.engine.errors import ConfigError, MacpoError, PeerError, Stopped
from macpo.engine.faults import point
from macpo.engine.processes import StopFlag, set_threads
from macpo.engine.progress import Report, duration, shown_by
from macpo.engine.removal import is_file, make_way, remove
from macpo.engine.run.executor import Executor
from macpo.engine.run.folder import RunFolder, read_timing
from macpo.engine.run.lock import RunLock, holder
from macpo.engine.run.manifest import Manifest
from macpo.engine.run.run_progress import Part, RunProgress
from macpo.engine.run.stages import Graph, Stage
from macpo.engine.run.status import StageState, StageStatus, code_changes, fits, refuse_stale, survey
from macpo.engine.run.time_left import Planned
from macpo.engine.run.workers import WorkerPool, Workers

if TYPE_CHECKING:
    from macpo.engine.distributed.world import World

RERUN = "RERUN.json"  # a `--from` in progress: after a kill the same command resumes it instead of starting over


class Runner:
    """One run folder and the graph that it shall hold the results of.

    `from_stage`: redo that stage and all that depend on it. `rerun_stale`: redo stages whose settings or inputs
    changed.
    `workers`: how many stages run at once. It does not change the results' bits, except for its `threads`.
    `began`: called once (rank 0) when the folder is held and nothing in it is refused, before the first stage.
    `planned`: what the stages were planned to take, for the time left; `part`: the run's place among several.
    `log`: gets lines that are printed otherwise.
    """

    def __init__(
        self,
        run_dir: Path | str,
        graph: Graph,
        *,
        world: World | None = None,
        from_stage: str | None = None,
        rerun_stale: bool = False,
        workers: Workers | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self.workers = workers or Workers()
        if self.workers.jobs > 1 and world is not None and world.size > 1:
            raise ConfigError("jobs > 1 cannot be combined with several ranks", "set compute.jobs to 1", field="jobs")
        self.folder_of_run = RunFolder(Path(run_dir))
        self.graph, self.world = graph, world
        self.from_stage, self.rerun_stale = from_stage, rerun_stale
        self.began: Callable[[], None] | None = None
        self.planned: Mapping[str, Planned] = {}
        self.part: Part | None = None
        self.log, self._write = log or say, log
        self.digests: dict[str, str] = {}
        self.redoable: set[str] = set()

    def folder(self, name: str) -> Path:
        """The committed folder of a stage. Raises: ConfigError if it is not done."""
        found = self.folder_of_run.committed(name)
        if found is None:
            raise ConfigError(f"stage {name} is not done", "run it first", file=str(self.folder_of_run.path))
        return found

    def run(self) -> list[str]:
        """Brings every stage to done. Returns: the names of those that it ran, in the order they ended.

        Raises: ConfigError for a folder in use, not writable or stale; IntegrityError for a damaged stage; PeerError
        for a dead worker; Stopped after SIGTERM or Ctrl-C; whatever a stage raises.
        """
        self.digests = {}
        main = is_main(self.world)
        with notices_once(), StopFlag(quiet=not main) as stop, contextlib.ExitStack() as held:
            finished = on_main(self.world, lambda: self._open(held))
            executor = Executor(self.folder_of_run, self.graph, stop, self.world)
            with self._shown(finished, stop) as self.progress:
                done = (self._run_parallel if self.workers.jobs > 1 else self._run_in_order)(executor)
            if self._stop_agreed(stop):  # what the caller does with the results is cut short too
                raise stopped("the end of the last stage", self.world)
            on_main(self.world, lambda: self._close(done))
        return done

    @contextlib.contextmanager
    def _shown(self, finished: list[str], stop: StopFlag) -> Iterator[RunProgress]:
        """Context in which rank 0 shows how far the run is; `finished` were done before it."""
        shown = RunProgress(self.graph, planned=self.planned, jobs=self.workers.jobs, part=self.part, write=self._write)
        if not is_main(self.world) or len(finished) == len(self.graph.stages):
            yield shown
            return
        shown.start(finished, stop)
        try:
            with shown_by(shown):
                yield shown
        finally:
            shown.close()

    def _open(self, held: contextlib.ExitStack) -> list[str]:
        """Take the folder; returns the names of the stages that are done."""
        run = self.folder_of_run
        if self.from_stage is not None:
            self.graph.stage(self.from_stage)
        files.probe_writable(run.path)
        held.enter_context(RunLock(run.path, self.log))
        with files.explained(run.path):
            run.sweep(self.log)
        again = self.graph.downstream([self.from_stage]) if self.from_stage is not None else []
        under_way = bool(again) and self._is_rerun_under_way()
        self.redoable = {stage.name for stage in self.graph.stages} if self.rerun_stale else set(again)
        found = survey(run, self.graph, () if under_way else again)
        for each in found.values():
            if each.error is not None:
                raise each.error
        refuse_stale(run, self.graph, found, self.redoable)
        stale = [name for name, each in found.items() if each.state == "stale" and each.reasons]
        for name in stale:
            self.log(f"{name} is redone: {found[name].why}")
        if warning := code_changes(found):
            self.log(warning)
        if under_way:
            self.log(f"resuming the rerun from {self.from_stage}")
        elif again:
            self._discard(again)
        if self.began is not None:
            self.began()
        done = [name for name, each in found.items() if each.state == "done"]
        if len(done) < len(found) and (line := self._where_it_goes_on(found)):
            self.log(line)
        return done

    def _where_it_goes_on(self, found: Mapping[str, StageState]) -> str:
        """What is done and where the run goes on, as one line; empty where it begins."""
        done = {name: each for name, each in found.items() if each.state == "done"}
        begun = {
            name: (folder, self.graph.stage(name).work.goes_on_from(folder))
            for name in found.keys() - done.keys()
            if (folder := self.folder_of_run.partial(name)) is not None
        }
        if not done and not begun:
            return ""
        seconds = [read_timing(each.folder).get("seconds", 0.0) for each in done.values() if each.folder is not None]
        seconds += [read_timing(folder).get("seconds", 0.0) for folder, _ in begun.values()]
        left = [name for name in found if name not in done]
        goes_on = [name for name in left if name in begun] or left[:1]
        texts = [f"{name} from {begun[name][1]}" if begun.get(name, ("", ""))[1] else name for name in goes_on]
        return (
            f"resuming: {len(done)} of {len(found)} stages done, {duration(sum(seconds))} of work; "
            f"next {' and '.join(texts)}"
        )

    def _is_rerun_under_way(self) -> bool:
        note = self.folder_of_run.path / RERUN
        try:
            return is_file(note) and files.read_json(note) == {"from": self.from_stage, "discarded": True}
        except MacpoError:
            return False

    def _discard(self, names: list[str]) -> None:
        """Last stage first, so that a kill in between never leaves a result without the inputs it came from."""
        note = self.folder_of_run.path / RERUN
        make_way(note, self.folder_of_run.path, self.log)
        files.write_json(note, {"from": self.from_stage, "discarded": False})
        point("rerun-noted")
        for name in reversed(names):
            self.folder_of_run.discard(name)
            self.folder_of_run.discard(name, partial=True)
        files.write_json(note, {"from": self.from_stage, "discarded": True})

    def _close(self, done: list[str]) -> None:
        remove(self.folder_of_run.path / RERUN, self.folder_of_run.path)
        if not done:
            self.log(f"all {len(self.graph.stages)} stages are done already, nothing to do (--from STAGE redoes some)")
        point("run-finished")

    def _settle(self, stage: Stage) -> bool:
        """Whether the stage has to run, now that its inputs are done; a stale result is discarded or refused."""
        folder = self.folder_of_run.committed(stage.name)
        if folder is None:
            return True
        manifest = Manifest.read(folder)
        inputs = {alias: self.digests[name] for alias, name in stage.inputs.items()}
        if fits(stage, manifest, inputs):
            self.digests[stage.name] = manifest.digest
            return False
        if stage.name not in self.redoable:
            refuse_stale(self.folder_of_run, self.graph, survey(self.folder_of_run, self.graph), self.redoable)
        self.folder_of_run.discard(stage.name)
        return True

    def _run_in_order(self, executor: Executor) -> list[str]:
        set_threads(self.workers.threads)
        done = []
        for stage in self.graph.stages:
            if not on_main(self.world, functools.partial(self._settle, stage)):
                self.progress.keep(stage.name)
                continue
            if self._stop_agreed(executor.stop):
                raise stopped(f"the start of {stage.name}", self.world)
            self.progress.begin(stage.name)
            result = executor.execute(stage, self.digests)
            self._finished(stage, result)
            done.append(stage.name)
        return done

    def _stop_agreed(self, stop: StopFlag) -> bool:
        if self.world is None or self.world.size == 1:
            return stop.requested
        return any(self.world.gather(stop.requested))

    def _run_parallel(self, executor: Executor) -> list[str]:
        urgency = self.graph.urgency()
        waiting = {stage.name: stage for stage in self.graph.stages}
        ready: list[Stage] = []
        done: list[str] = []
        failure: BaseException | None = None
        asked = False
        with WorkerPool(self.workers, self.folder_of_run.path, self._said) as pool:
            while True:
                halt = executor.stop.requested or failure is not None
                if not halt:
                    try:
                        ready += self._newly_ready(waiting)
                    except MacpoError as error:
                        failure = error
                        continue
                    ready.sort(key=lambda stage: (-urgency[stage.name], self.graph.number(stage.name)))
                    while ready and pool.num_free:
                        stage = ready.pop(0)
                        digests = {name: self.digests[name] for name in stage.inputs.values()}
                        identity, verified = self.graph.identity(stage.name), sorted(executor.verified)
                        process = pool.submit(stage.name, identity=identity, digests=digests, verified=verified)
                        self.progress.begin(stage.name, process)
                elif not asked:
                    pool.stop_busy()
                    asked = True
                if not pool.busy:
                    break
                for name, answer in pool.wait(0.2):
                    if "progress" in answer:
                        self.progress.of_stage(name, Report(**answer["progress"]))
                    elif "done" in answer:
                        executor.verified |= {(stage, digest) for stage, digest in answer["done"]["verified"]}
                        self._finished(self.graph.stage(name), answer["done"])
                        done.append(name)
                    else:
                        failure = _worse(failure, _failure(name, answer))
        if failure is not None:
            raise failure
        if waiting or ready:
            raise stopped(f"{(ready or list(waiting.values()))[0].name}")
        return done

    def _newly_ready(self, waiting: dict[str, Stage]) -> list[Stage]:
        """Takes the stages whose inputs are done out of `waiting`; those that are done themselves need no more."""
        found = []
        for name in list(waiting):  # graph order, so one pass sees what earlier skips made ready
            stage = waiting[name]
            if all(other in self.digests for other in stage.inputs.values()):
                if self._settle(stage):
                    found.append(stage)
                else:
                    self.progress.keep(name)
                del waiting[name]
        return found

    def _finished(self, stage: Stage, result: dict[str, Any]) -> None:
        self.digests[stage.name] = result["digest"]
        line = self.progress.finished(stage.name, result)
        if is_main(self.world):
            self.log(line)

    def _said(self, stage: str, line: str) -> None:
        """A worker has printed a line."""
        prefix = f"{stage}: "
        notice(line.removeprefix(prefix), of=stage if line.startswith(prefix) else "")

    def status(self) -> list[StageStatus]:
        """Where every stage stands; changes nothing, takes no lock, never raises for damage."""
        run = self.folder_of_run
        busy = run.path.is_dir() and holder(run.path) is not None
        found = []
        for name, each in survey(run, self.graph).items():
            state: Any = each.state
            if state == "pending" and busy and run.partial(name):
                state, each.reasons = "running", []
            timing = read_timing(each.folder) if each.folder else {}
            folder = each.folder.name if each.folder else ""
            counts = timing.get("counts", {})
            found.append(StageStatus(name, folder, state, each.why, timing.get("seconds"), counts))
        return found


def _failure(name: str, answer: dict[str, Any]) -> BaseException:
    if "error" in answer:
        return unpack_error(answer["error"])
    if "crash" in answer:
        error = RuntimeError(f"{answer['crash']['text']} (in stage {name})")
        error.add_note(answer["crash"]["trace"])
        return error
    return PeerError(f"stage {name}: {answer['died']}", "look at its last messages and free memory, then run again")


def _worse(first: BaseException | None, second: BaseException) -> BaseException:
    """The first failure counts; that others stopped because of it does not."""
    return second if first is None or (isinstance(first, Stopped) and not isinstance(second, Stopped)) else first
