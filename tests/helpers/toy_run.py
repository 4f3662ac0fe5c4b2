"""A small stage graph without torch, and a command that runs it: what the stage and fault tests kill and resume.

    python tests/toy_run.py RUN_DIR '{"seed": 1}' [--from STAGE] [--rerun-stale] [--jobs N] [--ranked]

TOY_SLEEP=seconds per row, TOY_FAIL=stage:how (data, crash, exit, full), TOY_EVENTS=file of starts and ends,
TOY_MEET=stages that wait for one another.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import sys
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from macpo.engine.console import run_cli
from macpo.engine.errors import DataError
from macpo.engine.files import Appender, atomic_write, read_jsonl, write_json, write_jsonl
from macpo.engine.progress import Progress
from macpo.engine.run.context import StageContext
from macpo.engine.run.runner import Runner
from macpo.engine.run.stages import Graph, Stage, StageInputs, StageWork
from macpo.engine.run.workers import Workers

CALLS: list[str] = []  # a module cache: what survives between the stages of one process


def _enter(ctx: StageContext) -> None:
    CALLS.append(ctx.name)
    ctx.note(calls=len(CALLS), pid=os.getpid(), omp=int(os.environ.get("OMP_NUM_THREADS", 0)))
    _event(ctx, "start")
    _meet(ctx)
    stage, _, how = os.environ.get("TOY_FAIL", "").partition(":")
    if stage == ctx.name:
        if how == "data":
            raise DataError("the row is no good", "mend it", file="input.jsonl", line=3)
        if how == "crash":
            raise ZeroDivisionError("a bug")
        if how == "exit":
            os._exit(9)
        if how == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))


def _meet(ctx: StageContext) -> None:
    """Waits until every stage named in TOY_MEET has begun, this one among them."""
    names = os.environ.get("TOY_MEET", "").split()
    limit = time.monotonic() + 30
    while ctx.name in names:
        lines = Path(os.environ["TOY_EVENTS"]).read_text().splitlines()
        if {line.split()[1] for line in lines if line.startswith("start ")} >= set(names):
            return
        if time.monotonic() > limit:
            raise DataError(f"{ctx.name} waited in vain for {names}", "run them side by side")
        time.sleep(0.01)


def _work(seconds: float) -> None:
    """Busy for so long, in short sleeps: a signal between Python's check and a long sleep would wait for its end."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.05))


def _event(ctx: StageContext, what: str) -> None:
    if "TOY_EVENTS" in os.environ:
        with open(os.environ["TOY_EVENTS"], "a") as file:
            file.write(f"{what} {ctx.name} {os.getpid()}\n")


class From(StageInputs):
    data: str | None = None
    rows: str | None = None
    a: str | None = None
    b: str | None = None
    first: str | None = None


class Toy(StageWork):
    inputs: From = From()

    def run(self, ctx: StageContext) -> None:
        _enter(ctx)
        self.write(ctx)
        _event(ctx, "end")

    @abstractmethod
    def write(self, ctx: StageContext) -> None: ...

    def rows(self, ctx: StageContext) -> list[dict[str, Any]]:
        """The rows of all inputs, in the order of their aliases."""
        names = [name for _, name in sorted(self.inputs.by_alias().items())]
        return [row for name in names for _, row in read_jsonl(ctx.input(name) / "rows.jsonl")]


class MakeData(Toy):
    name = "make_data"
    seed: int
    num_rows: int = 1
    note: str = ""

    def write(self, ctx: StageContext) -> None:
        write_jsonl(ctx.dir / "rows.jsonl", ({"id": i, "text": f"row {self.seed} {i}"} for i in range(self.num_rows)))
        ctx.log(f"{self.num_rows} rows")


