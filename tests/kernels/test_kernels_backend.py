"""Which backend runs and why; what the package needs to be imported."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from kernel_checks import NATIVE
from packaging.requirements import Requirement
from torch import Tensor

from macpo.kernels import (
    BackendError,
    Choice,
    SampleParams,
    Segments,
    explain,
    linear_logp,
    native,
    paged_attention,
    pair_loss,
    prefix_attention,
    sample,
    slot_attention,
    triton_support,
    use_backend,
)
from macpo.kernels.backend import IMPLEMENTED
from macpo.kernels.linear_logp import rows_torch

ROOT = Path(__file__).parents[2]


def calls() -> dict[str, object]:
    """Each public operator on the smallest input, as a function of `backend`."""
    hidden, weight, target = torch.zeros(2, 1), torch.zeros(3, 1), torch.zeros(2, dtype=torch.int64)
    one, pool = torch.zeros(1, 1, 2), torch.zeros(1, 1, 1, 2)
    int32 = torch.int32
    return {
        "linear_logp": lambda b: linear_logp(hidden, weight, target, backend=b),
        "pair_loss": lambda b: pair_loss(hidden, weight, target, torch.tensor([0, 1, 2], dtype=int32), backend=b),
        "prefix_attention": lambda b: prefix_attention(one, one, one, Segments.from_lengths([(1, [])]), backend=b),
        "paged_attention": lambda b: paged_attention(
            one, pool, pool, torch.zeros(1, 1, dtype=int32), torch.ones(1, dtype=int32), backend=b
        ),
        "slot_attention": lambda b: slot_attention(one, pool, pool, torch.ones(1, dtype=torch.int64), backend=b),
        "sample": lambda b: sample(
            torch.zeros(1, 3), SampleParams(0, batch=1), torch.zeros(1, 3).long(), torch.zeros(1).long(), backend=b
        ),
    }


@pytest.fixture(autouse=True)
def no_choice_from_outside(monkeypatch):
    monkeypatch.delenv("MACPO_BACKEND", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # as a user has it; kernels that are loaded keep what they saw


@pytest.mark.parametrize("op", IMPLEMENTED)
def test_every_operator_takes_torch_and_refuses_what_it_lacks_by_name(op):
    call = calls()[op]
    call("torch")
    with pytest.raises(BackendError, match="unknown backend 'cudnn'"):
        call("cudnn")
    lacking = {"triton", "native"} - set(IMPLEMENTED[op]) - ({"native"} if native.module is None else set())
    for name in lacking:
        with pytest.raises(BackendError, match=f"{op} has no '{name}' backend.*it has: {', '.join(IMPLEMENTED[op])}"):
            call(name)
        with use_backend(name):
            call(None)
            assert explain(op, "cpu") == Choice("torch", f"use_backend forces {name}, which {op} does not have")


@pytest.mark.parametrize("op", [op for op, backends in IMPLEMENTED.items() if "triton" in backends])
def test_triton_takes_no_cpu_tensors(op, monkeypatch):
    call = calls()[op]
    reason = "takes them under TRITON_INTERPRET=1 only" if triton_support.INSTALLED else "Triton is not installed"
    with pytest.raises(BackendError, match=f"{op}: backend 'triton' cannot be used: .*{reason}"):
        call("triton")
    with use_backend("triton"), pytest.raises(BackendError, match=reason):
        call(None)
    monkeypatch.setenv("MACPO_BACKEND", "triton")
    with pytest.raises(BackendError, match=reason):
        call(None)
    monkeypatch.setattr(triton_support, "INSTALLED", False)
    with pytest.raises(BackendError, match="Triton is not installed; `pip install"):
        call("triton")
    monkeypatch.setattr(triton_support, "INSTALLED", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert explain(op, "cpu", "triton").backend == "triton"
    with pytest.raises(BackendError, match="for CUDA tensors, these are on mps"):
        explain(op, "mps", "triton")


def test_operators_and_table_agree():
    assert set(calls()) == set(IMPLEMENTED)


@pytest.mark.parametrize("op", IMPLEMENTED)
@pytest.mark.parametrize("installed", [True, False])
def test_the_default_goes_by_device_and_says_why(op, installed, monkeypatch):
    monkeypatch.setattr(triton_support, "INSTALLED", installed)
    has = IMPLEMENTED[op]
    assert explain(op, "cuda").backend == ("triton" if installed and "triton" in has else "torch")
    assert explain(op, "cuda:1") == explain(op, "cuda")
    assert explain(op, "mps").backend == "torch"
    if not installed:
        assert "Triton is not installed" in explain(op, "cuda").why
    elif "triton" in has:
        assert explain(op, "cuda").why == "CUDA tensors and Triton is installed"
        assert explain(op, "mps").why == "the Triton kernels are for CUDA tensors, these are on mps"
    for interpret in ("0", "1"):  # the interpreter is for tests: never the default
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        if "native" in has and native.module is not None:
            assert explain(op, "cpu") == Choice("native", "CPU tensors and the native extension is built")
        elif "native" in has:
            assert explain(op, "cpu") == Choice("torch", native.why_absent)
        else:
            assert explain(op, "cpu") == Choice("torch", f"{op} has no other backend for CPU tensors")


def test_what_forces_a_backend_and_in_which_order(monkeypatch):
    with use_backend("torch"):
        assert explain("sample", "cpu") == Choice("torch", "use_backend forces torch")
        assert explain("sample", "cuda") == Choice("torch", "use_backend forces torch")
        if native.module is not None:
            assert explain("sample", "cpu", "native") == Choice("native", "backend='native' was passed to sample")
    monkeypatch.setenv("MACPO_BACKEND", "torch")
    assert explain("sample", "cpu") == Choice("torch", "MACPO_BACKEND forces torch")
    monkeypatch.setenv("MACPO_BACKEND", "fast")
    with use_backend("torch"):  # an inner choice hides the outer one
        assert explain("sample", "cpu").backend == "torch"
    with pytest.raises(BackendError, match="unknown backend 'fast'; known: triton, native, torch"):
        explain("sample", "cpu")
    with pytest.raises(BackendError, match="unknown backend 'fast'"), use_backend("fast"):
        pass


@pytest.mark.parametrize("backend", [NATIVE])
def test_forcing_native_leaves_operators_without_it(backend):
    for op, has in IMPLEMENTED.items():
        with use_backend(backend):
            assert explain(op, "cpu").backend == ("native" if "native" in has else "torch")
        if "native" in has:
            with pytest.raises(BackendError, match="for CPU tensors, these are on cuda"):
                explain(op, "cuda", "native")


def test_without_the_extension_torch_runs_and_says_so(monkeypatch):
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "why_absent", "not built here")
    assert explain("linear_logp", "cpu") == Choice("torch", "not built here")
    with pytest.raises(BackendError, match="'native' cannot be used: not built here"):
        calls()["sample"]("native")
    with pytest.raises(BackendError, match="not built here"), use_backend("native"):
        pass
    for call in calls().values():
        call(None)


@pytest.mark.parametrize("backend", [NATIVE])
def test_the_named_backend_is_the_one_that_runs(backend, monkeypatch):
    used = []

    def spy(name: str, kernel):
        return lambda *args: used.append(name) or kernel(*args)

    monkeypatch.setattr(native, "row_logp", spy("native", native.row_logp))
    monkeypatch.setattr(rows_torch, "row_logp", spy("torch", rows_torch.row_logp))
    for name in ("native", "torch"):
        calls()["linear_logp"](name)
    wide: tuple[Tensor, ...] = (torch.zeros(2, 1).double(), torch.zeros(3, 1).double())
    linear_logp(*wide, torch.zeros(2).long(), backend="native")  # float64 is torch's in either case
    assert used == ["native", "torch", "torch"]


ALONE = """
import importlib.util, sys
for name in ("transformers", "triton", "numpy", "peft", "pydantic", "packaging"):
    assert importlib.util.find_spec(name) is None, name
