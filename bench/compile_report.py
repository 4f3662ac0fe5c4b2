"""Every Triton kernel and configuration, compiled without a GPU: registers, shared memory, spills, wgmma.

    python -m bench.compile_report [--target 80 90 100] [--only TEXT] [--skip TEXT] [--common]
                                   [--largest | --variants] [--jobs 2] [--json PATH]

One row for each entry of `macpo.kernels.triton_support.aot_kernels()` and target it is chosen for. A row fails when
the compiler refuses it, when it spills more than the entry allows, needs more shared memory than the target has, or
lacks the wgmma instructions that the entry claims (sm_90 code). The exit status is 1 when any row fails, and when a
kernel of macpo.kernels has no entry.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import io
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from macpo.kernels import triton_support
from macpo.kernels.triton_support import AotKernel

TARGETS = (80, 90, 100)
# Most shared memory of one block, bytes: CUDA C++ Programming Guide, table "Technical Specifications".
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
ISOLATED = "MACPO_COMPILE_REPORT"  # set in the process whose environment main() has prepared


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel on one target; -1 where it did not compile."""

    name: str
    target: int
    registers: int = -1
    shared_bytes: int = -1
    spill_store_bytes: int = -1
    spill_load_bytes: int = -1
    wgmma: bool = False
    seconds: float = 0.0
    problem: str = ""


def size(entry: AotKernel) -> int:
    """Return the product of the integer constexprs: tiles and head sizes."""
    return math.prod(abs(value) or 1 for value in entry.constexprs.values() if type(value) is int)


def variant(entry: AotKernel) -> set[tuple[str, object]]:
    """Return what switches an entry sets, which arguments it has, and which of them are descriptors."""
    switches = {(name, value) for name, value in entry.constexprs.items() if value is None or type(value) is bool}
    return switches | {(name, kind.startswith("tensordesc")) for name, kind in entry.signature.items()}


def largest(entries: Sequence[AotKernel], variants: bool) -> list[AotKernel]:
    """Return, of each kernel function, the first entry of the largest `size`.

    It is the likeliest to run out of registers or shared memory. With `variants` those of the largest size, among
    equals of the most arguments, that show every choice of `variant`, and every two choices together where wgmma makes
    registers scarce.
    """
    seen: set[tuple[object, ...]] = set()
    kept = []
    for entry in sorted(entries, key=lambda entry: (-size(entry), -len(entry.signature) * variants)):
        shown: set[tuple[object, ...]] = {(id(entry.kernel),)}
        if variants:
            choices = sorted(variant(entry), key=str)
            shown |= {(id(entry.kernel), *some) for some in combinations(choices, 2 if entry.wgmma else 1)}
        if not shown <= seen:
            kept.append(entry)
        seen |= shown
    return kept


def jobs_of(
    modules: Sequence[str],
    targets: Sequence[int],
    only: str = "",
    skip: str = "",
    common: bool = False,
    least: str = "",
) -> list[tuple[str, int, int]]:
    """Return (module, place in its list, target) of every row to make: names that hold `only`, and not `skip` if given.

    `common` leaves out entries that are `rare`; `least`, "largest" or "variants", then leaves those of `largest` of
    each target.

    Raises:
        ValueError: two entries share a name.
    """
    found: list[tuple[AotKernel, tuple[str, int, int]]] = []
    names: set[str] = set()
    for module in modules:
        for place, entry in enumerate(import_module(module).aot_kernels()):
            if entry.name in names:
                raise ValueError(f"two entries of aot_kernels() are called {entry.name!r}")
            names.add(entry.name)
            left_out = (bool(skip) and skip in entry.name) or (common and entry.rare)
            if only in entry.name and not left_out:
                found += [(entry, (module, place, target)) for target in targets if target in entry.capabilities]
    if least:
        kept = {
            (entry.name, target)
            for target in targets
            for entry in largest([entry for entry, job in found if job[2] == target], least == "variants")
        }
        found = [(entry, job) for entry, job in found if (entry.name, job[2]) in kept]
    return [job for _, job in found]


