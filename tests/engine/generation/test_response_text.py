"""Stop texts: the text returned is that of the response without them, up to the first occurrence, whatever the tokens.

Compared with plain decoding by transformers, over tokenizers whose tokens and characters do not meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from architectures import model_of
from generation_checks import assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from macpo.engine.errors import ConfigError
from macpo.engine.generation import Generator, Request, SamplingParams
from macpo.engine.generation.response_text import cut_at_stop
from macpo.engine.generation.sequence import ActiveSequence
from macpo.method.responses import learnable_text

STORIES = Path(__file__).parents[4] / "shared" / "models" / "stories260K"
END = "</s>"
TEXTS = ["a", "b", " ", "\n", "é", "€", "😀", "STOP", " STOP", "ST", "OP", "\n\n", "User:", "�"]


def byte_letters() -> dict[int, str]:
    """The printable character that byte-level tokenizers write for a byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return {byte: chr(byte) if byte in kept else chr(next(rest)) for byte in range(256)}


LETTERS = byte_letters()


def letters(token: str) -> str:
    """The byte-level spelling of bytes that are given as characters below 256."""
    return "".join(LETTERS[ord(byte)] for byte in token)


def byte_level() -> PreTrainedTokenizerFast:
    """All bytes, and tokens that begin or end inside a character; ids have holes and the end token lies at the top."""
    across = ["\n\xc3", "\xa9 STOP", "\xa9STOP\xf0\x9f", "OP\xe2\x82", "hello ST", "\xac\n\nUser", " STOP", "\x98\x80:"]
    tokens = [*LETTERS.values(), *map(letters, across), "<tool>", "<|sep|>", END]
    raw = Tokenizer(models.BPE(vocab={token: i + i // 50 for i, token in enumerate(tokens)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_tokens([AddedToken("<tool>", lstrip=True, rstrip=True, normalized=False)])
    raw.add_special_tokens(["<|sep|>", END])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END)


def pieces(decoder: Any) -> PreTrainedTokenizerFast:
    """SentencePiece's blank before a word, and tokens of single bytes."""
    words = [
        "▁",
        "▁a",
        "a",
        "b",
        "▁STOP",
        "ST",
        "OP",
        "P",
        "▁User",
        ":",
        "é",
        "�",
        "<unk>",
        *(f"<0x{b:02X}>" for b in range(256)),
    ]
    raw = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], byte_fallback=True))
    raw.decoder = decoder
    raw.add_special_tokens([END, "<|sep|>"])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END)


