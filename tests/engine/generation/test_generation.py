"""Generation: greedy equals Hugging Face, samples depend on their request alone, log-probs are the model's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, VOCAB, model_of
from generation_checks import assert_greedy_equal, character_tokenizer, hf_greedy, ids_of, some_prompts, teacher_forced
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from macpo.engine.config import SamplingSettings
from macpo.engine.errors import NumericsError, ResourceError, Stopped
from macpo.engine.generation import Generator, Request, SamplingParams, request_key
from macpo.engine.generation.scheduler import Scheduler
from macpo.engine.generation.sequence import ActiveSequence
from macpo.engine.models.policy import PolicyModule

STORIES = Path(__file__).parents[4] / "shared" / "models" / "stories260K"
LENGTHS = [1, 3, 7, 12, 20, 31, 7, 2]  # one token; below, at and far beyond the windows of 5 and 6; equal ones
SAMPLED = SamplingParams(temperature=0.9, top_p=0.9, top_k=20, min_p=0.01, max_new_tokens=16, n=2, seed=5)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return model_of("llama")


@pytest.mark.parametrize("name", [*ARCHITECTURES, "gpt2"])  # gpt2: learned positions
def test_greedy_equals_hugging_face(name: str) -> None:
    """Refills in a batch of 3; some responses end early, at an EOS that greedy decoding is known to meet."""
    model = model_of(name)
    prompts = some_prompts(LENGTHS)
    eos = hf_greedy(model, prompts[3], 9, VOCAB + 1)[5]
    for field in (model.config, model.generation_config):
        field.eos_token_id = eos
    outputs = Generator(model, max_batch=3).generate(prompts, SamplingParams(temperature=0, max_new_tokens=24))
    reasons = set()
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_greedy_equal(model, prompt, output.samples[0], hf_greedy(model, prompt, 24, eos), eos)
        reasons.add(output.samples[0].finish_reason)
    assert reasons == {"stop", "length"}


@pytest.mark.skipif(not STORIES.is_dir(), reason="the pretrained model is not beside the repository")
def test_greedy_equals_hugging_face_on_a_pretrained_model() -> None:
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    starts = ["Once upon a time", "Tom", "The big red ball was", "Lily and Ben went to the park. They saw a"]
    prompts = [tokenizer(start).input_ids for start in starts]
    outputs = Generator(model, tokenizer).generate(prompts, SamplingParams(temperature=0, max_new_tokens=40))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_greedy_equal(model, prompt, output.samples[0], hf_greedy(model, prompt, 40, 2), 2)
        assert output.samples[0].text == tokenizer.decode(output.samples[0].token_ids)


def test_repetition_penalty_counts_the_prompt_as_hugging_face_does(llama: PreTrainedModel) -> None:
    prompts = some_prompts([4, 9, 15])
    params = SamplingParams(temperature=0, max_new_tokens=12, repetition_penalty=1.7, ignore_eos=True)
    outputs = Generator(llama, max_batch=2).generate(prompts, params)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.samples[0].token_ids == hf_greedy(llama, prompt, 12, VOCAB + 1, penalty=1.7)
    assert ids_of(llama, prompts, SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True)) != [
        output.samples[0].token_ids for output in outputs
    ]


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_samples_do_not_depend_on_batch_order_or_split(name: str) -> None:
    model = model_of(name)
    prompts = some_prompts(LENGTHS)
    ids = [f"q{i}" for i in range(len(prompts))]

    def run(order: list[int], max_batch: int) -> dict[tuple[int, int], list[int]]:
        generator = Generator(model, max_batch=max_batch)
        outputs = generator.generate([prompts[i] for i in order], SAMPLED, request_ids=[ids[i] for i in order])
        return {(i, s): o.samples[s].token_ids for i, o in zip(order, outputs, strict=True) for s in range(2)}

    whole = run([0, 1, 2, 3, 4, 5, 6, 7], 64)
    assert run([5, 2, 7, 0, 3, 6, 1, 4], 3) == whole
    assert run([0, 1, 2], 1) | run([7, 3, 6, 5, 4], 5) == whole
    texts = [tuple(tokens) for tokens in whole.values() if tokens]
    assert len(set(texts)) == len(texts) > 8  # not one noise for all


def test_seed_request_sample_and_attempt_choose_the_noise(llama: PreTrainedModel) -> None:
    (prompt,) = some_prompts([6])
    generator = Generator(llama)

    def text(seed: int = 1, **fields: Any) -> list[int]:
        params = SamplingParams(max_new_tokens=12, seed=seed, ignore_eos=True)
        request = Request(**({"id": "a", "prompt_ids": tuple(prompt), "params": params} | fields))
        return generator.run([request])[0].samples[0].token_ids

    others = [text(seed=2), text(id="b"), text(samples=(1,)), text(attempt=1), text(purpose="p"), text()]
    assert others.count(text()) == 1
    assert len(set(map(tuple, others))) == 6
    assert request_key("ab", "c") != request_key("a", "bc")


def test_equal_prompts_get_ids_of_their_own(llama: PreTrainedModel) -> None:
    (prompt,) = some_prompts([5])
    first, second = ids_of(llama, [prompt, prompt], SamplingParams(max_new_tokens=10, ignore_eos=True))
    assert first != second


def test_samples_of_a_request_share_its_prefill(llama: PreTrainedModel) -> None:
    """Four samples cost one prompt of forwarded tokens; with fewer slots than samples the texts are the same."""
    (prompt,) = some_prompts([11])
    params = SamplingParams(max_new_tokens=6, n=4, seed=3, ignore_eos=True)
    forwarded: list[int] = []
    generator = Generator(llama)
    generator.generate([[5]], SamplingParams(max_new_tokens=1))  # the probe is over
    handle = llama.register_forward_pre_hook(
        lambda _, args, kwargs: forwarded.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    outputs = generator.generate([prompt], params)
    handle.remove()
    assert forwarded == [11, 4, 4, 4, 4, 4]
    texts = [sample.token_ids for sample in outputs[0].samples]
    assert len(set(map(tuple, texts))) == 4
    assert ids_of(llama, [prompt], params, max_batch=3) == texts
    single = [
        Generator(llama).run([Request(outputs[0].request_id, tuple(prompt), params, (s,))])[0].samples[0].token_ids
        for s in range(4)
    ]
    assert single == texts


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_log_probs_are_the_models_own(name: str) -> None:
    """Raw: teacher-forced, 1e-5. Processed: Hugging Face's processors on the same logits."""
    model = model_of(name)
    prompts = some_prompts([2, 9, 13])
    params = SamplingParams(
        temperature=0.7, top_p=0.8, top_k=12, min_p=0.02, repetition_penalty=1.3, max_new_tokens=14, ignore_eos=True
    )
    processors = [
        RepetitionPenaltyLogitsProcessor(1.3),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(12),
        TopPLogitsWarper(0.8),
        MinPLogitsWarper(0.02),
    ]
    for prompt, output in zip(prompts, Generator(model, max_batch=2).generate(prompts, params), strict=True):
        sample = output.samples[0]
        logits = teacher_forced(model, prompt, sample.token_ids)[:-1]
        tokens = torch.tensor(sample.token_ids)[:, None]
        raw = logits.log_softmax(-1).gather(1, tokens)[:, 0]
        torch.testing.assert_close(torch.tensor(sample.raw_logps), raw, atol=1e-5, rtol=1e-5)
        rows = []
        for i, row in enumerate(logits):
            scores, seen = row[None], torch.tensor([prompt + sample.token_ids[:i]])
            for processor in processors:
                scores = processor(seen, scores)
            rows.append(scores[0].log_softmax(-1))
        processed = torch.stack(rows).gather(1, tokens)[:, 0]
        torch.testing.assert_close(torch.tensor(sample.logps), processed, atol=1e-4, rtol=1e-5)


