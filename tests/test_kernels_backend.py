"""Which backend runs and why; what the package needs to be imported."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from kernel_checks import NATIVE
from torch import Tensor

from macpo.kernels import (
    BackendError,
    SampleParams,
    Segments,
    explain,
    linear_logp,
    native,
    paged_attention,
    pair_loss,
    prefix_attention,
    sample,
    use_backend,
)
from macpo.kernels.backend import IMPLEMENTED
from macpo.kernels.linear_logp import rows


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
        "sample": lambda b: sample(
            torch.zeros(1, 3), SampleParams(0, batch=1), torch.zeros(1, 3).long(), torch.zeros(1).long(), backend=b
        ),
    }


@pytest.mark.parametrize("op", IMPLEMENTED)
def test_every_operator_takes_torch_and_refuses_what_it_lacks_by_name(op):
    call = calls()[op]
    call("torch")
    with pytest.raises(BackendError, match=f"{op} has no 'triton' backend"):
        call("triton")
    with pytest.raises(BackendError, match="unknown backend 'cudnn'"):
        call("cudnn")
    if "native" not in IMPLEMENTED[op] and native.module is not None:
        with pytest.raises(BackendError, match=f"{op} has no 'native' backend"):
            call("native")
    with use_backend("triton"), pytest.raises(BackendError, match=f"{op} has no 'triton' backend"):
        call(None)


def test_operators_and_table_agree():
    assert set(calls()) == set(IMPLEMENTED)


def test_default_and_forced_choice_say_why(monkeypatch):
    monkeypatch.delenv("MACPO_BACKEND", raising=False)
    choice = explain("sample", "cpu")
    if native.module is not None:
        assert (choice.backend, choice.why) == ("native", "CPU tensors and the native extension is built")
    else:
        assert choice.backend == "torch" and choice.why == native.why_absent
    assert "these are on cuda" in explain("sample", "cuda").why or native.module is None
    assert explain("prefix_attention", "cpu").why == "prefix_attention has no other backend"
    with use_backend("torch"):
        assert explain("sample", "cpu").why == "use_backend forces torch"
    monkeypatch.setenv("MACPO_BACKEND", "torch")
    assert explain("sample", "cpu").why == "MACPO_BACKEND forces torch"
    monkeypatch.setenv("MACPO_BACKEND", "fast")
    with pytest.raises(BackendError, match="unknown backend 'fast'"):
        explain("sample", "cpu")


@pytest.mark.parametrize("backend", [NATIVE])
def test_forcing_native_leaves_operators_without_it(backend):
    with use_backend(backend):
        assert explain("sample", "cpu").backend == "native"
        assert explain("prefix_attention", "cpu").backend == "torch"
    with pytest.raises(BackendError, match="for CPU tensors, these are on cuda"):
        explain("sample", "cuda", "native")


def test_without_the_extension_torch_runs_and_says_so(monkeypatch):
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "why_absent", "not built here")
    choice = explain("linear_logp", "cpu")
    assert (choice.backend, choice.why) == ("torch", "not built here")
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
    monkeypatch.setattr(rows, "torch_logp", spy("torch", rows.torch_logp))
    for name in ("native", "torch"):
        calls()["linear_logp"](name)
    wide: tuple[Tensor, ...] = (torch.zeros(2, 1).double(), torch.zeros(3, 1).double())
    linear_logp(*wide, torch.zeros(2).long(), backend="native")  # float64 is torch's in either case
    assert used == ["native", "torch", "torch"]


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked!r}:
            raise ImportError(name + ' is blocked')
sys.meta_path.insert(0, Block())
import torch, macpo.kernels as k
assert not {blocked!r} & {{name.split('.')[0] for name in sys.modules}}
zero = torch.zeros(2).long()
k.sample(torch.zeros(2, 5), k.SampleParams(0, batch=2), torch.zeros(2, 3).long(), zero)
x = torch.zeros(3, 2, requires_grad=True)
k.linear_logp(x, torch.zeros(4, 2), torch.zeros(3).long()).sum().backward()
print(k.explain('sample', 'cpu').backend)
"""


@pytest.mark.parametrize(
    ("blocked", "more"),
    [
        ({"transformers", "triton", "peft", "datasets", "pydantic", "yaml", "accelerate", "tokenizers"}, ""),
        ({"transformers", "triton"}, "sys.modules['macpo.kernels._native'] = None"),  # and without the extension
    ],
    ids=["torch alone", "no extension"],
)
def test_kernels_need_torch_alone(blocked, more):
    script = BLOCKED.format(blocked=blocked).replace("import torch, macpo", f"{more}\nimport torch, macpo")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ("torch" if more or native.module is None else "native")
