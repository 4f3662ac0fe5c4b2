"""Every Triton kernel and configuration compiles for real GPUs within its bounds, and the check would notice if not.

Each test is a process of its own: kernels are defined for the interpreter or for a GPU when they are imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from macpo.kernels import triton_support

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))  # where `python -m bench.x` finds it

from bench.compile_report import environment as prepared  # noqa: E402

pytestmark = pytest.mark.skipif(not triton_support.INSTALLED, reason="needs Triton")

TOYS = """
import triton
import triton.language as tl
from macpo.kernels.triton_support import AotKernel


@triton.jit
def gemm(p_a, p_b, p_c, K, BLOCK: tl.constexpr):
    rows, cols = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK):
        acc = tl.dot(tl.load(p_a + rows * K + k + cols), tl.load(p_b + (k + rows) * BLOCK + cols), acc)
    tl.store(p_c + rows * BLOCK + cols, acc)


@triton.jit
def normalise(p_a, p_b, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(p_a + at)
    tl.store(p_b + at, x / tl.sum(x, 0))


@triton.jit
def switched(p, A: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(p + tl.arange(0, BLOCK), 0.0)


@triton.jit
def scarce(p, A: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(p + tl.arange(0, BLOCK), 0.0)


def aot_kernels():
    matrices = {"p_a": "*bf16", "p_b": "*bf16", "p_c": "*fp32", "K": "i32"}
    aligned = ("p_a", "p_b", "p_c", "K")
    rows = {"p_a": "*fp32", "p_b": "*fp32"}
    return [
        AotKernel("gemm/64", gemm, matrices, {"BLOCK": 64}, aligned=aligned, wgmma=True),
        AotKernel("gemm/32", gemm, matrices, {"BLOCK": 32}, aligned=aligned, capabilities=(80,)),
        AotKernel("gemm/128", gemm, matrices, {"BLOCK": 128}, num_stages=5, num_warps=8, aligned=aligned,
                  capabilities=(90,), max_spill_bytes=10**6),
        AotKernel("gemm/rare", gemm, matrices, {"BLOCK": 16}, aligned=aligned, rare=True, capabilities=(80,)),
        AotKernel("rows/fits", normalise, rows, {"BLOCK": 1024}),
        AotKernel("rows/spills", normalise, rows, {"BLOCK": 2048}, num_warps=1, max_registers=32),
        AotKernel("rows/may-spill", normalise, rows, {"BLOCK": 2048}, num_warps=1, max_registers=32,
                  max_spill_bytes=10**6),
        AotKernel("rows/no-wgmma", normalise, rows, {"BLOCK": 1024}, wgmma=True),
        AotKernel("rows/argument-left-out", normalise, {"p_a": "*fp32"}, {"BLOCK": 1024}),
        *(AotKernel(f"{name}/{a}{b}", kernel, {"p": "*fp32"}, {"A": a, "B": b, "BLOCK": 64 - 32 * (a and b)},
                    capabilities=(70,), wgmma=name == "scarce")
          for name, kernel in (("switch", switched), ("scarce", scarce)) for a in (False, True) for b in (False, True)),
    ]
"""


def report(tmp_path, *arguments: str, interpreted: bool = False) -> tuple[subprocess.CompletedProcess, dict]:
    """The finished process, and its rows by (name, target).

    `interpreted` leaves the interpreter on, as users of the tests' environment do, and the report has to leave it by a
    process of its own; else it is given what it would give itself, which saves an import of torch.
    """
    path = tmp_path / "rows.json"
    command = [sys.executable, "-m", "bench.compile_report", "--jobs", "1", "--json", str(path), *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1"} if interpreted else prepared(str(tmp_path / "cache"))
    environment["PYTHONPATH"] = str(tmp_path)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return done, {(row["name"], row["target"]): row for row in rows}


def passes(done: subprocess.CompletedProcess) -> None:
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


# `make aot` compiles every configuration. Here a size between is left out where a larger one of the same variant stands
# for it; of the attention kernels' variants with a softcap or sinks those of Gemma 2 and gpt-oss are taken; of float16
# and float32, which are bfloat16's with another type of element, the largest (below).
def test_the_largest_of_every_common_variant_compiles_for_sm_90(tmp_path):
    done, rows = report(tmp_path, "--target", "90", "--variants", "--common", "--skip", "fp")
    passes(done)
    assert len(rows) > 2 * len(triton_support.KERNEL_MODULES)


def test_the_largest_configuration_in_float16_and_float32_compiles_for_sm_90(tmp_path):
    done, rows = report(tmp_path, "--target", "90", "--largest", "--only", "fp")
    passes(done)
    assert rows and all("fp16" in name or "fp32" in name for name, _ in rows)


def test_the_largest_configuration_of_each_kernel_compiles_for_sm_80_and_sm_100(tmp_path):
    done, rows = report(tmp_path, "--target", "80", "100", "--largest")
    passes(done)
    assert {target for _, target in rows} == {80, 100}


def test_the_check_sees_spills_and_missing_wgmma(tmp_path):
    (tmp_path / "toy_kernels.py").write_text(TOYS)
    done, rows = report(tmp_path, "--target", "90", "--module", "toy_kernels", interpreted=True)
    problems = {name: row["problem"] for (name, _), row in rows.items()}
    assert done.returncode == 1
    assert {name for name, problem in problems.items() if not problem} == {"gemm/64", "rows/fits", "rows/may-spill"}
    assert "spills" in problems["rows/spills"] and "at most 0 allowed" in problems["rows/spills"]
    assert problems["rows/no-wgmma"] == "no wgmma"
    assert "shared memory" in problems["gemm/128"]
    assert "arguments missing ['p_b']" in problems["rows/argument-left-out"]
    fits = rows["rows/fits", 90]
    assert rows["gemm/64", 90]["wgmma"] and not fits["wgmma"]
    assert 0 < fits["registers"] <= 255 and fits["spill_store_bytes"] == fits["spill_load_bytes"] == 0
    assert rows["gemm/64", 90]["shared_bytes"] >= 2 * 64 * 64 * 2
    assert "8 compiled, 5 failed" not in done.stdout and "7 compiled, 4 failed" in done.stdout


CHOICE = """
from bench.compile_report import ISOLATED, jobs_of, main, unlisted
from macpo.kernels import triton_support
import os
module = "toy_kernels"
rare = (module, 3, 80)
assert rare in jobs_of([module], [80, 90], "gemm/")
every = jobs_of([module], [80, 90], "gemm/", common=True)
assert every == [(module, 0, 80), (module, 0, 90), (module, 1, 80), (module, 2, 90)], every
assert jobs_of([module], [80, 90], "gemm/", least="largest") == [(module, 0, 80), (module, 2, 90)]
assert jobs_of([module], [80, 90], "gemm/", "64", common=True) == [(module, 1, 80), (module, 2, 90)]
switches = [(module, place, 70) for place in range(9, 17)]
assert jobs_of([module], [70], least="largest") == [switches[0], switches[4]]
# Both switches on, in a smaller entry, are nothing new by themselves, and a new pair where wgmma is claimed.
assert jobs_of([module], [70], least="variants") == switches[:3] + switches[4:]
os.environ[ISOLATED] = "1"
assert main(["--module", module, "--only", "nothing"]) == 2

forgotten = unlisted()
assert not forgotten, forgotten
modules = triton_support.KERNEL_MODULES
triton_support.KERNEL_MODULES = ()
assert len(unlisted()) >= len(modules) > 0, unlisted()  # with nothing listed, every module's kernels are missed
"""


def python(code: str, folder: Path) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(folder)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_launch_that_names_no_stages_is_compiled_with_those_it_gets():
    from triton.backends.nvidia.compiler import CUDAOptions

    fields = triton_support.AotKernel.__dataclass_fields__
    assert fields["num_stages"].default == CUDAOptions.num_stages


def test_what_is_compiled_can_be_chosen_and_no_kernel_is_forgotten(tmp_path):
    (tmp_path / "toy_kernels.py").write_text(TOYS)
    done = python(CHOICE, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "no kernel of toy_kernels fits" in done.stderr
