"""Several LoRA adapters in one batch: every request has its own adapter's text, log-probs and cache."""

from __future__ import annotations

import logging

import pytest
import torch
from generation_checks import NAMES, some_prompts, three_adapters

from macpo.engine.generation import Generator, SamplingParams
from macpo.engine.generation.multilora import StackedAdapters, why_not


def test_a_mixed_batch_equals_a_run_of_each_adapter() -> None:
    """Same ids and log-probs at every batch size, with shared prompts: no adapter reads another's cache."""
    peft = three_adapters()
    prompts = some_prompts([3, 9, 5]) * 4
    adapters: list[str | None] = [None, "wide", "odd", "default"] * 3
    params = SamplingParams(temperature=1.0, top_p=0.9, max_new_tokens=12, n=2, seed=4, ignore_eos=True)
    ids = [str(i) for i in range(len(prompts))]
    alone = {name: Generator(peft).generate(prompts, params, request_ids=ids, adapters=name) for name in (None, *NAMES)}
    assert alone[None] == alone["default"] != alone["wide"] != alone["odd"]
    for max_batch in (64, 5, 2):
        mixed = Generator(peft, max_batch=max_batch).generate(prompts, params, request_ids=ids, adapters=adapters)
        for index, (output, name) in enumerate(zip(mixed, adapters, strict=True)):
            for ours, theirs in zip(output.samples, alone[name][index].samples, strict=True):
                assert ours.token_ids == theirs.token_ids
                assert ours.raw_logps == pytest.approx(theirs.raw_logps, abs=1e-4)


def test_one_batch_and_nothing_left_behind() -> None:
    peft = three_adapters()
    base = peft.get_base_model()
    forwards: list[int] = []
    before = base(torch.tensor([[5, 6, 7]])).logits
    hook = base.register_forward_pre_hook(
        lambda _, args, kwargs: forwards.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    params = SamplingParams(temperature=0, max_new_tokens=6, ignore_eos=True)
    generator = Generator(peft)
    generator.generate(some_prompts([4]), params)  # tries once whether the model takes the attention hook
    forwards.clear()
    generator.generate(some_prompts([4, 4, 4]), params, adapters=NAMES)
    assert forwards == [12, *[3] * 5]  # one prefill, then every step has a row of each adapter
    hook.remove()
    assert torch.equal(base(torch.tensor([[5, 6, 7]])).logits, before)


def test_new_weights_are_used_at_once() -> None:
    peft = three_adapters()
    generator, prompts = Generator(peft), some_prompts([6, 6])
    params = SamplingParams(temperature=0, max_new_tokens=8, ignore_eos=True)
    first = generator.generate(prompts, params, adapters=["wide", "odd"])
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B.odd" in name:
                parameter.neg_()
    second = generator.generate(prompts, params, adapters=["wide", "odd"])
    assert second[0] == first[0] and second[1] != first[1]
    assert second[1] == generator.generate(prompts, params, adapters="odd")[1]


def test_what_cannot_be_stacked_runs_one_after_the_other(caplog: pytest.LogCaptureFixture) -> None:
    peft = three_adapters(use_dora=True)
    assert "variant of LoRA" in why_not(peft)
    with pytest.raises(ValueError, match="variant of LoRA"):
        StackedAdapters(peft, NAMES)
    params = SamplingParams(temperature=0, max_new_tokens=5, ignore_eos=True)
    prompts = some_prompts([4, 7])
    with caplog.at_level(logging.WARNING, "macpo.engine.generation.generator"):
        mixed = Generator(peft).generate(prompts, params, adapters=["wide", "default"])
    assert [record.message for record in caplog.records if "one after the other" in record.message]
    alone = [Generator(peft).generate([p], params, adapters=a)[0] for p, a in zip(prompts, ("wide", "default"))]  # noqa: B905
    assert [o.samples[0].token_ids for o in mixed] == [o.samples[0].token_ids for o in alone]


def test_a_token_count_that_does_not_fit_is_an_error() -> None:
    peft = three_adapters()
    stacked = StackedAdapters(peft, NAMES)
    stacked.assign(["odd", "wide"])
    with stacked.active(), pytest.raises(ValueError, match="tokens where the packed row has 2"):
        peft(torch.tensor([[3, 4, 5]]))
    assert "forward" not in vars(next(m for m in peft.modules() if hasattr(m, "lora_A")))
