"""Generation over the block pool: the slot path's responses, Hugging Face's tokens, steps that the host stays out of.

Without a GPU the steps run eagerly with the torch backends; only the capture and replay themselves need one.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import wave_job
from architectures import VOCAB, model_of
from generation_checks import (
    NAMES,
    assert_equal,
    assert_greedy_equal,
    character_tokenizer,
    hf_greedy,
    some_prompts,
    three_adapters,
)
from peft.tuners.lora import LoraLayer
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import PreTrainedModel

from macpo.engine.errors import ConfigError, DataError, MacpoError, NumericsError, Stopped
from macpo.engine.generation import Generator, Request, SamplingParams, sampling
from macpo.engine.generation.batch_runner import LOG_STEPS
from macpo.engine.generation.model_facts import CacheShape
from macpo.engine.generation.multilora import StackedAdapters
from macpo.engine.generation.pool.capacity import pool_why_not, waiting_part
from macpo.engine.generation.pool.decode_step import StepShape, facts_of
from macpo.engine.generation.pool.runner import SYNC_STEPS
from macpo.engine.generation.pool.session import PoolSession
from macpo.engine.generation.sequence import ActiveSequence
from macpo.engine.generation.vocabulary import Vocabulary
from macpo.engine.models.attention_hook import attention_hook

LENGTHS = [1, 3, 16, 12, 32, 31, 7, 2]  # one token; whole blocks; beyond the windows of 5 and 6; ragged ones
FREE = SamplingParams(max_new_tokens=16, seed=5, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.9, top_k=20, min_p=0.01, max_new_tokens=16, n=2, seed=5)
NAMES_OF_MODELS = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "gpt_neox", "gpt_oss"]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return model_of("llama")


def paged(model: Any, tokenizer: Any = None, **options: Any) -> Generator:
    return Generator(model, tokenizer, cache="pool", **({"block_tokens": 16} | options))


@pytest.mark.parametrize(
    ("name", "block_tokens"), [*zip(NAMES_OF_MODELS, [16, 32, 64, 16, 16, 32, 16, 64], strict=True), ("llama", 64)]
)
def test_greedy_equals_hugging_face(name: str, block_tokens: int) -> None:
    """Refills in a batch of 3, padded to 4; some responses end early, at an EOS that greedy decoding meets."""
    model = model_of(name, **({"num_key_value_heads": 2} if name == "qwen2" else {}))
    prompts = some_prompts(LENGTHS)
    eos = hf_greedy(model, prompts[3], 9, VOCAB + 1)[5]
    for field in (model.config, model.generation_config):
        field.eos_token_id = eos
    params = SamplingParams(temperature=0, max_new_tokens=20)
    outputs = paged(model, max_batch=3, block_tokens=block_tokens).generate(prompts, params)
    reasons = set()
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_greedy_equal(model, prompt, output.samples[0], hf_greedy(model, prompt, 20, eos), eos)
        reasons.add(output.samples[0].finish_reason)
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize(("name", "block_tokens"), [("llama", 16), ("mistral", 32), ("gemma3_text", 64)])
def test_samples_equal_the_slot_paths(name: str, block_tokens: int) -> None:
    """At every batch size and order, with samples that share a prompt: two noise-driven runs meet in every token."""
    model, prompts = model_of(name), some_prompts(LENGTHS)
    ids = [f"q{i}" for i in range(len(prompts))]
    slots = Generator(model, cache="slots").generate(prompts, SAMPLED, request_ids=ids)
    texts = [tuple(sample.token_ids) for output in slots for sample in output.samples if sample.token_ids]
    assert len(set(texts)) == len(texts) > 8
    for order, max_batch in ((range(8), 64), ([5, 2, 7, 0, 3, 6, 1, 4], 3), ([0, 1, 2], 1), ([7, 3, 6, 5, 4], 5)):
        generator = paged(model, max_batch=max_batch, block_tokens=block_tokens)
        outputs = generator.generate([prompts[i] for i in order], SAMPLED, request_ids=[ids[i] for i in order])
        assert_equal(outputs, [slots[i] for i in order])


def test_every_prompt_may_have_params_of_its_own(llama: PreTrainedModel) -> None:
    """Greedy and sampled rows, penalties, budgets of one token, stop tokens, 5 samples in 3 places; bounded pools."""
    prompts = some_prompts([4, 16, 6, 7, 33, 1])
    (first,) = Generator(llama).generate([prompts[3]], SamplingParams(temperature=0, max_new_tokens=1))
    params = [
        SamplingParams(temperature=0, max_new_tokens=19),
        SamplingParams(temperature=0.8, top_k=5, max_new_tokens=13, n=5, seed=1, ignore_eos=True),
        SamplingParams(top_p=0.5, max_new_tokens=12, repetition_penalty=1.4, ignore_eos=True, n=2),
        SamplingParams(temperature=0, max_new_tokens=9, stop_token_ids=(*first.samples[0].token_ids, 9)),
        SamplingParams(max_new_tokens=50, min_p=0.05, n=2),
        SamplingParams(max_new_tokens=1, stop_token_ids=tuple(range(3, 12)), n=2),
    ]
    slots = Generator(llama, cache="slots").generate(prompts, params)
    assert [sample.token_ids for sample in slots[3].samples] == [[]]
    for options in ({}, {"max_batch": 3}, {"max_cache_tokens": 64}, {"max_cache_tokens": 130, "block_tokens": 32}):
        assert_equal(paged(llama, **options).generate(prompts, params), slots)


def test_stop_texts_and_a_head_wider_than_the_tokenizer() -> None:
    model, tokenizer = model_of("llama"), character_tokenizer(50)
    with torch.no_grad():
        model.lm_head.weight[50:] *= 3
    prompts = some_prompts([4, 6, 9, 12])
    free = Generator(model, tokenizer).generate(prompts, SamplingParams(max_new_tokens=40, seed=4, ignore_eos=True))
    ends = [(o.samples[0].text or "")[k : k + 2] for o, k in zip(free, (0, 7, 13, 21), strict=True)]
    params = [SamplingParams(max_new_tokens=40, seed=4, ignore_eos=True, stop=("#never#", end)) for end in ends]
    slots = Generator(model, tokenizer, cache="slots").generate(prompts, params)
    assert {output.samples[0].finish_reason for output in slots} == {"stop"}
    for max_batch in (3, 64):
        assert_equal(paged(model, tokenizer, max_batch=max_batch).generate(prompts, params), slots)


def test_a_row_that_met_a_stop_text_idles_among_the_others(llama: PreTrainedModel) -> None:
    """One of 17: too few to change the batch for. It was ended at the first look and has written nothing since."""
    tokenizer, prompts, new = character_tokenizer(VOCAB), some_prompts([5] * 17), 2 * SYNC_STEPS + 4
    free = SamplingParams(max_new_tokens=new, seed=4, ignore_eos=True)
    generator = paged(llama, tokenizer)
    text = generator.generate(prompts, free)[3].samples[0].text or ""
    generator._session = None
    params = [replace(free, stop=(text[2:5],)) if i == 3 else free for i in range(17)]
    assert generator.generate(prompts, params)[3].samples[0].text == text[: text.index(text[2:5])]
    assert generator._session is not None
    k, _ = generator._session.pool.layer(0)
    assert 5 + SYNC_STEPS < 16 < 5 + new - 1
    assert int((k.flatten(1) == 0).all(1).sum()) == 1 + 1  # its second block, and the trash block


def test_responses_longer_than_the_log() -> None:
    """The log is handed over in the middle of a batch that nobody has left, also where stop texts are looked for."""
    model, tokenizer = model_of("llama", max_position_embeddings=256), character_tokenizer(VOCAB)
    prompts = some_prompts([4, 20])
    for stop in ((), ("#never#",)):
        params = SamplingParams(max_new_tokens=2 * LOG_STEPS + 5, seed=3, ignore_eos=True, stop=stop)
        slots = Generator(model, tokenizer, cache="slots").generate(prompts, params)
        assert_equal(paged(model, tokenizer).generate(prompts, params), slots)


def test_shared_blocks_are_not_written_after_the_fork(llama: PreTrainedModel) -> None:
    """The prompt's two full blocks end as its prefill left them; each sample's third begins with the prompt's tail."""
    (prompt,) = some_prompts([37])
    left: list[torch.Tensor] = []
    for new in (1, 25):
        generator = paged(llama)
        generator.generate([prompt], SamplingParams(max_new_tokens=new, n=3, seed=1, ignore_eos=True))
        assert generator._session is not None
        left.append(torch.stack(generator._session.pool.layer(1)))
    short, long = left
    assert short[:, 1:3].any() and torch.equal(short[:, 1:3], long[:, 1:3])
    tails = [short[:, block, :5] for block in (3, 4, 5)]  # one block a sample: 37 + 1 tokens
    assert tails[0].any() and all(torch.equal(tails[0], tail) for tail in tails)
    assert torch.equal(long[:, 3, :5], tails[0]) and not long[:, 0].any()