def test_first_token_may_end_the_response_and_one_token_is_a_budget(llama: PreTrainedModel) -> None:
    prompts = some_prompts([4, 1, 8])
    greedy = SamplingParams(temperature=0, max_new_tokens=1, ignore_eos=True)
    firsts = ids_of(llama, prompts, greedy)
    assert [len(tokens) for tokens in firsts] == [1, 1, 1]
    stopping = SamplingParams(temperature=0, max_new_tokens=9, ignore_eos=True, stop_token_ids=(firsts[1][0],))
    sample = Generator(llama, max_batch=2).generate(prompts, stopping)[1].samples[0]
    assert (sample.token_ids, sample.raw_logps, sample.finish_reason) == ([], [], "stop")
    wanted = teacher_forced(llama, prompts[1], [])[0].log_softmax(-1)[firsts[1][0]]
    assert (sample.end_token, sample.end_logp) == (firsts[1][0], pytest.approx(float(wanted), abs=1e-5))
    assert Generator(llama).generate(prompts, greedy)[1].samples[0].end_token is None


def test_an_end_that_is_no_number_is_an_error_too() -> None:
    sequence = ActiveSequence(Request("a", (5,), SamplingParams()), 0, 4, frozenset({2}))
    sequence.extend([2], [math.nan], [0.0])
    with pytest.raises(NumericsError, match="request a are not finite"):
        sequence.finish(None)