def unlisted() -> list[str]:
    """Return kernels (@triton.jit functions that no other one calls) that no entry of aot_kernels() compiles."""
    from triton.runtime import JITFunction

    folder = Path(triton_support.__file__).parent
    kernels: dict[str, Any] = {}
    called: set[str] = set()
    for path in sorted(folder.rglob("*.py")):
        if "triton.jit" not in path.read_text(encoding="utf-8") or path.name == "triton_support.py":
            continue
        dotted = ".".join(("macpo.kernels", *path.relative_to(folder).with_suffix("").parts))
        for name, value in vars(import_module(dotted)).items():
            if isinstance(value, JITFunction) and value.fn.__module__ == dotted:
                kernels[f"{dotted}.{name}"] = value
                tree = ast.parse(textwrap.dedent(inspect.getsource(value.fn)))
                called |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - {name}
    listed = {id(entry.kernel) for entry in triton_support.aot_kernels()}
    return [name for name, kernel in kernels.items() if id(kernel) not in listed and name.split(".")[-1] not in called]


def compile_entry(job: tuple[str, int, int]) -> Row:
    """Compile one entry and check its bounds, so that its row says what is wrong."""
    module, place, target = job
    entry: AotKernel = import_module(module).aot_kernels()[place]
    start = time.perf_counter()
    try:
        shared, ptx, log = compile_ptx(entry, target)
        return checked(entry, target, shared, ptx, log, time.perf_counter() - start)
    except Exception as error:  # whatever the compiler raises is the row's verdict
        text = f"{type(error).__name__}: {error}".strip()
        return Row(entry.name, target, seconds=time.perf_counter() - start, problem=f"did not compile: {text}")


def compile_ptx(entry: AotKernel, target: int) -> tuple[int, str, str]:
    """Return the shared memory in bytes, the PTX, and the output of `ptxas -v`.

    Raises:
        ValueError: an argument of the kernel is neither in the entry's signature nor in its constexprs.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = entry.kernel.arg_names
    unknown = (set(entry.signature) | set(entry.constexprs) | set(entry.aligned)) - set(names)
    missing = [name for name in names if name not in entry.signature and name not in entry.constexprs]
    if unknown or missing:
        raise ValueError(f"{entry.name}: arguments missing {missing}, unknown {sorted(unknown)}")
    source = ASTSource(
        fn=entry.kernel,
        signature={name: "constexpr" if name in entry.constexprs else entry.signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in entry.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in entry.aligned},
    )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):  # Triton prints the log of its own ptxas run: see environment()
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", target, 32),
            options={"num_warps": entry.num_warps, "num_stages": entry.num_stages, "maxnreg": entry.max_registers},
        )
    return compiled.metadata.shared, compiled.asm["ptx"], printed.getvalue()


def checked(entry: AotKernel, target: int, shared: int, ptx: str, log: str, seconds: float) -> Row:
    """Return the row of a compiled entry, with every bound that it breaks."""
    used = [int(text) for text in re.findall(r"Used (\d+) registers", log)]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not used or not spills:
        raise ValueError(f"ptxas reported no resources: {log[-300:]!r}")
    stores, loads = max(int(a) for a, _ in spills), max(int(b) for _, b in spills)
    wgmma = "wgmma.mma_async" in ptx
    problems = []
    if max(stores, loads) > entry.max_spill_bytes:
        problems.append(f"spills {stores}+{loads} B, at most {entry.max_spill_bytes} allowed")
    if shared > SHARED_LIMIT.get(target, 2**63):
        problems.append(f"needs {shared} B of shared memory, sm_{target} has {SHARED_LIMIT[target]}")
    if entry.wgmma and target == 90 and not wgmma:
        problems.append("no wgmma")
    return Row(entry.name, target, max(used), shared, stores, loads, wgmma, seconds, "; ".join(problems))


def rows_of(jobs: Sequence[tuple[str, int, int]], num_processes: int) -> Iterator[Row]:
    """Yield rows in the order of `jobs`."""
    if num_processes == 1 or len(jobs) < 2:
        yield from map(compile_entry, jobs)
        return
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(compile_entry, jobs)


def environment(cache: str) -> dict[str, str]:
    """Return the environment of a compiling process: real kernels, no cache, ptxas' log on stdout."""
    changed = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {
        **changed,
        "TRITON_CACHE_DIR": cache,
        "TRITON_ALWAYS_COMPILE": "1",
        "TRITON_DUMP_PTXAS_LOG": "1",
        "TRITON_DEFAULT_FP_FUSION": os.environ.get("TRITON_DEFAULT_FP_FUSION", "1"),  # Triton 3.10 changes the default
        ISOLATED: "1",
    }


