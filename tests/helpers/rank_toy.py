"""One rank of a toy job without torch, for the tests of the launcher: rank_toy.py WHAT FOLDER."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from macpo.engine.console import run_cli
from macpo.engine.distributed.launcher import PARENT, launch, leave_error
from macpo.engine.errors import Again, DataError, PeerError, Stopped
from macpo.engine.processes import StopFlag, die_with

GRACE_S = 1.0


def act(what: str, folder: Path, stop: StopFlag) -> None:
    rank = int(os.environ["RANK"])
    assert (os.environ["WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"]) == ("2", "2")
    (folder / f"started-{rank}").write_text(str(os.getpid()))
    if what == "again" and not (folder / "note").exists():
        if rank == 1:
            (folder / "note").write_text("smaller")
            raise Again("too large", "run the same command again")
        raise PeerError("another rank failed", "look there")
    if what in ("data", "crash", "kill", "exit") and rank == 0:
        while not (folder / "failing").exists():
            time.sleep(0.01)
        raise PeerError("another rank failed", "look there")  # as a collective does, before rank 1 has ended
    if what in ("data", "crash", "kill", "exit"):
        (folder / "failing").write_text("")
        time.sleep(0.2)
    if what == "data":
        raise DataError("the row is no good", "mend it", file="input.jsonl", line=3)
    if what == "crash":
        raise ZeroDivisionError("a bug")
    if what == "kill":
        os.kill(os.getpid(), 9)
    if what == "exit":
        os._exit(9)
    if what == "hang" and rank == 0:
        raise PeerError("in stage s: step 3: another rank failed or hangs", "look there")
    if what in ("hang", "deaf"):
        time.sleep(60)
    while what == "save" and not stop.requested:
        time.sleep(0.01)
    if what == "save":
        time.sleep(0.3 + rank)
        (folder / f"saved-{rank}").write_text("")
        raise Stopped("stopped after step 5", "run the same command again")


def join(folder: Path) -> None:
    """Rank 1 waits for rank 0, which never comes."""
    from macpo.engine.distributed.world import init_from_env  # imports torch

    (folder / f"started-{os.environ['RANK']}").write_text(str(os.getpid()))
    if os.environ["RANK"] == "1":
        init_from_env()
    time.sleep(60)


def main() -> int:
    what, folder = sys.argv[1], Path(sys.argv[2])
    if "RANK" not in os.environ:
        return run_cli(lambda: launch([sys.executable, __file__, what, str(folder)], 2, grace_s=GRACE_S))
    if PARENT in os.environ:  # torchrun starts ranks, too
        die_with(int(os.environ[PARENT]))
    if what == "importing":  # as a rank that imports torch, which takes seconds
        (folder / f"started-{os.environ['RANK']}").write_text(str(os.getpid()))
        time.sleep(0.5)
        return run_cli(lambda: time.sleep(60), report=leave_error)
    if what == "joining":
        return run_cli(lambda: join(folder), report=leave_error)
    with StopFlag() as stop:
        return run_cli(lambda: act(what, folder, stop), report=leave_error)


if __name__ == "__main__":
    sys.exit(main())
