"""What has to be so before any test module is imported."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # the Triton kernels then run under Triton's interpreter, which an import chooses
    os.environ.setdefault("TRITON_INTERPRET", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A background job of a script ignores Ctrl-C, and so would the commands started here that tests stop by it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


LONG = {
    "test_aot.py",
    "test_bench_train_step.py",
    "test_evaluation_page.py",
    "test_evidence.py",
    "test_examples.py",
    "test_gpu_suite.py",
    "test_kill_resume.py",
    "test_method.py",
    "test_methods.py",
    "test_parallel.py",
    "test_python_page.py",
    "test_ranks.py",
    "test_real_model.py",
    "test_split_generation.py",
    "test_torture.py",
}
"""Modules with single tests, or runs that several of their tests read, of half a minute and more."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """They come first, so that no process ends with a long test while the others have nothing left to do."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(autouse=True, scope="module")
def imports_are_not_searched_for_garbage() -> Iterator[None]:
    """A collection visits every object of torch and transformers, a second each time; frozen, they are passed over."""
    gc.freeze()
    yield
    gc.collect()


@pytest.fixture
def no_idle_models() -> None:
    """What another test left in a cache of models would be dropped first where memory runs out."""
    from macpo.engine.distributed.failures import make_room

    make_room()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run of `tiny(folder, iterations=1)`, which all tests of a session share and none may change."""
    from tiny import once, tiny

    from macpo.commands.run import run

    return once(tmp_path_factory, "tiny", lambda folder: run(tiny(folder / "run", iterations=1))) / "run"


def pytest_unconfigure() -> None:
    gc.unfreeze()  # the interpreter's own last collection frees what extensions would else report as leaked
