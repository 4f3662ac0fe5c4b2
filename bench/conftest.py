"""`pytest bench/bench_x.py [--shapes small|issue|gpu] [--bench-device cpu]`: each case and peer is one benchmark."""

from __future__ import annotations

import pytest
import torch

from bench.harness.device import default_device
from bench.harness.options import SHAPES, default_shapes


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shapes", choices=SHAPES, help="sizes of the cases; default gpu on a GPU, else issue")
    parser.addoption("--bench-device", type=torch.device, default=default_device())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "spec" in metafunc.fixturenames:
        device = metafunc.config.getoption("bench_device")
        specs = metafunc.module.specs(metafunc.config.getoption("shapes") or default_shapes(device), device)
        pairs = [(spec, peer) for spec in specs for peer in metafunc.module.PEERS]
        metafunc.parametrize(("spec", "peer_name"), pairs, ids=[f"{spec.name}-{peer}" for spec, peer in pairs])