def test_every_prompt_may_have_params_of_its_own(llama: PreTrainedModel) -> None:
    prompts = some_prompts([4, 5, 6, 7])
    params = [
        SamplingParams(temperature=0, max_new_tokens=9),
        SamplingParams(temperature=0.8, top_k=5, max_new_tokens=3, n=2, seed=1),
        SamplingParams(top_p=0.5, max_new_tokens=12, repetition_penalty=1.2, ignore_eos=True),
        SamplingParams(top_p=0.5, max_new_tokens=1, stop_token_ids=(7, 8, 9)),
    ]
    together = Generator(llama, max_batch=3).generate(prompts, params)
    for prompt, one, output in zip(prompts, params, together, strict=True):
        alone = Generator(llama).generate([prompt], one, request_ids=[output.request_id])[0]
        assert [s.token_ids for s in alone.samples] == [s.token_ids for s in output.samples]


def test_responses_end_where_the_context_or_the_cache_does(llama: PreTrainedModel) -> None:
    (prompt,) = some_prompts([60])
    params = SamplingParams(temperature=0, max_new_tokens=50, ignore_eos=True)
    sample = Generator(llama).generate([prompt], params)[0].samples[0]
    assert (len(sample.token_ids), sample.finish_reason) == (4, "length")  # 64 positions
    short = some_prompts([5, 9, 14, 3])
    params = SamplingParams(max_new_tokens=10, seed=2)
    roomy = ids_of(llama, short, params)
    assert ids_of(llama, short, params, max_cache_tokens=48, block_tokens=8) == roomy  # two slots of 24


def test_ids_beyond_the_tokenizer_are_never_drawn() -> None:
    """The head is wider than the tokenizer and prefers the ids that are too many; raw log-probs are the head's."""
    model, tokenizer = model_of("llama"), character_tokenizer(50)
    with torch.no_grad():
        model.lm_head.weight[50:] *= 30
    prompts = some_prompts([3, 8])
    for params in (SamplingParams(temperature=0, max_new_tokens=9), SamplingParams(max_new_tokens=9, n=3)):
        for prompt, output in zip(prompts, Generator(model, tokenizer).generate(prompts, params), strict=True):
            for sample in output.samples:
                assert all(token < 50 for token in sample.token_ids)
                logps = teacher_forced(model, prompt, sample.token_ids)[:-1].log_softmax(-1)
                wanted = logps.gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
                torch.testing.assert_close(torch.tensor(sample.raw_logps), wanted, atol=1e-5, rtol=1e-5)


def test_stop_texts_cut_text_and_tokens(llama: PreTrainedModel) -> None:
    tokenizer = character_tokenizer(VOCAB)
    prompts = some_prompts([4, 6, 9, 12])
    free = SamplingParams(max_new_tokens=40, seed=4, ignore_eos=True)
    whole = [output.samples[0] for output in Generator(llama, tokenizer).generate(prompts, free)]
    ends = [(sample.text or "")[k : k + 2] for sample, k in zip(whole, (0, 7, 13, 21), strict=True)]
    params = [SamplingParams(max_new_tokens=40, seed=4, ignore_eos=True, stop=("#never#", end)) for end in ends]
    for sample, full, end in zip(
        Generator(llama, tokenizer, max_batch=3).generate(prompts, params), whole, ends, strict=True
    ):
        got, text = sample.samples[0], full.text or ""
        assert got.text == text[: text.index(end)]
        assert (got.finish_reason, got.end_token, got.end_logp) == ("stop", None, None)
        kept = len(got.token_ids)
        assert got.token_ids == full.token_ids[:kept] and len(got.raw_logps) == kept
        assert len(tokenizer.decode(got.token_ids, skip_special_tokens=True)) >= len(got.text)
        fewer = tokenizer.decode(got.token_ids[:-1], skip_special_tokens=True)
        assert kept == 0 or len(fewer) < len(got.text)


def test_eos_comes_from_everywhere_and_may_be_ignored() -> None:
    model = model_of("llama")
    model.generation_config.eos_token_id = [3, 4]
    model.config.eos_token_id = 5
    generator = Generator(model, character_tokenizer(VOCAB))
    assert generator.eos_ids == {2, 3, 4, 5}
    with torch.no_grad():
        model.lm_head.weight[4] = 0
        model.lm_head.weight[:4] = 0
    prompts = some_prompts([4] * 40)
    ended = [o.samples[0] for o in generator.generate(prompts, SamplingParams(temperature=3.0, max_new_tokens=30))]
    assert any(s.finish_reason == "stop" for s in ended)
    assert not any(set(s.token_ids) & generator.eos_ids for s in ended)
    ignored = SamplingParams(temperature=3.0, max_new_tokens=30, ignore_eos=True)
    assert all(len(o.samples[0].token_ids) == 30 for o in generator.generate(prompts, ignored))