def show(row: Row, width: int) -> None:
    verdict = "ok" if not row.problem else "FAIL: " + " ".join(row.problem.split())[:160]
    spills = f"{row.spill_store_bytes}/{row.spill_load_bytes}"
    wgmma = "yes" if row.wgmma else "no"
    print(
        f"{row.name:{width}}  sm_{row.target:<4}{row.registers:>5}{row.shared_bytes:>9}{spills:>12}{wgmma:>7}"
        f"{row.seconds:>7.1f}  {verdict}",
        flush=True,
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", type=int, nargs="+", default=list(TARGETS), help="compute capabilities")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="entries whose name holds this")
    parser.add_argument("--skip", default="", metavar="SUBSTRING", help="no entries whose name holds this")
    parser.add_argument("--common", action="store_true", help="without what few models need")
    least = parser.add_mutually_exclusive_group()
    for name, what in (("largest", "one configuration of each kernel"), ("variants", "of each kernel and variant")):
        least.add_argument(f"--{name}", action="store_const", const=name, dest="least", default="", help=what)
    parser.add_argument("--module", nargs="+", help="modules with aot_kernels(); default the project's")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--json", type=Path, help="write the rows there")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if not triton_support.INSTALLED:
        print("error: Triton is not installed. Fix: pip install 'triton>=3.6'", file=sys.stderr)
        return 2
    if ISOLATED not in os.environ:  # TRITON_INTERPRET is read when kernels are defined: start afresh without it
        with tempfile.TemporaryDirectory(prefix="macpo-compile-") as cache:
            command = [sys.executable, "-m", "bench.compile_report", *(sys.argv[1:] if argv is None else argv)]
            return subprocess.run(command, env=environment(cache), check=False).returncode

    modules = args.module or triton_support.KERNEL_MODULES
    jobs = jobs_of(modules, args.target, args.only, args.skip, args.common, args.least)
    if not jobs:
        print(f"error: no kernel of {', '.join(modules) or 'no module'} fits --only {args.only!r}", file=sys.stderr)
        return 2
    entries = {module: import_module(module).aot_kernels() for module in modules}
    width = max(len(entries[module][place].name) for module, place, _ in jobs)
    print(f"triton {version('triton')}; bytes a block, bytes a thread, seconds to compile")
    print(
        f"{'kernel/configuration':{width}}  {'target':7}{'regs':>5}{'shared':>9}{'spill st/ld':>12}{'wgmma':>7}{'s':>7}"
    )
    rows = []
    for row in rows_of(jobs, args.jobs):
        rows.append(row)
        show(row, width)
    failed = [row for row in rows if row.problem]
    forgotten = [] if args.module else unlisted()
    for name in forgotten:
        print(f"FAIL: {name} is a kernel that no entry of aot_kernels() compiles")
    print(f"{len(rows)} compiled, {len(failed)} failed")
    if args.json:
        args.json.write_text(json.dumps({"triton": version("triton"), "rows": [asdict(row) for row in rows]}, indent=1))
    return 1 if failed or forgotten else 0


if __name__ == "__main__":
    raise SystemExit(main())