class Transform(Toy):
    """Row by row into an append-only file: an interrupted attempt resumes behind its last row."""

    name = "transform"
    continued = ("rows.jsonl",)
    salt: str
    i: int = 0

    def write(self, ctx: StageContext) -> None:
        rows = self.rows(ctx)
        done = Progress(ctx.name, "rows", len(rows), last=True)
        with Appender(ctx.dir / "rows.jsonl") as log, done:
            ctx.note(resumed_at=len(log.rows))
            for number, row in enumerate(rows[len(log.rows) :], len(log.rows)):
                done.update(number, tokens_per_s=1234.5)
                _work(float(os.environ.get("TOY_SLEEP", 0)))
                ctx.check_stop()
                text = hashlib.sha256(f"{self.salt} {row['text']}".encode()).hexdigest()
                log.add([{"id": row["id"], "text": text, "pad": "x" * 200}])
        (ctx.dir / "model").mkdir(exist_ok=True)
        atomic_write(ctx.dir / "model" / "weights.bin", bytes(range(256)) * 64)
        ctx.note(tokens=len(rows))


class Join(Toy):
    name = "join"
    i: int = 0

    def write(self, ctx: StageContext) -> None:
        rows = self.rows(ctx)
        write_jsonl(ctx.dir / "rows.jsonl", rows[: len(rows) // 2])
        write_json(ctx.dir / "summary.json", {"rows": len(rows)})


class Shards(StageWork):
    """Every rank writes a file of its own and says so to the others."""

    name = "shards"
    config: dict[str, Any]
    inputs: From = From()

    def run(self, ctx: StageContext) -> None:
        if ctx.world.rank == 1:
            _enter(ctx)
        write_json(ctx.dir / f"shard-{ctx.world.rank}.json", {"rank": ctx.world.rank, "size": ctx.world.size})
        if ctx.world.gather(ctx.world.rank) != list(range(ctx.world.size)):
            raise DataError("the ranks do not hear each other", "check gather")


def build_ranked(config: Mapping[str, Any]) -> Graph:
    """shards -> more, for runs of several ranks."""
    graph = Graph()
    first = graph.add(Stage("shards", Shards(config=dict(config))))
    graph.add(Stage("more", Shards(config={"again": True}, inputs=From(first=first))))
    return graph


def build(config: Mapping[str, Any]) -> Graph:
    """data -> (a1, b1) -> join1 -> (a2, b2) -> join2; `config`: seed, salt, num_rows, extra (another arm)."""
    graph = Graph()
    last = graph.add(Stage("data", MakeData(seed=config.get("seed", 1), num_rows=config.get("num_rows", 6))))
    if config.get("extra"):
        graph.add(Stage("extra", Transform(salt="extra", inputs=From(data=last))))
    for i in (1, 2):
        salts = {"a": config.get("salt", "s"), "b": "t"}
        for arm, salt in salts.items():
            graph.add(Stage(f"{arm}{i}", Transform(salt=salt, i=i, inputs=From(data=last))))
        last = graph.add(Stage(f"join{i}", Join(i=i, inputs=From(a=f"a{i}", b=f"b{i}"))))
    return graph


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("config", type=json.loads)
    parser.add_argument("--from", dest="from_stage")
    parser.add_argument("--rerun-stale", action="store_true")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("--ranked", action="store_true", help="several ranks, as torchrun describes them")
    options = parser.parse_args()
    if options.ranked:
        return _ranked(options.run_dir, options.config)
    runner = Runner(
        options.run_dir,
        build(options.config),
        from_stage=options.from_stage,
        rerun_stale=options.rerun_stale,
        workers=Workers(options.jobs, options.threads, ("toy_run:build", options.config)),
    )
    return run_cli(runner.run, debug=options.debug)


def _ranked(run_dir: Path, configs: Sequence[Mapping[str, Any]]) -> int:
    from macpo.engine.distributed.world import finish, init_from_env

    world = init_from_env(20)
    try:
        return max(run_cli(Runner(run_dir, build_ranked(config), world=world).run) for config in configs)
    finally:
        finish()  # as engine/train.py does; gloo's threads sometimes abort a process that ends with a live group


if __name__ == "__main__":
    sys.exit(main())
