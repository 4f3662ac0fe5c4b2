"""Everything that a GPU has to tell, in one call that fits into ten minutes and may be killed at any moment.

    python -m bench.gpu_suite --out DIR                       # on a GPU; --minutes 9.3, --only NAME,..., --data FOLDER
    python -m bench.gpu_suite --out DIR --resume FILE         # go on from an archive; without it, from DIR's own
    python -m bench.gpu_suite --list                          # parts, limits and their sum
    python -m bench.gpu_suite --dry-run                       # every part to its end at small sizes, on a CPU
    python -m bench.gpu_suite --publish DIR/results.tar.gz    # write its results into bench/results/<device>

Parts run in an order by worth: tests that need a GPU, losses and scoring, sampling, training steps, generation, a
profile, attention, rivals, then the rest while time is left. Each is a process group of its own with a limit, and is
killed as a group when it ends. DIR/results.tar.gz is rewritten every 15 s; a part that is finished in it, by the same
code, is not run again. The package need not be installed; what a bare machine lacks is named, and can be given on
PYTHONPATH. Pairs are HH-RLHF's where shared/data/hh-rlhf lies in or beside the checkout, else generated.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.gpu import machine
from bench.gpu.parts import MINUTES, Part, all_parts, listing
from bench.gpu.publish import publish
from bench.gpu.runner import Runner
from bench.gpu.store import Outcome, Store, write_json
from bench.gpu.summary import table
from bench.inputs.hh import GENERATED, HH

DRY_JOBS = 2  # parts side by side where nothing is timed


def plan(parts: Sequence[Part], store: Store, small: bool, code: str) -> list[tuple[Part, Outcome]]:
    """Return what is to run, with the reason for what cannot; parts that were tried before come last."""
    cuda = small or machine.has_cuda()
    todo = []
    for part in parts:
        if store.finished(part.name, code, small):
            print(f"== {part.name}: done before", flush=True)
            continue
        missing = machine.lacking((*machine.NEEDED, *part.needs))
        reason = f"not installed: {', '.join(missing)}" if missing else ""
        if small and not part.small:
            reason = f"needs CUDA: {part.why_cuda}"
        elif not cuda:
            reason = "torch finds no GPU here (--dry-run runs the parts on a CPU)"
        todo.append((part, Outcome(part.name, "", code, small, reason=reason)))
    return sorted(todo, key=lambda entry: store.outcome(entry[0].name) is not None)


@contextmanager
def python(warm: bool, environment: dict[str, str], folder: Path) -> Iterator[list[str]]:
    """Yield the command that runs a part's arguments; `warm`, one that has torch imported already, with one thread."""
    if not warm:
        yield [sys.executable]
        return
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # a GPU does not outlive the forks
    socket, client = str(folder / "warm"), [sys.executable, "-m", "bench.gpu.warm"]
    server = subprocess.Popen([*client, "serve", socket], env=environment, cwd=machine.ROOT)
    try:
        yield [*client, socket]
    finally:
        server.kill()
        server.wait()


def run(args: argparse.Namespace, parts: Sequence[Part]) -> int:
    """Run the parts that are not done; print the table; return 1 where one of them failed."""
    end = time.monotonic() + args.minutes * 60
    about = machine.describe()
    data = args.data or (str(HH) if HH.exists() else GENERATED)
    with TemporaryDirectory(prefix="macpo-suite-") as folder:
        work, links = Path(folder) / "work", Path(folder) / "links"
        work.mkdir()
        links.mkdir()
        try:
            store = Store(args.out, work, args.resume)
        except (OSError, tarfile.TarError) as error:
            raise SystemExit(f"error: {args.resume or args.out}: {error}") from error
        write_json(work / "suite.json", {**about, "data": data, "commit": args.commit, "minutes": args.minutes})
        print(f"gpu_suite: {about['gpu'] or 'no nvidia-smi'}, {about['cpus']} CPUs, code {about['code']}")
        print(f"missing here: {', '.join(about['missing']) or 'nothing'}\npairs: {data}", flush=True)
        environment = machine.environment(links)
        if args.commit:
            environment["BENCH_COMMIT"] = args.commit
        todo = plan(parts, store, args.dry_run, about["code"])
        try:
            with python(args.dry_run, environment, Path(folder)) as command:
                Runner(store, environment, command, data, end).run(todo, DRY_JOBS if args.dry_run else 1)
        except KeyboardInterrupt:
            print("== stopped; the archive holds what is done", flush=True)
        print("\n".join(table(store, parts)), flush=True)
        outcomes = [store.outcome(part.name) for part, _ in todo]
    return int(any(outcome is None or outcome.status not in ("done", "skipped") for outcome in outcomes))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the archive; with --dry-run a temporary one by default")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--resume", type=Path, metavar="FILE", help="archive of an earlier call")
    parser.add_argument("--only", default="", metavar="NAME,...", help="parts whose name holds one of these")
    parser.add_argument("--data", metavar="FOLDER", help=f"pairs of HH-RLHF's layout, or `{GENERATED}`")
    parser.add_argument("--commit", default="", help="what results say where there is no git")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--publish", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    parts = [part for part in all_parts() if any(word in part.name for word in args.only.split(","))]
    if args.list:
        print(listing(parts))
        return 0
    if args.publish:
        try:
            print("\n".join(map(str, publish(args.publish, parts, machine.ROOT / "bench" / "results"))))
        except (OSError, ValueError, tarfile.TarError) as error:
            raise SystemExit(f"error: {error}") from error
        return 0
    if args.out is None and not args.dry_run:
        parser.error("--out is needed")
    with TemporaryDirectory(prefix="macpo-dry-") as folder:
        args.out = (args.out or Path(folder)).resolve()
        return run(args, parts)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as by Ctrl-C: parts are killed, the archive is written
    raise SystemExit(main())
