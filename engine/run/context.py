"""What a running stage is given: its folder, its inputs, the ranks it runs on, and ways to report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from macpo.engine.console import notice
from macpo.engine.distributed import watchdog
from macpo.engine.distributed.agree import is_main, stopped
from macpo.engine.errors import printable
from macpo.engine.processes import StopFlag
from macpo.engine.run.manifest import STAGE_LOG

if TYPE_CHECKING:
    from macpo.engine.distributed.world import World


@dataclass
class StageContext:
    """What a running stage is given: a folder to write into, its inputs, and ways to report.

    Of what an interrupted attempt with the same key left, the folder holds what the stage names as its `scratch` and
    `continued`: it resumes from there.
    """

    name: str
    dir: Path
    inputs: Mapping[str, Path]
    """Name of each input stage -> its committed folder, verified by its hashes."""
    stop: StopFlag
    group: World | None = None
    counts: dict[str, Any] = field(default_factory=dict)
    needed: frozenset[Path] | None = None
    """Folders of finished stages that this stage or one after it reads; None where that is not known."""

    @property
    def world(self) -> World:
        """The ranks that run this stage together (one, without torch.distributed)."""
        if self.group is None:
            from macpo.engine.distributed.world import World

            self.group = World()
        return self.group

    def input(self, stage: str) -> Path:
        """The folder of an input stage."""
        return self.inputs[stage]

    def stop_requested(self) -> bool:
        """Whether this rank was asked to stop. Ranks hear it at different moments: agree before acting on it.

        Asking also tells the watchdog that this rank is alive.
        """
        watchdog.beat()
        return self.stop.requested

    def check_stop(self) -> None:
        """Raises: Stopped if this rank was asked to stop; call it where the work so far is on disk."""
        if self.stop_requested():
            raise stopped(self.name)

    def note(self, **counts: Any) -> None:
        """Numbers for the timing and the summary (tokens=…): those of the whole stage, taken from rank 0."""
        self.counts.update(counts)

    def log(self, message: str) -> None:
        """A line in stage.log and, unless another stage has said the same, on stderr; from rank 0."""
        if is_main(self.group):
            notice(message, of=self.name)
            with open(self.dir / STAGE_LOG, "a", encoding="utf-8") as file:
                file.write(printable(message) + "\n")