def word_pieces() -> PreTrainedTokenizerFast:
    words = ["a", "b", "##a", "##b", "ST", "##OP", "STOP", ".", "n", "##'", "'", "t", "[UNK]"]
    raw = Tokenizer(models.WordPiece(vocab={word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    raw.add_special_tokens([END])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END)


llama_2 = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
TOKENIZERS = {
    "byte-level": byte_level(),
    "byte fallback": pieces(llama_2),
    "metaspace": pieces(decoders.Metaspace()),
    "word pieces": word_pieces(),
}
if STORIES.is_dir():
    TOKENIZERS["stories260K"] = AutoTokenizer.from_pretrained(STORIES)


def plain_text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def first_stop(text: str, stop: Sequence[str]) -> int:
    return min((at for at in map(text.find, stop) if at >= 0), default=-1)


@st.composite
def responses(draw: Any, special: bool = False) -> tuple[Any, list[int], tuple[str, ...]]:
    """A tokenizer, token ids and stop texts that often occur, overlap or begin inside a token."""
    tokenizer = TOKENIZERS[draw(st.sampled_from(sorted(TOKENIZERS)))]
    dropped = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    usable = sorted(set(tokenizer.get_vocab().values()) - (set() if special else dropped))
    written = st.sampled_from(TEXTS).map(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
    runs = draw(st.lists(st.lists(st.sampled_from(usable), max_size=6) | written, max_size=8))
    ids = [i for run in runs for i in run if i in usable]
    text = plain_text(tokenizer, ids)
    found = [st.sampled_from(TEXTS)]
    if text:
        at = st.integers(0, len(text) - 1)
        found += [
            st.builds(lambda a, n: text[a : a + n], at, st.integers(1, 5)),
            at.map(lambda a: text[a : a + 2] + "#"),
        ]
    return tokenizer, ids, tuple(draw(st.lists(st.one_of(*found), min_size=1, max_size=3)))


@settings(max_examples=150, deadline=None)
@given(responses())
def test_the_text_is_cut_at_the_first_stop_text(case: tuple[Any, list[int], tuple[str, ...]]) -> None:
    """The tokens that are kept are the fewest that spell it."""
    tokenizer, ids, stop = case
    text = plain_text(tokenizer, ids)
    start, cut = first_stop(text, stop), cut_at_stop(tokenizer, ids, stop)
    assert (cut is None) == (start < 0)
    if cut is not None:
        keep, kept = cut
        assert kept == text[:start]
        spells = [plain_text(tokenizer, ids[:n]).startswith(kept) for n in range(keep + 1)]
        assert spells.index(True) == keep


def run(tokenizer: Any, ids: list[int], stop: tuple[str, ...], steps: int) -> tuple[Any, int]:
    """The sample of a sequence that draws these tokens, looked at every few steps, and how many were drawn."""
    sequence = ActiveSequence(Request("a", (1,), SamplingParams(stop=stop)), 0, len(ids), frozenset())
    for at in range(0, len(ids), steps):
        new = ids[at : at + steps]
        sequence.extend(new, [-float(i) for i in new], [-1.0] * len(new))
        sequence.done = sequence.done or sequence.has_stopped(tokenizer, len(new))
        if sequence.done:
            break
    return sequence.finish(tokenizer), len(sequence.tokens)


@settings(max_examples=100, deadline=None)
@given(responses(special=True))
def test_when_it_is_looked_for_changes_nothing(case: tuple[Any, list[int], tuple[str, ...]]) -> None:
    """A sequence that is ended early has the text, the tokens and the log-probs of one that ran to its budget."""
    tokenizer, ids, stop = case
    whole = ActiveSequence(Request("a", (1,), SamplingParams(stop=stop)), 0, len(ids) + 1, frozenset())
    whole.extend(ids, [-float(i) for i in ids], [-1.0] * len(ids))
    wanted = whole.finish(tokenizer)
    assert first_stop(wanted.text or "", stop) < 0
    for steps in (1, 3, 8):
        got, _ = run(tokenizer, ids, stop, steps)
        assert (got.text, got.finish_reason) == (wanted.text, wanted.finish_reason)
        assert (got.token_ids, got.raw_logps, got.logps) == (wanted.token_ids, wanted.raw_logps, wanted.logps)


@pytest.mark.parametrize(
    ("name", "tokens", "stop", "text", "keep"),
    [
        # The character before it shares a token with it, or the character after it does.
        ("byte-level", ["\xc3", "\xa9 STOP", "b"], [" STOP"], "é", 2),
        ("byte-level", ["a", "\n\xc3", "\xa9", "b"], ["\n"], "a", 1),
        ("byte-level", ["\xf0", "\x9f", "\x98", "\x80", "x"], ["x"], "😀", 4),
        # It begins in the middle of a token and ends in the middle of another.
        ("byte-level", ["hello ST", "OP\xe2\x82", "\xac"], ["STOP"], "hello ", 1),
        # The first of several, also where another is complete before it.
        ("byte-level", ["x", "a", "b", "c", "d"], ["ab", "xabc"], "", 0),
        ("byte-level", ["x", "a", "b", "c", "d"], ["d", "bc"], "xa", 2),
        # Special tokens are no text, but may be named.
        ("byte-level", ["a", "<|sep|>", "b", "c"], ["b"], "a", 1),
        ("byte-level", ["a", "<|sep|>", "b"], ["<|sep|>"], "a", 1),
        ("byte-level", ["a", "<|sep|>", "b"], ["sep|>b"], "a", 2),
        ("byte-level", ["S", "T", "<|sep|>", "O", "P"], ["STOP"], "", 0),
        # The blank that SentencePiece writes first is no text.
        ("byte fallback", ["▁STOP", "b"], ["STOP"], "", 0),
        ("byte fallback", ["▁a", "▁STOP", "b"], [" STOP"], "a", 1),
        # A broken run of bytes spells no line feed.
        ("byte fallback", ["a", "<0x0A>", "<0xC3>", "b", "<0x0A>"], ["\n"], "a��b", 4),
        ("byte fallback", ["a", "<0x0A>", "<0xC3>", "<0xA9>", "b"], ["\n"], "a", 1),
    ],
)
def test_stop_texts_where_tokens_and_characters_do_not_meet(
    name: str, tokens: list[str], stop: list[str], text: str, keep: int
) -> None:
    tokenizer = TOKENIZERS[name]
    ids = [id_of(tokenizer, token) for token in tokens]
    assert cut_at_stop(tokenizer, ids, stop) == (keep, text)
    assert run(tokenizer, ids, tuple(stop), 1)[0].text == text


def id_of(tokenizer: Any, token: str) -> int:
    vocabulary = tokenizer.get_vocab()
    return int(vocabulary[token] if token in vocabulary else vocabulary[letters(token)])


@pytest.mark.parametrize(
    ("name", "tokens", "stop", "drawn"),
    [
        ("byte-level", ["a", "S", "T", "O", "P", "x", "x"], ["STOP"], 5),
        ("byte-level", ["x", "a", "b", "d", "x"], ["ab", "xabc"], 4),  # it waits for a longer one that began before
        ("byte-level", ["a", "b", "\xc3", "\xa9", "x"], ["b"], 2),
        ("byte-level", ["a", "\xc3", "\xa9", "x", "x"], ["\ufffd"], 5),  # the beginning of a character is none
        ("byte fallback", ["a", "<0x0A>", "▁a", "b"], ["\n"], 3),  # a byte counts once the run of bytes has ended
    ],
)
def test_a_sequence_ends_as_soon_as_nothing_can_change(
    name: str, tokens: list[str], stop: list[str], drawn: int
) -> None:
    tokenizer = TOKENIZERS[name]
    assert run(tokenizer, [id_of(tokenizer, token) for token in tokens], tuple(stop), 1)[1] == drawn


def test_generated_texts_end_before_their_stop_texts() -> None:
    """Over slots and blocks, with several stop texts, one of which ends the prompt."""
    tokenizer = TOKENIZERS["byte-level"]
    model = model_of("llama", vocab_size=320, eos_token_id=tokenizer.eos_token_id, max_position_embeddings=128)
    prompts = [tokenizer(text)["input_ids"] for text in ("say é STOP", "STOP", "€STOP", "User:\n\nSTOP")]
    free = SamplingParams(max_new_tokens=60, seed=4, ignore_eos=True)
    full = [output.samples[0] for output in Generator(model, tokenizer).generate(prompts, free)]
    texts = [sample.text or "" for sample in full]
    assert texts == [plain_text(tokenizer, sample.token_ids) for sample in full]
    stops = [
        ("STOP", text[at + 14 : at + 16], text[at : at + 2]) for text, at in zip(texts, (0, 9, 20, 33), strict=True)
    ]
    params = [replace(free, stop=stop) for stop in stops]
    slots, pool = (
        Generator(model, tokenizer, cache=cache, max_batch=3).generate(prompts, params)  # type: ignore[arg-type]
        for cache in ("slots", "pool")
    )
    assert_equal(pool, slots)
    for output, whole, text, stop in zip(slots, full, texts, stops, strict=True):
        (sample,) = output.samples
        assert (sample.text, sample.finish_reason) == (text[: first_stop(text, stop)], "stop")
        kept = len(sample.token_ids)
        assert sample.token_ids == whole.token_ids[:kept]
        assert sample.raw_logps == pytest.approx((whole.raw_logps or [])[:kept], abs=1e-5)
        assert plain_text(tokenizer, sample.token_ids).startswith(sample.text or "")


@pytest.mark.parametrize("stop", ["", ("STOP", "")])
def test_an_empty_stop_text_is_refused(stop: Any) -> None:
    with pytest.raises(ConfigError, match="stop must be non-empty texts"):
        SamplingParams(stop=stop)


def test_a_character_that_the_budget_cut_in_two_is_not_learned() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = [id_of(tokenizer, token) for token in ("a", "\xe2", "\x82")]
    cut = {"text": plain_text(tokenizer, ids), "finish_reason": "length"}
    assert (cut["text"], learnable_text(cut)) == ("a�", "a")
    assert learnable_text({"text": " a� ", "finish_reason": "stop"}) == " a� "  # the policy's own last character
