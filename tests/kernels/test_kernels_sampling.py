"""sample: noise, filters, log-probs; both backends against the reference and Hugging Face's processors."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_checks import BACKENDS, NATIVE
from sampling_cases import SETTINGS, make
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from macpo.kernels import SampleParams, native, sample
from macpo.kernels.sampling import library, op, reference
from macpo.kernels.sampling.philox import gumbel, philox, token_words, uniform

# 2: the smallest choice; 318: the demo world; 1031: tail after the native kernel's blocks of 256; 5000: grouped top-k.
VOCABS = [2, 318, 1031, 5000]


def huggingface_scores(logits, setting, seen):
    """Scores after Hugging Face's own processors, in the order of its `generate`; -inf is outside the support."""
    scores = logits.clone()
    if "repetition_penalty" in setting:
        rows = []
        for row, mask in zip(scores, seen, strict=True):
            ids = mask.nonzero().squeeze(1)[None]
            rows.append(RepetitionPenaltyLogitsProcessor(setting["repetition_penalty"])(ids, row[None]))
        scores = torch.cat(rows)
    if setting.get("temperature", 1.0) not in (0.0, 1.0):
        scores = TemperatureLogitsWarper(setting["temperature"])(None, scores)
    if setting.get("top_k"):
        scores = TopKLogitsWarper(setting["top_k"])(None, scores)
    if setting.get("top_p", 1.0) < 1:
        scores = TopPLogitsWarper(setting["top_p"])(None, scores)
    if setting.get("min_p"):
        scores = MinPLogitsWarper(setting["min_p"])(None, scores)
    return scores


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # kat_vectors of the Random123 distribution, philox4x32 with 10 rounds
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_responses(counter, key, expected):
    words = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(word) for word in words) == expected
    if native.module is not None and counter[1] < 2**31:  # a request id has 63 bits
        # The same draw through the counter layout: request, position | attempt << 22, block | sample << 20, seed.
        request = counter[0] | counter[1] << 32
        keys = torch.tensor([[request, counter[3] >> 20, counter[2] >> 22]])
        seed, position = torch.tensor([op_signed(key[0] | key[1] << 32)]), torch.tensor([counter[2] & (2**22 - 1)])
        tokens = torch.arange(4)[None] + 4 * (counter[3] & (2**20 - 1))
        assert native.token_words(seed, keys, position, tokens)[0].tolist() == list(expected)


def op_signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize("backend", [NATIVE])
def test_native_noise_is_bit_equal(backend):
    g = torch.Generator().manual_seed(0)
    batch, count = 37, 45
    keys = torch.stack([torch.randint(0, 2**62, (batch,), generator=g), torch.arange(batch), torch.arange(batch)], 1)
    keys[0, 0], keys[1] = 2**63 - 1, torch.tensor([2**63 - 1, library.MAX_SAMPLE, library.MAX_ATTEMPT])
    seed = torch.randint(-(2**62), 2**62, (batch,), generator=g)
    positions = torch.randint(0, library.MAX_POSITION + 1, (batch,), generator=g)
    tokens = torch.randint(0, op.MAX_VOCAB, (batch, count), generator=g)
    assert torch.equal(native.token_words(seed, keys, positions, tokens), token_words(seed, keys, positions, tokens))


def test_every_counter_field_changes_the_noise():
    base = {"seed": 1, "request": 2, "sample": 3, "attempt": 4, "position": 5, "token": 6}
    high = {"seed": 2**40, "request": 2**62, "sample": 4095, "attempt": 1023, "position": 2**22 - 1, "token": 2**22 - 1}

    def words(seed, request, sample, attempt, position, token):
        tensors = (torch.tensor([seed]), torch.tensor([[request, sample, attempt]]), torch.tensor([position]))
        return int(token_words(*tensors, torch.tensor([[token]])))

    variants = [base] + [base | {name: value} for name in base for value in (high[name], base[name] + 1)]
    assert len({words(**variant) for variant in variants}) == len(variants)