def test_rows_idle_for_fewer_steps_than_lie_between_two_looks(llama: PreTrainedModel) -> None:
    """Prefill, then steps of a padded batch; the last steps stop at the longest budget, not at the next look."""
    forwarded: list[int] = []
    generator = paged(llama)
    generator.generate([[5]], SamplingParams(max_new_tokens=1))  # the probe is over
    handle = llama.register_forward_pre_hook(
        lambda _, args, kwargs: forwarded.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    generator.generate(some_prompts([11]), SamplingParams(max_new_tokens=SYNC_STEPS + 4, n=3, ignore_eos=True))
    assert forwarded == [11, *[4] * (SYNC_STEPS + 3)]
    long = SamplingParams(max_new_tokens=40, ignore_eos=True)
    (whole,) = generator.generate(some_prompts([11]), long)
    tokens = whole.samples[0].token_ids
    at = max(map(tokens.index, tokens[: 2 * SYNC_STEPS - 2]))  # the latest that has not come before
    assert at > SYNC_STEPS
    forwarded.clear()
    generator.generate(some_prompts([11]), replace(long, stop_token_ids=(tokens[at],)))
    handle.remove()
    assert forwarded == [11, *[1] * 2 * SYNC_STEPS]


def test_a_row_that_has_ended_idles_and_writes_nothing(llama: PreTrainedModel) -> None:
    """Ended by its budget, by a stop token, by the host, or with the run: pool and place in the sequence stay."""
    plan = {"max_new_tokens": 9, "ignore_eos": True}
    rows = [
        ActiveSequence(Request(str(i), (5, 6, 7), SamplingParams(**plan)), 0, budget, frozenset(stop))
        for i, (budget, stop) in enumerate([(2, []), (9, range(VOCAB)), (9, []), (9, [])])
    ]
    for row in rows:
        row.tokens = [8]
    session = PoolSession(
        llama, shapes_of(llama), 16, 4, 4, StepShape(1, 64, Vocabulary(VOCAB), facts_of([rows[0].params]))
    )
    session.start(None)
    with attention_hook(llama), torch.no_grad():
        session.step.load(rows, [[1], [2], [3], [4]])
        session.run_step(4)
        assert session.step.running(4) == [False, False, True, True]
        session.step.end([2])
        assert session.step.running(4) == [False, False, False, True]
        pools = session.pool.layer(0)
        assert [int((pools[0][block] != 0).any(-1).any(-1).sum()) for block in range(5)] == [0, 1, 1, 1, 1]
        session.run_step(4)
        assert [int((pools[0][block] != 0).any(-1).any(-1).sum()) for block in range(5)] == [0, 1, 1, 1, 2]
        tokens, raw_logps, logps = session.step.take(4, 2)
        assert tokens.shape == raw_logps.shape == logps.shape == (4, 2)
        session.start(None)
        assert session.step.running(4) == [False] * 4


def test_adapters_share_a_batch_and_keep_their_tensors() -> None:
    """Mixed adapters as over slots; new weights go into the same stacks, so that a graph would see them."""
    peft = three_adapters()
    prompts = some_prompts([3, 16, 5, 9])
    adapters: list[str | None] = [None, "wide", "odd", "default"]
    params = SamplingParams(temperature=1.0, top_p=0.9, max_new_tokens=12, n=2, seed=4, ignore_eos=True)
    generator = paged(peft, max_batch=5)
    assert_equal(
        generator.generate(prompts, params, adapters=adapters),
        Generator(peft, cache="slots").generate(prompts, params, adapters=adapters),
    )
    stack, session = generator._stack, generator._session
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B.odd" in name:
                parameter.neg_()
    second = generator.generate(prompts, params, adapters=adapters)
    assert (generator._stack, generator._session) == (stack, session)
    assert_equal(second, Generator(peft, cache="slots").generate(prompts, params, adapters=adapters))
    for module in peft.modules():
        if isinstance(module, LoraLayer) and "odd" in module.scaling:
            module.scaling["odd"] *= -0.5
    third = generator.generate(prompts, params, adapters=adapters)
    assert generator._stack is not stack
    assert_equal(third, Generator(peft, cache="slots").generate(prompts, params, adapters=adapters))


def test_a_session_is_kept_where_it_serves_and_survives_a_stop(llama: PreTrainedModel) -> None:
    """Smaller runs of the same shape reuse it; another shape makes a new one, no smaller; a stop leaves nothing."""
    prompts = some_prompts([9, 12, 4, 7])
    slots = Generator(llama, cache="slots").generate(prompts, FREE)
    generator = paged(llama)
    assert_equal(generator.generate(prompts, FREE), slots)
    first = generator._session
    assert first is not None
    assert_equal(generator.generate(prompts[:2], FREE), slots[:2])
    asked = iter([False, False, True])
    long = SamplingParams(max_new_tokens=40, ignore_eos=True)
    with pytest.raises(Stopped):
        generator.run([Request("a", (5, 6), long)], should_stop=lambda: next(asked))
    second = generator._session
    assert second is not None and second is not first
    assert second.step.num_rows >= first.step.num_rows and second.pool.num_blocks >= first.pool.num_blocks
    assert_equal(generator.generate(prompts, FREE), slots)
    broken = model_of("llama")
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match="not finite"):
        paged(broken).generate(prompts, FREE)


