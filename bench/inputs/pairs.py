"""Preference pairs for the training benchmark: real HH-RLHF where the files are, else generated ones of such lengths.

Text for TRL, which tokenises it itself, and the same token ids for the engine. The tokenizer is a byte-level BPE
trained on the text: 32,000 entries on HH's first 3,250 test rows make 4.1 characters a token there, so prompts and
responses have the lengths that a common tokenizer gives them (mean 119 and 45 tokens in harmless-base).
"""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from macpo.engine.data.groups import PrefixGroup

SUBSETS = ("harmless-base", "helpful-base")
EOS, PAD, UNKNOWN = "</s>", "<pad>", "<unk>"
_LAST = "\n\nAssistant:"
# Log-normal token counts of the generated pairs: median, sigma; those of harmless-base (mean 119 and 45).
PROMPT, RESPONSE = (91, 0.75), (34, 0.75)


@dataclass(frozen=True)
class PairText:
    """One pair as TRL takes it; the response begins with its blank."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class PairData:
    """Pairs that fit `max_length`, and their token ids."""

    source: str
    pairs: list[PairText]
    """Empty where token ids alone are given."""
    groups: list[PrefixGroup]
    """Prompt, [chosen + EOS, rejected + EOS]: what TRL makes of the text; `bench_train_step` checks that."""
    tokenizer: Any

    def describe(self) -> dict[str, Any]:
        """Return the lengths, for a result file."""
        prompt = sum(len(group.prompt_ids) for group in self.groups) / len(self.groups)
        response = sum(group.num_response_tokens for group in self.groups) / (2 * len(self.groups))
        return {
            "source": self.source,
            "pairs": len(self.groups),
            "mean_prompt_tokens": round(prompt, 1),
            "mean_response_tokens": round(response, 1),
            "unshared_over_shared_tokens": round(2 * (prompt + response) / (prompt + 2 * response), 3),
        }


def load_pairs(
    folder: Path | None, vocab: int, max_length: int, count: int, subset: str = SUBSETS[0], tokenizer: Any = None
) -> PairData:
    """Load pairs in HH-RLHF's layout (`<subset>/test.jsonl.gz`) from `folder`; generate them where it is None.

    Args:
        vocab: entries of the tokenizer at most, where one is made.
        max_length: longest prompt with response, in tokens; longer pairs are left out, so that nobody cuts one.
        count: generated pairs.
        tokenizer: a pretrained model's own; by default one is made.
    """
    if folder is None:
        tokenizer, pairs = tokenizer or _word_tokenizer(vocab), _generated(count, vocab, max_length)
        source = "generated token ids, lengths log-normal as those of harmless-base"
    else:
        texts = {name: list(_read(folder / name / "test.jsonl.gz")) for name in SUBSETS}
        if tokenizer is None:
            tokenizer = _bpe_tokenizer([t for pairs in texts.values() for p in pairs for t in _parts(p)], vocab)
        pairs, source = texts[subset], f"Anthropic HH-RLHF, {subset}/test, first rows"
    groups = _tokenised(tokenizer, pairs)
    kept = [i for i, group in enumerate(groups) if group.max_length <= max_length]
    return PairData(source, [pairs[i] for i in kept], [groups[i] for i in kept], tokenizer)


def _read(path: Path) -> Iterator[PairText]:
    """Yield rows whose two dialogues differ in the last response only; `\\n\\nAssistant:` ends the prompt."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            prompt, mark, chosen = row["chosen"].rpartition(_LAST)
            other, _, rejected = row["rejected"].rpartition(_LAST)
            if mark and prompt == other and chosen.strip() and rejected.strip() and chosen != rejected:
                yield PairText(prompt + mark, f" {chosen.strip()}", f" {rejected.strip()}")


def _parts(pair: PairText) -> tuple[str, ...]:
    return pair.prompt, pair.chosen, pair.rejected


def _generated(count: int, vocab: int, max_length: int) -> list[PairText]:
    rng = random.Random(0)

    def words(median: int, sigma: float) -> str:
        wanted = round(math.exp(rng.gauss(math.log(median), sigma)))
        number = min(max(1, wanted), max_length // 2 - 1)  # the response's EOS comes on top
        return "".join(f" w{rng.randrange(vocab - 3)}" for _ in range(number))

    return [PairText(words(*PROMPT), words(*RESPONSE), words(*RESPONSE)) for _ in range(count)]


def _tokenised(tokenizer: Any, pairs: Sequence[PairText]) -> list[PrefixGroup]:
    def ids(texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = tokenizer(texts)["input_ids"]
        return found

    prompts = ids([pair.prompt for pair in pairs])
    end = tokenizer.eos_token
    wholes = [ids([pair.prompt + answer + end for pair in pairs for answer in (pair.chosen, pair.rejected)])]
    groups = []
    for prompt, chosen, rejected in zip(prompts, wholes[0][0::2], wholes[0][1::2], strict=True):
        shared = 0  # TRL's rule: the response begins where the tokens of prompt and whole part ways
        while shared < len(prompt) and prompt[shared] == chosen[shared] == rejected[shared]:
            shared += 1
        groups.append(PrefixGroup(prompt[:shared], [chosen[shared:], rejected[shared:]]))
    return groups


def _bpe_tokenizer(texts: Sequence[str], vocab: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[EOS, PAD, UNKNOWN], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    return _wrapped(inner)


def _word_tokenizer(vocab: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [EOS, PAD, UNKNOWN, *(f"w{i}" for i in range(vocab - 3))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrapped(inner)


def _wrapped(inner: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN)