def test_uniform_is_strictly_inside_the_unit_interval_and_exact():
    words = torch.tensor([0, 1, 511, 512, 2**31, 2**32 - 1])
    u = uniform(words)
    expected = [(int(w) // 512 + 0.5) / 2**23 for w in words]
    assert u.dtype == torch.float32 and u.double().tolist() == expected
    assert u.min() > 0 and u.max() < 1 and gumbel(words).isfinite().all()


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_support_equals_huggingface(vocab, setting):
    logits, params, _, _ = make(40, vocab, setting)
    scores, keep = reference.scores_and_support(logits, params)
    expected = huggingface_scores(logits, setting, params.seen)
    if setting.get("temperature") == 0.0:
        assert torch.equal(keep.nonzero()[:, 1], expected.argmax(dim=-1)) and (keep.sum(1) == 1).all()
    else:
        assert torch.equal(keep, expected > float("-inf"))
        torch.testing.assert_close(scores[keep], expected[keep])


def test_tokens_that_tie_with_the_kth_stay():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]]).repeat(4000, 1)
    params = SampleParams(0, top_k=2, batch=4000)
    assert reference.scores_and_support(logits, params)[1][0].tolist() == [False, True, True, True, True, False]
    keys = torch.stack([torch.arange(4000)] + [torch.zeros(4000, dtype=torch.int64)] * 2, 1)
    for backend in ["torch"] + ["native"] * (native.module is not None):
        ids, _, _ = sample(logits, params, keys, keys[:, 1], backend=backend)
        assert set(ids.tolist()) == {1, 2, 3, 4}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_backends_equal_the_reference(backend, vocab, setting):
    batch = 60 if vocab < 1000 else 6  # the reference draws noise for the whole vocabulary
    inputs = make(batch, vocab, setting)
    ids, raw, processed = sample(*inputs, backend=backend)
    wanted_ids, wanted_raw, wanted_processed = reference.sample(*inputs)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(raw, wanted_raw, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(processed, wanted_processed, rtol=1e-6, atol=2e-6)
    assert torch.equal(inputs[0], make(batch, vocab, setting)[0])  # the logits are untouched


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_rows_equal_rows_alone_in_any_order(backend):
    """A row's draw depends on nothing but its own logits, settings and keys."""
    batch, vocab = 24, 318
    g = torch.Generator().manual_seed(4)
    rows = list(itertools.islice(itertools.cycle(SETTINGS), batch))
    defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    columns = {name: torch.tensor([row.get(name, value) for row in rows]) for name, value in defaults.items()}
    seen = torch.rand(batch, vocab, generator=g) < 0.3
    params = SampleParams(torch.arange(batch) - 5, **columns, seen=seen)
    logits, _, keys, positions = make(batch, vocab, {})
    together = sample(logits, params, keys, positions, backend=backend)
    order = torch.randperm(batch, generator=g)
    shuffled = sample(logits[order], params.select(order), keys[order], positions[order], backend=backend)
    for one, other in zip(together, shuffled, strict=True):
        assert torch.equal(one[order], other)
    for row in range(batch):
        index = torch.tensor([row])
        alone = sample(logits[index], params.select(index), keys[index], positions[index], backend=backend)
        for one, other in zip(together, alone, strict=True):
            assert torch.equal(one[index], other), f"row {row}: {rows[row]}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("setting", [{}, {"temperature": 0.7, "top_k": 6, "top_p": 0.95}], ids=str)
def test_frequencies_follow_the_softmax(backend, setting):
    """Chi-square over 20,000 draws: independent in position, request and sample."""
    draws, vocab = 20_000, 10
    row = torch.linspace(-1.5, 1.0, vocab)[torch.randperm(vocab, generator=torch.Generator().manual_seed(1))]
    params = SampleParams(3, **setting, batch=draws)
    index = torch.arange(draws)
    keys = torch.stack([index // 400, index // 20 % 20, torch.zeros_like(index)], 1)
    ids, _, processed = sample(row.expand(draws, -1).contiguous(), params, keys, index % 20, backend=backend)
    scores, keep = reference.scores_and_support(row[None], SampleParams(3, **setting, batch=1))
    expected = scores.double().masked_fill(~keep, float("-inf")).softmax(-1)[0] * draws
    counts = torch.bincount(ids, minlength=vocab).double()
    inside = expected > 0
    assert counts[~inside].sum() == 0
    statistic = ((counts - expected)[inside] ** 2 / expected[inside]).sum().item()
    # 99.9% quantiles of chi-square with 9, 8, ... 3 degrees of freedom
    quantile = {9: 27.88, 8: 26.12, 7: 24.32, 6: 22.46, 5: 20.52, 4: 18.47, 3: 16.27}[int(inside.sum()) - 1]
    assert statistic < quantile, f"chi-square {statistic:.1f} above {quantile}"
    torch.testing.assert_close(processed.exp().double(), (expected / draws)[ids], rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_is_the_first_largest_and_logps_are_named_right(backend):
    logits = torch.tensor([[0.0, 2.0, 2.0, -1.0], [5.0, 5.0, 5.0, 5.0]])
    keys, positions = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    ids, raw, processed = sample(logits, SampleParams(0, 0.0, batch=2), keys, positions, backend=backend)
    assert ids.tolist() == [1, 0]
    torch.testing.assert_close(raw, logits.log_softmax(-1)[[0, 1], [1, 0]])
    assert processed.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("setting", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0.0}], ids=str)
def test_masked_logits_are_never_drawn_and_nan_shows(backend, setting):
    logits = torch.zeros(300, 700)
    logits[:, ::2] = float("-inf")
    logits[7, 3] = float("nan")
    index = torch.arange(300)
    keys = torch.stack([index, index * 0, index * 0], 1)
    ids, raw, _ = sample(logits, SampleParams(0, **setting, batch=300), keys, index, backend=backend)
    finite = index != 7
    assert (ids[finite] % 2 == 1).all()
    assert raw[finite].isfinite().all() and raw[7].isnan()


def test_bfloat16_logits_are_computed_on_in_float32():
    logits, params, keys, positions = make(8, 318, SETTINGS[1])
    low = logits.bfloat16()
    for one, other in zip(
        sample(low, params, keys, positions), sample(low.float(), params, keys, positions), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("setting", [SETTINGS[1], SETTINGS[8], SETTINGS[9]], ids=str)
def test_sample_compiles_whole(setting):
    """As one operator, whose description of itself is right; the facts of the settings travel with them."""
    logits, params, keys, positions = make(5, 40, setting)

    def step(logits, params, keys, positions):
        ids, raw, processed = sample(logits * 2, params, keys, positions)
        return ids + 1, raw - processed

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        compiled(logits, params, keys, positions), step(logits, params, keys, positions), strict=True
    ):
        assert torch.equal(one, other)
    names = ("seed", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seen")
    facts = params.facts
    flags = (facts["penalised"], facts["greedy"], facts["any_greedy"], list(facts["top_ks"]))
    torch.library.opcheck(
        torch.ops.macpo.sample,
        (
            logits,
            *(getattr(params, name) for name in names),
            keys,
            positions,
            *flags,
            facts["top_p"],
            facts["min_p"],
            "torch",
        ),
    )


def test_empty_batch():
    params = SampleParams(0, batch=0)
    ids, raw, processed = sample(torch.zeros(0, 5), params, torch.zeros(0, 3).long(), torch.zeros(0).long())
    assert (ids.shape, raw.shape, processed.shape) == ((0,), (0,), (0,))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1e-6}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": 1.2}, "needs `seen`"),
        ({"seed": 2**64}, "64 bits"),
        ({"top_p": torch.ones(3)}, "top_p must be \\[2\\]"),
        ({"seen": torch.zeros(2, 5)}, "seen must be bool"),
    ],
)
def test_bad_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        SampleParams(**({"seed": 0, "batch": 2} | setting))


def test_keys_out_of_range_are_named():
    logits, params = torch.zeros(1, 4), SampleParams(0, batch=1)
    zero = torch.zeros(1, dtype=torch.int64)
    for column, value, name in ((0, -1, "request id"), (1, 4096, "sample"), (2, 1024, "attempt")):
        keys = torch.zeros(1, 3, dtype=torch.int64)
        keys[0, column] = value
        with pytest.raises(ValueError, match=name):
            sample(logits, params, keys, zero)
    with pytest.raises(ValueError, match="positions"):
        sample(logits, params, torch.zeros(1, 3, dtype=torch.int64), zero + 2**22)
    with pytest.raises(ValueError, match="params are for 1 rows"):
        sample(torch.zeros(2, 4), params, torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
