"""sample in Triton against its reference: noise to the bit, the kept sets through their mass, ids, log-probs.

On a GPU the kernels run compiled; elsewhere under Triton's interpreter, so the sizes here are small, and the sizes
inside the kernels' launcher are shrunk with them: lists of candidates then form at a vocabulary of 700.
"""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, TRITON
from sampling_cases import SETTINGS, make

from macpo.kernels import SampleParams, sample, triton_support
from macpo.kernels.sampling import library, op, reference
from macpo.kernels.sampling.philox import gumbel, token_words, uniform

pytestmark = list(TRITON.marks)

if triton_support.INSTALLED:
    import triton
    import triton.language as tl

    from macpo.kernels.sampling import triton_impl, triton_noise

    @triton.jit
    def noise_kernel(
        p_seed, p_keys, p_position, p_token, p_word, p_u, p_gumbel, p_tile, p_top,
        start, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        c0, c1, c2, high, k0, k1 = triton_noise.row_counter(p_seed, p_keys, p_position, row)
        at = tl.arange(0, BLOCK)
        words = triton_noise.token_words(tl.load(p_token + row * BLOCK + at), c0, c1, c2, high, k0, k1)
        tl.store(p_word + row * BLOCK + at, words.to(tl.int64))
        tl.store(p_u + row * BLOCK + at, triton_noise.uniform(words))
        tl.store(p_u + (tl.num_programs(0) + row) * BLOCK + at, triton_noise.one_less_uniform(words))
        tl.store(p_gumbel + row * BLOCK + at, triton_noise.gumbel(words))
        a0, a1, a2, a3, b0, b1, b2, b3 = triton_noise.tile_blocks(
            start, c0, c1, c2, high, k0, k1, 2, BLOCK // 2, BLOCKS
        )
        tile = tl.reshape(triton_noise.in_token_order(a0, a1, a2, a3, b0, b1, b2, b3, 2, BLOCK // 2, BLOCKS), [BLOCK])
        top = triton_noise.largest_word(a0, a1, a2, a3, b0, b1, b2, b3, BLOCKS)
        tl.store(p_top + row, top.to(tl.int64))
        tl.store(p_tile + row * BLOCK + at, tile.to(tl.int64))


MIXED = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def mixed(settings, vocab, seed=0, logits=None):
    """One row of each setting: logits, params, keys, positions."""
    made, _, keys, positions = make(len(settings), vocab, {}, seed)
    columns = {name: torch.tensor([row.get(name, value) for row in settings]) for name, value in MIXED.items()}
    g = torch.Generator().manual_seed(seed + 1)
    seen = torch.rand(len(settings), vocab, generator=g) < 0.3
    params = SampleParams(torch.arange(len(settings)) - 5, **columns, seen=seen)
    return made if logits is None else logits, params, keys, positions


def on_device(logits, params, keys, positions):
    """Logits as the first columns of a wider tensor: what is read past the vocabulary would win every draw."""
    wide = torch.full((len(logits), logits.shape[1] + 37), 1e30 if logits.dtype == torch.float32 else 6e4).to(logits)
    wide[:, : logits.shape[1]] = logits
    logits = wide.to(DEVICE)[:, : logits.shape[1]]
    names = ("seed", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    values = {name: getattr(params, name).to(DEVICE) for name in names}
    seen = None if params.seen is None else params.seen.to(DEVICE)
    return logits, SampleParams(**values, seen=seen), keys.to(DEVICE), positions.to(DEVICE)


def draw(inputs):
    return [x.cpu() for x in sample(*on_device(*inputs), backend="triton")]


def assert_equals_reference(inputs):
    """Ids equal; log-probs within the sampling tests' tolerance, so that the kept sets have the same mass.

    Two things are decided by rounding: whether a token's mass above it is under top_p, and which of two noisy scores
    is larger. Inputs must not hang on either, or the comparison would be one of rounding. Mass: each probability has
    a relative error below 2 ** -22 * (10 + |score|) in either implementation, so 1e-5 for scores up to 30. Noisy
    scores up to 40: two roundings of 2 ** -19 and two of a logarithm's, below 1e-5 together.
    """
    logits, params, keys, positions = inputs
    scores, keep = reference.scores_and_support(logits, params)
    every = torch.arange(logits.shape[1]).expand(logits.shape[0], -1)
    noisy = scores.masked_fill(~keep, float("-inf")) + gumbel(token_words(params.seed, keys, positions, every))
    if logits.shape[1] > 1:
        best = noisy.topk(2).values
        assert (best[:, 0] - best[:, 1])[params.temperature > 0].min() > 1e-5, "two tokens tie"
    kept_by_rank = scores >= scores.topk(logits.shape[1]).values.gather(
        1, torch.where(params.top_k == 0, logits.shape[1], params.top_k).clamp(max=logits.shape[1])[:, None] - 1
    )
    probs = scores.double().masked_fill(~kept_by_rank, float("-inf")).softmax(-1).sort(descending=True).values
    edge = (probs.cumsum(-1) - params.top_p[:, None]).abs().masked_fill((params.top_p == 1)[:, None], 1.0)
    assert edge.min() > 1e-5, "a token lies on the nucleus' edge"

    ids, raw, processed = draw(inputs)
    wanted_ids, wanted_raw, wanted_processed = reference.sample(*inputs)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(raw, wanted_raw, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(processed, wanted_processed, rtol=1e-6, atol=2e-6)
    return ids, raw, processed


@pytest.fixture
def small(monkeypatch):
    """Several chunks a row, of two tiles each, and lists of candidates from vocabularies above 128."""
    for name, value in {"CHUNK": 512, "CAP": 128, "GROUPS": (16,), "PROBE": 8, "DRAW_BLOCK": 256}.items():
        monkeypatch.setattr(triton_impl, name, value)


@pytest.mark.parametrize("blocks", [1, 2])  # of four words, a thread: float32 and 16-bit logits
def test_noise_has_the_bits_of_philox(blocks):
    batch, count = 9, 32
    g = torch.Generator().manual_seed(0)
    keys = torch.stack([torch.randint(0, 2**62, (batch,), generator=g), torch.arange(batch), torch.arange(batch)], 1)
    keys[0, 0], keys[1] = 2**63 - 1, torch.tensor([2**63 - 1, library.MAX_SAMPLE, library.MAX_ATTEMPT])
    seed = torch.randint(-(2**62), 2**62, (batch,), generator=g)
    positions = torch.randint(0, library.MAX_POSITION + 1, (batch,), generator=g)
    tokens = torch.randint(0, op.MAX_VOCAB, (batch, count), generator=g, dtype=torch.int32)
    tokens[0, :2] = torch.tensor([0, op.MAX_VOCAB - 1])
    words, tile = (torch.empty(batch, count, dtype=torch.int64, device=DEVICE) for _ in range(2))
    top = torch.empty(batch, dtype=torch.int64, device=DEVICE)
    u, noise = torch.empty(2, batch, count, device=DEVICE), torch.empty(batch, count, device=DEVICE)
    inputs = [x.to(DEVICE) for x in (seed, keys, positions, tokens)]
    noise_kernel[(batch,)](*inputs, words, u, noise, tile, top, 4096, BLOCK=count, BLOCKS=blocks, num_warps=1)
    wanted = token_words(seed, keys, positions, tokens.long())
    assert torch.equal(words.cpu(), wanted)
    assert torch.equal(u[0].cpu(), uniform(wanted)) and torch.equal(u[1].cpu(), 1 - uniform(wanted))
    torch.testing.assert_close(noise.cpu(), gumbel(wanted), rtol=1e-6, atol=1e-6)
    in_tile = torch.arange(4096, 4096 + count).expand(batch, -1)
    assert torch.equal(tile.cpu(), token_words(seed, keys, positions, in_tile))
    assert torch.equal(top, tile.amax(1))


@pytest.mark.parametrize("vocab", [1, 2, 318])  # no choice; the smallest; a tail after the scan's tiles of 256
def test_every_setting_in_one_batch_equals_the_reference(vocab):
    assert_equals_reference(mixed(SETTINGS, vocab))


LISTS = [
    {"temperature": 0.95, "top_p": 0.7, "top_k": 20},  # a list of at least 20
    {"top_k": 60},  # more than there are groups: the whole row
    {"temperature": 0.3, "top_p": 0.8},  # the nucleus lies in the list
    {"temperature": 3.0, "top_p": 0.9},  # and does not
    {"min_p": 0.3},
    {"min_p": 0.001},  # keeps more than the list
    {"temperature": 0.6, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.4, "top_k": 9},
    {"top_k": 35, "top_p": 0.9},  # a list of about 70
    {"temperature": 0.0},
    {"temperature": 0.5},
    {"temperature": 1.7},
]


def test_lists_of_candidates_equal_the_reference(small):
    assert_equals_reference(mixed(LISTS, 700, seed=3))


def test_default_sizes_list_candidates_too():
    """A vocabulary above the list's capacity, as the launcher has it: 313 groups, and 40 with groups of 128."""
    assert_equals_reference(mixed([LISTS[0], LISTS[2]], 5003, seed=5))


def test_groups_of_128(small, monkeypatch):
    monkeypatch.setattr(triton_impl, "GROUPS", (128,))
    monkeypatch.setattr(triton_impl, "PROBE", 3)
    assert_equals_reference(mixed([{"top_k": 4, "top_p": 0.9}, {"top_p": 0.3}], 900, seed=6))


def test_alone_or_in_any_batch_to_the_bit(small):
    """Chunks and searches depend on a row alone, so its numbers do too, whatever the batch needs besides."""
    inputs = mixed(LISTS, 700, seed=3)
    together = draw(inputs)
    for row in (0, 3, 10):
        index = torch.tensor([row])
        alone = draw((inputs[0][index], inputs[1].select(index), inputs[2][index], inputs[3][index]))
        for one, other in zip(together, alone, strict=True):
            assert torch.equal(one[index], other)


def test_scratch_is_never_read_before_it_is_written(small, monkeypatch):
    inputs = mixed(LISTS[:3] + LISTS[-3:], 700, seed=3)
    expected = draw(inputs)
    empty = torch.empty

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(float("nan") if made.is_floating_point() else torch.iinfo(made.dtype).max)

    monkeypatch.setattr(triton_impl.torch, "empty", poisoned)
    for one, other in zip(expected, draw(inputs), strict=True):
        assert torch.equal(one, other)


def test_all_equal_logits(small):
    """Ties fill no list. Top-k keeps them all, the nucleus the highest ids, as many as have less than top_p above."""
    vocab = 700
    inputs = mixed([{"top_k": 3}, {"top_p": 0.4501}], vocab, logits=torch.full((2, vocab), 1.25))
    ids, _, processed = assert_equals_reference(inputs)
    size = 316  # 0.4501 * 700 = 315.07
    torch.testing.assert_close(processed, -torch.tensor([float(vocab), float(size)]).log())
    assert ids[1] >= vocab - size


def test_unlikely_tokens_of_a_later_tile_win_as_often_as_they_should():
    """One token against 256 that are e ** -8 as likely each; draws that look at fewer of them would miss the wins."""
    logits = torch.full((60, 512), float("-inf"))
    logits[:, 5], logits[:, 256:] = 0.0, -8.0
    ids, _, _ = assert_equals_reference(mixed([{}] * 60, 512, logits=logits))
    assert (ids >= 256).sum() >= 2  # of 60 * 0.079 = 4.7 expected


def test_maxima_that_rise_from_tile_to_tile(small):
    logits = make(3, 700, {})[0].sort().values
    inputs = mixed([{"temperature": 0.5}, {"temperature": 1.7, "repetition_penalty": 1.2}, {}], 700, logits=logits)
    assert_equals_reference(inputs)


@pytest.mark.parametrize(("k", "top_p"), [(2, 1.0), (2, 0.7), (4, 0.55)])
def test_ties_at_the_kth_and_at_the_nucleus(k, top_p):
    """2 and -0.0 occur several times; 0 and -0 are equal."""
    row = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0, -0.0, 0.0, 1.5])
    inputs = mixed([{"top_k": k, "top_p": top_p}] * 2, 9, logits=torch.stack([row, row.flip(0) * 0.0]))
    assert_equals_reference(inputs)


def test_one_huge_logit_and_masked_logits(small):
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    logits[:2, 77] = 30000.0
    logits[2:, ::2] = float("-inf")
    logits[2:, :256] = float("-inf")  # a chunk without any token
    inputs = mixed([{}, {"top_p": 0.9}, {"temperature": 0.7}, {"top_k": 3}], 300, logits=logits)
    ids, raw, processed = draw(inputs)
    assert ids[:2].tolist() == [77, 77] and raw[:2].tolist() == [0.0, 0.0] and processed[:2].tolist() == [0.0, 0.0]
    wanted_ids, wanted_raw, wanted_processed = reference.sample(*inputs)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(raw, wanted_raw, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(processed, wanted_processed, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "all -inf"], ids=str)
def test_rows_without_a_distribution_show_and_harm_no_other(small, bad):
    """A NaN raw log-prob, an id inside the vocabulary, and neighbours as they were."""
    settings = [{}, {"top_k": 5, "top_p": 0.8}, {"min_p": 0.1}, {"temperature": 0.0}, {"top_k": 2}, {}]
    inputs = mixed(settings, 300)
    expected = draw(inputs)
    if bad == "all -inf":
        inputs[0][:4] = float("-inf")
    else:
        inputs[0][:4, 210] = bad
    ids, raw, processed = draw(inputs)
    assert raw[:4].isnan().all()
    assert ((ids >= 0) & (ids < 300)).all()
    for one, other in zip(expected, (ids, raw, processed), strict=True):
        assert torch.equal(one[4:], other[4:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_logits(dtype):
    """Computed on in float32."""
    logits, *rest = mixed([{}, {"top_k": 12, "top_p": 0.8}], 318, seed=2)
    logits = logits.to(dtype)
    for one, other in zip(draw((logits, *rest)), draw((logits.float(), *rest)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_float64_is_named():
    logits, *rest = mixed([{}], 4)
    with pytest.raises(ValueError, match=r"float64"):
        draw((logits.double(), *rest))
