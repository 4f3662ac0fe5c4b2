"""What may be drawn is what the tokenizer has: holes in its ids, padding rows of the head, an end token far above."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from architectures import VOCAB, model_of
from generation_checks import (
    NAMES,
    SPARSE_IDS,
    assert_equal,
    character_tokenizer,
    some_prompts,
    sparse_tokenizer,
    teacher_forced,
    three_adapters,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from macpo.engine.distributed.world import ALONE
from macpo.engine.errors import ConfigError
from macpo.engine.generation import Generator, SamplingParams
from macpo.engine.generation.sampling import draw, sample_params
from macpo.engine.generation.vocabulary import Vocabulary

OTHERS = sorted(set(range(VOCAB)) - set(SPARSE_IDS))
END = SPARSE_IDS[-1]
# Wide enough to draw everything; more candidates than the tokenizer has; cuts by mass; greedy; a penalty.
PARAMS = [
    SamplingParams(temperature=50.0, max_new_tokens=40, n=24),
    SamplingParams(temperature=0.7, top_k=20, max_new_tokens=9, n=2),
    SamplingParams(temperature=0.9, top_p=0.95, min_p=0.001, max_new_tokens=9, n=2),
    SamplingParams(temperature=0, max_new_tokens=9),
    SamplingParams(temperature=0.02, repetition_penalty=1.5, max_new_tokens=9),
]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    """A model that prefers what its tokenizer lacks."""
    model = model_of("llama", eos_token_id=END)
    with torch.no_grad():
        model.lm_head.weight[OTHERS] *= 5
    return model


@pytest.mark.parametrize("cache", ["slots", "pool"])
def test_every_id_of_the_tokenizer_is_drawn_and_no_other(llama: PreTrainedModel, cache: Any) -> None:
    prompts = some_prompts([3, 8, 5, 2, 6])
    outputs = Generator(llama, sparse_tokenizer(), cache=cache).generate(prompts, PARAMS)
    wide = [*outputs[0].samples]
    assert {token for sample in wide for token in sample.token_ids} == set(SPARSE_IDS[:-1])
    assert {sample.end_token for sample in wide} == {END}
    for prompt, output in zip(prompts, outputs, strict=True):
        for sample in output.samples:
            ids = sample.token_ids + ([END] if sample.finish_reason == "stop" else [])
            assert set(ids) <= set(SPARSE_IDS)
            logps = teacher_forced(llama, prompt, ids)[:-1].log_softmax(-1)  # of the whole head
            wanted = logps.gather(1, torch.tensor(ids)[:, None])[:, 0]
            raw = [*sample.raw_logps, *([] if sample.end_logp is None else [sample.end_logp])]
            torch.testing.assert_close(torch.tensor(raw), wanted, atol=2e-5, rtol=1e-5)
    if cache == "pool":
        assert_equal(outputs, Generator(llama, sparse_tokenizer(), cache="slots").generate(prompts, PARAMS))


def test_greedy_is_hugging_faces_with_the_other_ids_suppressed(llama: PreTrainedModel) -> None:
    (prompt,) = some_prompts([7])
    config = GenerationConfig(
        max_new_tokens=12, do_sample=False, suppress_tokens=OTHERS, eos_token_id=None, pad_token_id=0
    )
    ids = torch.tensor([prompt])
    wanted = llama.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, 7:].tolist()
    params = SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True)
    assert Generator(llama, sparse_tokenizer()).generate([prompt], params)[0].samples[0].token_ids == wanted


def test_processed_log_probs_are_those_of_the_tokenizers_ids(llama: PreTrainedModel) -> None:
    (prompt,) = some_prompts([4])
    params = SamplingParams(temperature=0.8, max_new_tokens=10, ignore_eos=True)
    sample = Generator(llama, sparse_tokenizer()).generate([prompt], params)[0].samples[0]
    logits = teacher_forced(llama, prompt, sample.token_ids)[:-1] / 0.8
    logits[:, OTHERS] = float("-inf")
    wanted = logits.log_softmax(-1).gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(sample.logps), wanted, atol=1e-4, rtol=1e-5)


def test_adapters_in_one_batch() -> None:
    peft, prompts = three_adapters(), some_prompts([3, 8, 5])
    for cache in ("slots", "pool"):
        params = SamplingParams(temperature=5.0, max_new_tokens=30, ignore_eos=True)
        outputs = Generator(peft, sparse_tokenizer(), cache=cache).generate(prompts, params, adapters=NAMES)
        assert {token for output in outputs for token in output.samples[0].token_ids} == set(SPARSE_IDS)


@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(0, 40), min_size=1), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_holes_have_no_probability_whatever_lies_there(ids: set[int], dtype: torch.dtype) -> None:
    """Finite, infinite and broken logits at ids that do not exist change no draw."""
    vocabulary = Vocabulary.from_ids(ids)
    assert [i for i in range(vocabulary.num_tokens) if all(i not in hole for hole in vocabulary.holes)] == sorted(ids)
    columns = vocabulary.on(torch.device("cpu"))
    noise = torch.Generator().manual_seed(sum(ids))
    logits = (4 * torch.randn(64, 41, generator=noise)).to(dtype)
    params = sample_params([SamplingParams(temperature=t, top_p=p) for t, p in ((1, 1), (3, 0.9))] * 32, None, CPU)

    def tokens(x: Tensor) -> Tensor:
        keys = torch.arange(192).reshape(64, 3)
        return draw(x, columns, params, keys, torch.zeros(64, dtype=torch.int64), ALONE)[0]

    drawn = tokens(logits)
    assert set(drawn.tolist()) <= ids
    for value in (60000.0, float("inf"), float("nan")):
        other = logits.clone()
        other[:, [i for i in range(41) if i not in ids]] = value
        assert torch.equal(tokens(other), drawn)


CPU = torch.device("cpu")


def test_contiguous_ids_need_no_mask() -> None:
    vocabulary = Vocabulary.of(VOCAB, character_tokenizer(50))
    logits = torch.zeros(2, VOCAB)
    assert (vocabulary, Vocabulary.of(VOCAB)) == (Vocabulary(50), Vocabulary(VOCAB))
    assert vocabulary.on(CPU).drawable(logits).data_ptr() == logits.data_ptr()
    assert Vocabulary.of(20, sparse_tokenizer_without_end()).num_tokens == 15  # of 8, 13, 14, 21: the head has 20


def sparse_tokenizer_without_end() -> Any:
    tokenizer = sparse_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


def test_an_end_token_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"end token has id 59, and the model's head 40 columns.*resize"):
        Generator(model_of("llama", vocab_size=40), sparse_tokenizer())
    with pytest.raises(ConfigError, match="none of the tokenizer's ids"):
        Vocabulary.of(1, sparse_tokenizer_without_end())


def test_a_stop_id_in_a_hole_ends_nothing(llama: PreTrainedModel) -> None:
    params = SamplingParams(temperature=5.0, max_new_tokens=12, ignore_eos=True)
    stopping = replace(params, stop_token_ids=tuple(OTHERS))
    generator = Generator(llama, sparse_tokenizer())
    (free,), (stopped,) = (generator.generate([[5, 8]], one) for one in (params, stopping))
    assert stopped.samples[0].token_ids == free.samples[0].token_ids