def test_adapters_and_training_mode_are_restored() -> None:
    """A mixed call gives what every adapter gives by itself; nothing about the model has changed afterwards."""
    peft = get_peft_model(model_of("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5))
    peft.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    peft.train()
    before = {name: p.requires_grad for name, p in peft.named_parameters()}
    prompts = some_prompts([3, 5, 8])
    params = SamplingParams(temperature=0, max_new_tokens=8, ignore_eos=True)
    mixed = Generator(peft).generate(prompts, params, adapters=["other", None, "default"])
    assert peft.active_adapter == "default" and all(m.training for m in peft.modules())
    assert {name: p.requires_grad for name, p in peft.named_parameters()} == before
    texts = [output.samples[0].token_ids for output in mixed]
    peft.eval()
    for text, prompt, name in zip(texts, prompts, ("other", "default", "default"), strict=True):
        peft.set_adapter(name)
        assert text == hf_greedy(peft.get_base_model(), prompt, 8, VOCAB + 1)
    assert [
        o.samples[0].token_ids for o in Generator(PolicyModule(peft)).generate(prompts[:1], params, adapters="other")
    ] == texts[:1]


def test_params_from_a_recipe() -> None:
    params = SamplingParams.of(SamplingSettings(temperature=0.3, top_k=7), seed=9, stop="###")
    assert (params.temperature, params.top_p, params.top_k, params.seed, params.stop) == (0.3, 0.7, 7, 9, ("###",))


def test_broken_weights_and_a_wish_to_stop(llama: PreTrainedModel) -> None:
    broken = model_of("llama")
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match="not finite"):
        Generator(broken).generate([[5]], SamplingParams(max_new_tokens=2))
    request = Request("a", (5, 6), SamplingParams(max_new_tokens=40, ignore_eos=True))
    asked = iter([False, False, True])
    with pytest.raises(Stopped):
        Generator(llama).run([request], should_stop=lambda: next(asked))


@pytest.mark.usefixtures("no_idle_models")
@pytest.mark.parametrize("cache", ["slots", "pool"])
def test_memory_that_runs_out_halves_the_batch_and_changes_no_text(cache: Any) -> None:
    model = model_of("llama")
    prompts = some_prompts(LENGTHS)
    wanted = Generator(model, cache=cache, max_batch=8).generate(prompts, SAMPLED)
    calls, fails = [], {20, 35}  # decode steps when some responses are complete and others are not

    def run_out(*_: Any) -> None:
        calls.append(len(calls))
        if calls[-1] in fails:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    model.model.layers[0].register_forward_pre_hook(run_out)
    generator = Generator(model, cache=cache, max_batch=8)
    outputs = generator.generate(prompts, SAMPLED)
    assert [[s.token_ids for s in o.samples] for o in outputs] == [[s.token_ids for s in o.samples] for o in wanted]
    assert generator.max_batch == 2
    fails.update(range(1000))
    with pytest.raises(ResourceError, match=r"decoding 1 sequences of up to .* lower sampling.max_new_tokens"):
        generator.generate(prompts, SAMPLED)


def test_half_precision_runs_the_same_loop() -> None:
    """bfloat16: log-probs are those of a bfloat16 forward, to its rounding."""
    model = model_of("qwen3").bfloat16()
    prompts = some_prompts([3, 11])
    params = SamplingParams(max_new_tokens=8, seed=1, ignore_eos=True)
    for prompt, output in zip(prompts, Generator(model).generate(prompts, params), strict=True):
        sample = output.samples[0]
        logps = teacher_forced(model, prompt, sample.token_ids)[:-1].log_softmax(-1)
        wanted = logps.gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
        # 2 layers of bfloat16 (8 bits) on logits of size 20: rounding of 20 / 256 a logit, seen in target and sum
        torch.testing.assert_close(torch.tensor(sample.raw_logps), wanted, atol=0.4, rtol=0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7)), min_size=1, max_size=30), st.integers(1, 16), st.randoms()
)
def test_scheduler_starts_everything_once_within_its_slots(
    sizes: list[tuple[int, int]], slots: int, random: Any
) -> None:
    requests = [
        Request(f"{i:02d}", (5,) * length, SamplingParams(), tuple(range(n))) for i, (length, n) in enumerate(sizes)
    ]

    def play(order: list[Request]) -> list[tuple[str, tuple[int, ...]]]:
        scheduler, live, started = Scheduler(order, slots), 0, []
        num_waiting = sum(len(request.samples) for request in order)
        while num_waiting or live:
            groups = scheduler.admit(slots - live)
            num_new = sum(len(group.samples) for group in groups)
            num_waiting, live = num_waiting - num_new, live + num_new
            assert live <= slots and (groups or live)
            started += [(group.request.id, group.samples) for group in groups]
            live -= 1  # one sequence ends
        return started

    started = play(requests)
    found = sorted((id_, sample) for id_, samples in started for sample in samples)
    assert found == sorted((request.id, sample) for request in requests for sample in request.samples)
    shuffled = list(requests)
    random.shuffle(shuffled)
    assert play(shuffled) == started