WITHOUT_EXTENSION
import torch, macpo.kernels as k
hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
target, cu = torch.arange(5), torch.tensor([0, 2, 5], dtype=torch.int32)
logp = k.linear_logp(hidden, weight, target)
logp.sum().backward()
k.pair_loss(hidden, weight, target, cu, k.sequence_sums(logp.detach(), cu)).loss.backward()
q = torch.randn(7, 2, 8, requires_grad=True)
k.prefix_attention(q, q, q, k.Segments.from_lengths([(3, [2, 2])])).sum().backward()
assert all(x.grad.isfinite().all() and x.grad.any() for x in (hidden, weight, q))
k.sample(torch.zeros(2, 5), k.SampleParams(0, batch=2), torch.zeros(2, 3).long(), torch.zeros(2).long())
pool, table = torch.randn(2, 4, 1, 8), torch.tensor([[1]], dtype=torch.int32)
k.paged_attention(torch.randn(1, 2, 8), pool, pool, table, torch.tensor([3], dtype=torch.int32))
print(k.explain("sample", "cpu").backend, k.__file__)
"""


def link_distribution(name: str, site: Path, seen: set[str]) -> None:
    """Link what a distribution installed into another site-packages, with all that it requires without extras."""
    if name in seen or name == "triton":  # a CUDA build of torch brings Triton, but its operators do not need it
        return
    seen.add(name)
    found = distribution(name)
    for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
        if not top.endswith(".pth") and not (site / top).exists():
            (site / top).symlink_to(Path(str(found.locate_file(top))))
    for line in found.requires or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            link_distribution(requirement.name, site, seen)


@pytest.fixture(scope="module")
def torch_alone(tmp_path_factory) -> Path:
    """The Python of a virtual environment that holds torch, what torch requires, and macpo.kernels."""
    home = tmp_path_factory.mktemp("torch_alone")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True, timeout=60)
    (site,) = home.glob("lib/python3*/site-packages")
    link_distribution("torch", site, set())
    (site / "macpo").mkdir()
    (site / "macpo" / "__init__.py").symlink_to(ROOT / "macpo" / "__init__.py")
    (site / "macpo" / "kernels").symlink_to(ROOT / "kernels")
    return home / "bin" / "python"


@pytest.mark.parametrize("extension", [True, False], ids=["torch alone", "no extension"])
def test_kernels_need_torch_alone(torch_alone, extension):
    script = ALONE.replace("WITHOUT_EXTENSION", "" if extension else "sys.modules['macpo.kernels._native'] = None")
    done = subprocess.run([torch_alone, "-I", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    backend, file = done.stdout.split()
    assert backend == ("native" if extension and native.module is not None else "torch")
    assert file.startswith(str(torch_alone.parents[1]))
