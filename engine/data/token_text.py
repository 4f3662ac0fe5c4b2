"""Text to token ids: a template's own text with its markers as tokens, text from data never as a special token.

A tag that is opened and closed (`<think>` … `</think>`), is an added token and is not marked special belongs to an
assistant's text: there it becomes its token, as when the model itself writes it. Nobody else's text makes it one where
the template writes it, and no text from data makes a token that is marked special or opens or ends a turn.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from macpo.engine.errors import ConfigError, DataError, is_failure, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TAG = re.compile(r"<(/?)([A-Za-z_]+)>")


class Piece(NamedTuple):
    """A piece of rendered text: the template's own (author None), or text from data by a role of the dialogue."""

    text: str
    author: str | None

    @property
    def data(self) -> bool:
        return self.author is not None


@dataclass(frozen=True, slots=True)
class _Guard:
    """Tokens that a text must not become."""

    ids: frozenset[int]
    spelled: re.Pattern[str]


class TokenText:
    """One tokenizer. special_text: "plain" encodes what spells a guarded token as ordinary text, "error" refuses it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special_text: str) -> None:
        if special_text not in ("plain", "error"):
            raise ConfigError(f"got {special_text!r}", "use plain or error", field="special_text")
        self.tokenizer, self.special_text = tokenizer, special_text
        self.backend: Any = getattr(tokenizer, "backend_tokenizer", None)  # None for a tokenizer written in Python
        self._normalizer = getattr(self.backend, "normalizer", None)
        added = tokenizer.added_tokens_decoder.items()
        self._special = {str(token): i for i, token in added if token.special}
        try:
            self._special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        except RecursionError:  # transformers looks for the id of the unknown token by the id of the unknown token
            why, fix = "the tokenizer has a special token that it does not know", "use a complete tokenizer"
            raise ConfigError(why, f"{fix}, which knows its own unk_token", field="tokenizer") from None
        self._added = {str(token): i for i, token in added if str(token).strip()}
        self.guard_template("", "", "", "")
        first = (tokenizer.convert_ids_to_tokens(self.encode("a")) or [""])[0]
        self.writes_blank: bool = first.startswith(("▁", "Ġ"))  # the tokenizer itself puts a blank before every text

    def guard_template(self, user: str, prefix: str, before: str, after: str) -> None:
        """Guards the added tokens that the template writes.

        Args:
            user: what it writes for a user's turn.
            prefix: the same with the generation prefix.
            before, after: what it writes before and after the response to it.
        """
        written = {token: i for token, i in self._added.items() if token in prefix + before + after}
        free = [tag for tag in self._tags() if tag not in user and _closed(tag, before)]
        markers = {token: i for token, i in written.items() if token not in free}
        self._guards = {"assistant": self._guard(self._special | markers), "": self._guard(self._special | written)}
        self.control_ids = self._guards[""].ids

    def _tags(self) -> list[str]:
        """Added tokens `<name>` and `</name>` that come as a pair and are not marked special."""
        plain = self._added.keys() - self._special.keys()
        return sorted(token for token in plain if _TAG.fullmatch(token) and _partner(token) in plain)

    def encode(self, text: str, as_data: bool = False) -> list[int]:
        """Ids of a text without special tokens around it; with `as_data` the text of a special token is plain text."""
        backend = self.backend
        if backend is None:
            encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=as_data, verbose=False)
            return list(encoded["input_ids"])
        # The same as the call above, five times faster; every call of the tokenizer sets this state anew.
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        backend.encode_special_tokens = as_data
        try:
            return list(backend.encode(text, add_special_tokens=False).ids)
        except BaseException as problem:  # tokenizers raises Exception itself, or panics
            if not is_failure(problem):
                raise
            why = f"the tokenizer cannot encode {shown(text, 40)}: {problem}"
            raise ConfigError(
                why, "use a complete tokenizer, which knows its own unk_token", field="tokenizer"
            ) from None

    def encode_data(self, text: str, author: str) -> list[int]:
        """Ids of a text from data, never a token that its author must not write, whatever the text spells."""
        if not self.spells(text, author):
            return self.encode(text)
        guard = self._guard_of(author)
        if self.special_text == "error":
            found = guard.spelled.search(text)
            problem = f"the text spells the special token {found.group() if found else text[:40]!r}"
            raise DataError(problem, "remove it from the data, or set special_text to plain", field="special_text")
        ids = self.encode(text, as_data=True)
        if guard.ids.isdisjoint(ids):
            return ids
        # The token is in the model's own vocabulary (word-level, unigram) or an added token that is not marked
        # special: cut each occurrence, in the text and then as the normalizer writes it, so that no piece spells it.
        ids = []
        for piece in cut(text, guard.spelled):
            part = self.encode(piece, as_data=True)
            if self._normalizer is not None and not guard.ids.isdisjoint(part):
                pieces = cut(self._normalizer.normalize_str(piece), guard.spelled)
                part = [i for bit in pieces for i in self.encode(bit, as_data=True)]
            ids += part
        if not guard.ids.isdisjoint(ids):
            problem = f"the tokenizer makes a special token of ordinary text: {shown(text)}"
            raise DataError(problem, "remove it from the data, or use another tokenizer", field="special_text")
        return ids

    def spells(self, text: str, author: str) -> bool:
        """Whether a text of this role spells a token that it must not become."""
        spelled = self._guard_of(author).spelled
        if spelled.search(text):
            return True
        return self._normalizer is not None and bool(spelled.search(self._normalizer.normalize_str(text)))

    def broken(self, text: str, author: str, mark: str) -> str:
        """The text with a mark inside each guarded token that it spells, so that nothing reads it as the token.

        Raises:
            DataError: only the tokenizer's normalizer makes a token of it, or special_text is "error".
        """
        if not self.spells(text, author):
            return text
        found = mark.join(cut(text, self._guard_of(author).spelled))
        if self.special_text == "error" or found == text:
            problem = f"a part of a message spells a special token: {shown(text)}"
            raise DataError(problem, "remove it from the data, or set special_text to plain", field="special_text")
        return found

    def piece_ids(self, pieces: Iterable[Piece]) -> list[int]:
        """Ids of pieces one after another; a template's adjacent pieces are encoded as one text."""
        joined: list[Piece] = []
        for piece in pieces:
            if joined and not piece.data and not joined[-1].data:
                joined[-1] = Piece(joined[-1].text + piece.text, None)
            elif piece.text or piece.data:  # an empty one keeps its neighbours apart
                joined.append(piece)
        if self.writes_blank:  # it would write a second blank where two pieces meet
            for n in range(1, len(joined)):
                left, right = joined[n - 1], joined[n]
                if not right.data and right.text.startswith(" "):
                    joined[n] = right._replace(text=right.text[1:])
                elif not left.data and left.text.endswith(" "):
                    joined[n - 1] = left._replace(text=left.text[:-1])
        return [
            i
            for text, author in joined
            if text
            for i in (self.encode(text) if author is None else self.encode_data(text, author))
        ]

    def single_id(self, token: str, field: str, fix: str) -> int:
        """The id of a token of the vocabulary. Raises ConfigError for any other text."""
        token_id: Any = self.tokenizer.convert_tokens_to_ids(token)
        if token_id is None or (token_id == self.tokenizer.unk_token_id and token != self.tokenizer.unk_token):
            raise ConfigError(f"{token!r} is not a token of the tokenizer", fix, field=field)
        return int(token_id)

    def _guard(self, tokens: dict[str, int]) -> _Guard:
        longest_first = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
        spelled = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        return _Guard(frozenset(tokens.values()) - {self.tokenizer.unk_token_id}, spelled)

    def _guard_of(self, author: str) -> _Guard:
        return self._guards.get(author, self._guards[""])


def open_tag(text: str) -> str | None:
    """The last tag `<name>` of a text if `</name>` does not follow it."""
    opened = [match for match in _TAG.finditer(text) if not match[1]]
    last = opened[-1].group() if opened else ""
    return last if last and _partner(last) not in text[opened[-1].end() :] else None


def closing(tag: str) -> str:
    """`</name>` for `<name>`."""
    return _partner(tag)


def _partner(tag: str) -> str:
    return f"<{tag[2:]}" if tag.startswith("</") else f"</{tag[1:]}"


def _closed(tag: str, text: str) -> bool:
    """Whether each `<name>` of the text has its `</name>`; a tag around the response itself marks a turn."""
    opening = tag.replace("</", "<")
    return text.count(opening) == text.count(_partner(opening))


def cut(text: str, spelled: re.Pattern[str]) -> list[str]:
    """The text, cut after the first character of each token that it spells."""
    cuts = [0, *(match.start() + 1 for match in spelled.finditer(text)), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(cuts)]
