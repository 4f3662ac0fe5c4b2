"""Whole runs in one process: one thread each."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # forks need a quiet parent, and two cores have other tests to run
