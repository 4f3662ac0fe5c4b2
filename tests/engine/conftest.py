"""Tests of the engine run on one thread."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # bits are promised for a fixed number of threads; forks need a quiet parent
    yield
    torch.set_num_threads(before)
