"""CUDA graphs of decode steps: which are captured when, and (with a GPU) that a replay is the step it was made from."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from architectures import model_of
from generation_checks import assert_equal, some_prompts, three_adapters
from torch import nn

from macpo.engine.errors import ResourceError
from macpo.engine.generation import Generator, Output, SamplingParams, generator
from macpo.engine.generation.pool import session
from macpo.engine.generation.pool.capacity import waiting_part
from macpo.engine.generation.pool.decode_step import DecodeStep
from macpo.kernels import use_backend

pytestmark = pytest.mark.usefixtures("no_idle_models")

WIDE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}  # heads of 64, which Triton takes
MIXED = [
    SamplingParams(temperature=0, max_new_tokens=30, ignore_eos=True),
    SamplingParams(temperature=0.8, top_k=9, max_new_tokens=11, n=3, seed=1, ignore_eos=True),
    SamplingParams(top_p=0.6, max_new_tokens=20, repetition_penalty=1.4, n=2),
    SamplingParams(max_new_tokens=1, min_p=0.05),
]


def test_the_pool_runs_with_triton() -> None:
    """Strided keys of a forward, padding rows, a copied tail and three samplers, all through the kernels."""
    model = model_of("llama", **WIDE)
    prompts = some_prompts([3, 17])
    params = [SamplingParams(temperature=0.8, top_k=9, max_new_tokens=4, n=2, seed=1), SamplingParams(max_new_tokens=3)]
    if torch.cuda.is_available():
        model.cuda()
    expected = Generator(model, cache="slots").generate(prompts, params)
    with use_backend("triton"):
        outputs = Generator(model, cache="pool", block_tokens=16, use_graphs=False).generate(prompts, params)
    assert_equal(outputs, expected)


class Replay:
    """In the place of a CUDA graph: knows what was captured."""

    def __init__(self, step: DecodeStep, bucket: int) -> None:
        self.step, self.bucket, self.replays = step, bucket, 0

    def replay(self) -> None:
        self.replays += 1
        self.step.step(self.bucket)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Replay]]:
    """What a run captures, where the model's device would allow it."""
    made: list[Replay] = []

    def capture(step: DecodeStep, bucket: int, memory: Any) -> Replay:
        step.step(bucket)  # a capture runs a step before, over rows that are all idle
        step.clear()
        made.append(Replay(step, bucket))
        return made[-1]

    monkeypatch.setattr(session, "capture_graph", capture)
    monkeypatch.setattr(generator, "graphs_why_not", lambda model, team: waiting_part(model))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    yield made


def run(maker: Generator, count: int, **options: Any) -> list[Output]:
    params = SamplingParams(temperature=0.9, max_new_tokens=9, seed=2, ignore_eos=True)
    return maker.generate(some_prompts([4 + i % 3 for i in range(count)]), params, **options)


def test_graphs_are_captured_once_a_bucket_and_replayed(captured: list[Replay]) -> None:
    """Largest first; a larger batch adds what lacks; a new value of a weight needs nothing, a new tensor all anew."""
    model = model_of("llama")
    maker = Generator(model, cache="pool", max_batch=8)
    run(maker, 3)
    assert [graph.bucket for graph in captured] == [4, 2, 1]
    assert captured[0].replays == 8
    run(maker, 3)
    assert len(captured) == 3 and captured[0].replays == 16
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    assert_equal(run(maker, 3), run(Generator(model, cache="slots"), 3))
    assert len(captured) == 3
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().neg())
    assert_equal(run(maker, 3), run(Generator(model, cache="slots"), 3))
    assert [graph.bucket for graph in captured[3:]] == [4, 2, 1]
    run(maker, 8)  # more rows than the session has: a new one
    assert [graph.bucket for graph in captured[6:]] == [8, 4, 2, 1]
    run(maker, 1)
    assert len(captured) == 10


def test_another_adapter_needs_another_graph(captured: list[Replay]) -> None:
    """The active one, a scaling, and stacks: these are captured once and take new weights in place."""
    peft = three_adapters()
    maker = Generator(peft, cache="pool")
    for adapter, graphs in (("default", 1), ("default", 1), ("wide", 2), ("wide", 2)):
        run(maker, 1, adapters=adapter)
        assert len(captured) == graphs
    for names, graphs in ((["default", "odd", "wide"], 5), (["odd", "wide"], 7), (["wide", "odd"], 7)):
        ours = run(maker, len(names), adapters=names)
        assert_equal(ours, run(Generator(peft, cache="slots"), len(names), adapters=names))
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_B.odd" in name:
                    parameter.neg_()
        assert len(captured) == graphs


