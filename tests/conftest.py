"""What has to be so before any test module is imported."""

import os
import signal

import pytest
import torch

if not torch.cuda.is_available():  # the Triton kernels then run under Triton's interpreter, which an import chooses
    os.environ.setdefault("TRITON_INTERPRET", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A background job of a script ignores Ctrl-C, and so would the commands started here that tests stop by it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Thousands of quick tests come last, so that no process ends with a long one while the others wait."""
    items.sort(key=lambda item: item.path.name == "test_layout.py")