def test_waves_resume_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after two waves and gone on with in a new generator; the tokens are those of the slot path."""

    def run(folder: Path, **options: Any) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
        rows = wave_job.run(folder, **options)
        return rows, {path.name: path.read_bytes() for path in (folder / "waves").glob("*.jsonl")}

    slots, _ = run(tmp_path / "slots")
    monkeypatch.setattr(wave_job, "Generator", lambda *args, **kwargs: paged(*args, **kwargs))
    rows, files = run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tmp_path / "cut", should_stop=lambda: len(list((tmp_path / "cut" / "waves").glob("*.jsonl"))) == 2)
    assert run(tmp_path / "cut") == (rows, files)
    unlike = {"sum_logp": 0, "end_logp": 0}  # in their last bits
    assert [json.dumps(r | unlike) for r in rows] == [json.dumps(r | unlike) for r in slots]


def test_what_cannot_be_is_refused_before_any_work(llama: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    params = SamplingParams(max_new_tokens=4)
    cases: list[tuple[type[MacpoError], str, dict[str, Any], list[int]]] = [
        (ConfigError, "cache must be 'pool', 'slots' or None", {"cache": "paged"}, [5]),
        (ConfigError, "no CUDA graphs: the model is on a CPU", {"cache": "pool", "use_graphs": True}, [5]),
        (ConfigError, "no CUDA graphs: the cache is in slots", {"use_graphs": True}, [5]),
        (DataError, "may take 64 tokens, the cache 32", {"cache": "pool", "max_cache_tokens": 32}, [5] * 40),
        (DataError, "the prompt has 64 tokens, the model's context 64", {"cache": "pool"}, [5] * 64),
    ]
    Generator(llama).generate([[5]], params)
    for kind, message, options, prompt in cases:
        with pytest.raises(kind) as caught:
            Generator(llama, **options).generate([prompt], params)
        assert message in str(caught.value) and "\n" not in str(caught.value) and "Fix: " in str(caught.value)
    with pytest.raises(ConfigError, match="unknown adapter 'x'"):
        paged(llama).generate([[5]], params, adapters="x")
    with caplog.at_level(logging.WARNING):
        assert paged(llama).generate([[5]], params, request_ids=["a"])[0].samples
    assert not caplog.records
    uneven = {0: CacheShape(2, 8, 16, torch.float32)}
    assert pool_why_not(uneven, 16, llama.device) == "keys of 8 and values of 16 numbers a head"


def shapes_of(model: PreTrainedModel) -> dict[int, CacheShape]:
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return {layer: CacheShape(heads, head, head, torch.float32) for layer in range(config.num_hidden_layers)}


def step_without_values(
    monkeypatch: pytest.MonkeyPatch, outer: Any, settings: list[SamplingParams], names: list[str] | None = None
) -> PreTrainedModel:
    """Runs a step on tensors that have shapes but no values, with the operators' shape rules in place of their work."""

    def attention(q: Any, k: Any, v: Any, table: Any, lens: Any, **form: Any) -> Any:
        return torch.ops.macpo.paged_attention(q, k, v, table, lens, **form)

    def drawn(logits: Any, params: Any, keys: Any, counts: Any) -> Any:
        return torch.empty_like(counts), *(logits.new_empty(counts.shape, dtype=torch.float32) for _ in range(2))

    monkeypatch.setattr("macpo.engine.generation.pool.attention.paged_attention", attention)
    monkeypatch.setattr("macpo.engine.generation.pool.blocks.write_kv", torch.ops.macpo.write_kv)
    monkeypatch.setattr(sampling, "sample", drawn)
    facts = facts_of(settings)
    model = outer if names is None else outer.get_base_model()
    stack = None if names is None else StackedAdapters(outer, names)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        session = PoolSession(
            model, shapes_of(model), 16, 4, 8, StepShape(4, 4, Vocabulary(VOCAB - 3, (range(4, 6),)), facts)
        )
        session.start(stack)
        with attention_hook(model):
            if stack is None:
                session.run_step(4)
            else:
                with stack.active():
                    session.run_step(4)
    return model


@pytest.mark.parametrize("name", NAMES_OF_MODELS)
def test_a_step_asks_for_no_value(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph needs: shapes alone decide what a step does. A value that the host reads raises here."""
    mixed = [FREE, SAMPLED, SamplingParams(temperature=0, repetition_penalty=1.2)]
    model = model_of(name)
    if name == "gpt_oss":  # torch's shape rule of the default, grouped products, knows bfloat16 alone
        model.set_experts_implementation("batched_mm")
    assert not waiting_part(step_without_values(monkeypatch, model, mixed))


def test_a_step_of_stacked_adapters_asks_for_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    step_without_values(monkeypatch, three_adapters(), [SAMPLED], NAMES)


def test_a_forward_that_asks_for_values_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert "dynamic rotary embedding" in waiting_part(model_of("llama", rope_parameters=rope))
    with pytest.raises(DataDependentOutputException):
        step_without_values(monkeypatch, model_of("llama", rope_parameters=rope), [FREE])