def test_what_cannot_be_captured_runs_eagerly(
    captured: list[Replay], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A forward that waits, found before or while capturing; and where graphs are not wanted."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    dynamic, plain = model_of("llama", rope_parameters=rope), model_of("llama")
    expected = run(Generator(plain, cache="slots"), 3)
    run(Generator(dynamic, cache="pool"), 3)
    assert_equal(run(Generator(plain, cache="pool", use_graphs=False), 3), expected)
    with pytest.raises(generator.ConfigError, match="no CUDA graphs: its dynamic rotary embedding"):
        run(Generator(dynamic, cache="pool", use_graphs=True), 3)
    assert not captured

    def fail(step: DecodeStep, bucket: int, memory: Any) -> Replay:
        if bucket == 2:
            raise RuntimeError("called a synchronizing CUDA operation")
        return Replay(step, bucket)

    monkeypatch.setattr(session, "capture_graph", fail)
    maker = Generator(plain, cache="pool")
    assert_equal(run(maker, 3), expected)
    assert maker._session is not None and not maker._session._graphs
    with pytest.raises(generator.ConfigError, match="no CUDA graphs: called a synchronizing"):
        run(Generator(plain, cache="pool", use_graphs=True), 3)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_memory_that_runs_out_while_capturing_makes_batches_smaller_and_not_eager(
    captured: list[Replay], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of("llama")
    expected = run(Generator(model, cache="slots"), 8)
    capture = session.capture_graph

    def large(step: DecodeStep, bucket: int, memory: Any) -> Any:
        if bucket > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return capture(step, bucket, memory)

    monkeypatch.setattr(session, "capture_graph", large)
    maker = Generator(model, cache="pool", max_batch=8)
    assert_equal(run(maker, 8), expected)
    assert maker.max_batch == 2 and [graph.bucket for graph in captured] == [2, 1]
    assert sum(graph.replays for graph in captured) > 8
    assert "compute.generation_batch" in caplog.text

    def never(step: DecodeStep, bucket: int, memory: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(session, "capture_graph", never)
    with pytest.raises(ResourceError, match="does not fit in memory"):
        run(Generator(model, cache="pool", max_batch=8), 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a replay needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_replays_equal_eager_steps(name: str, dtype: torch.dtype) -> None:
    """The same kernels on the same shapes: identical ids and log-probs. In float32 also the slot path's ids."""
    wide = {"head_dim": 64} if name == "gemma3_text" else {}
    model = model_of(name, **(WIDE | wide)).to("cuda", dtype)
    prompts = some_prompts([4, 16, 6, 33])
    replays = Generator(model, use_graphs=True, max_batch=5).generate(prompts, MIXED)
    eager = Generator(model, cache="pool", use_graphs=False, max_batch=5).generate(prompts, MIXED)
    assert replays == eager
    if dtype == torch.float32:
        slots = Generator(model, cache="slots", max_batch=5).generate(prompts, MIXED)
        assert [[s.token_ids for s in o.samples] for o in replays] == [[s.token_ids for s in o.samples] for o in slots]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a replay needs a GPU")
def test_replays_see_new_weights_and_adapters() -> None:
    """In place, allocated anew, and the factors of stacked adapters, between two runs of one generator."""
    peft = three_adapters(WIDE).cuda()
    params = SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True)
    prompts, names = some_prompts([5, 9, 16]), ["wide", "odd", "default"]
    maker = Generator(peft, use_graphs=True)
    head = peft.get_base_model().lm_head
    for change in ("nothing", "value", "tensor", "adapter"):
        with torch.no_grad():
            if change == "value":
                head.weight.neg_()
            elif change == "tensor":
                head.weight = nn.Parameter(head.weight.roll(1, 0))
            elif change == "adapter":
                for name, parameter in peft.named_parameters():
                    if "lora_B.odd" in name:
                        parameter.neg_()
        eager = Generator(peft, cache="pool", use_graphs=False).generate(prompts, params, adapters=names)
        assert maker.generate(prompts, params, adapters=names) == eager
