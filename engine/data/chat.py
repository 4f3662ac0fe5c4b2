"""Chat templates and THE tokenisation rule: ids = tokens(prompt) + tokens(response) (+ EOS if it is finished).

    chat = Chat(load_tokenizer("path-or-hub-id"))
    group = chat.group(messages, [(chosen, True), (rejected, True)], max_tokens=1024)

Every part is tokenised once, with add_special_tokens=False, and the parts are concatenated; nothing is ever tokenised
again as a whole, so the shared prefix of a group is exactly the prompt.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from macpo.engine.data.pack import PrefixGroup
from macpo.engine.data.records import Message
from macpo.engine.data.templates import one_line, template_text, within
from macpo.engine.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("macpo.chat")

ROLES = ("system", "user", "assistant")
MAX_RENDERED_CHARS = 1024 * 1024
"""Characters that a template may write beyond four times the dialogue itself."""
PROBE_SECONDS = 10.0
"""A template that cannot render two words in this time is rejected."""
_FIRST_MARK = 0xF0000  # private-use plane 15: placeholders for contents, never part of a template
_PROBE = "\U000ffffd"  # stands for a response while the template is probed
_DATE = "26 Jul 2024"  # Llama 3's own default: prompts must not depend on the day of the run


class Piece(NamedTuple):
    """A piece of rendered text; `data` text is encoded as ordinary text even if it spells a special token."""

    text: str
    data: bool


class Chat:
    """One tokenizer with one template.

    template: "auto" (the tokenizer's own, else vicuna with one log line), a name in TEMPLATES, jinja text, or a file.
    special_text: what to do if data spells a special token (`</s>`, `<|im_start|>`, …): "plain" encodes it as
    ordinary text, never as the token; "error" raises DataError.
    eos_token: text of the token that ends a response. Default: the token with which the template ends an assistant
    turn, else the tokenizer's EOS. A pad token equal to EOS is harmless, because nothing is padded in training.

    `eos_id` ends a finished response, `stop_ids` end generation, `digest` is SHA-256 hex of all that decides the ids.
    Raises ConfigError for an unusable template or a missing EOS.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str = "auto",
        *,
        special_text: str = "plain",
        eos_token: str | None = None,
    ) -> None:
        if special_text not in ("plain", "error"):
            raise ConfigError(f"got {special_text!r}", "use plain or error", field="special_text")
        self.tokenizer = tokenizer
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)  # None for a tokenizer written in Python
        self.special_text = special_text
        self.template = template_text(tokenizer, template)
        self._eos_text = eos_token if eos_token is not None else tokenizer.eos_token
        if self._eos_text is None:
            fix = "set eos_token to the text of a token that ends an answer"
            raise ConfigError("the tokenizer has no EOS token, so no answer could ever end", fix, field="eos_token")
        if template == "chatml":
            for marker in ("<|im_start|>", "<|im_end|>"):
                self._single_id(marker, "template", "use a template of plain text such as vicuna, or add the token")
        # Special tokens count wherever they stand; other added tokens only where the template itself writes them.
        added = tokenizer.added_tokens_decoder.items()
        self._control = {str(token): i for i, token in added if token.special}
        self._control |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        before = self._probe()
        self._control |= {str(token): i for i, token in added if str(token).strip() and str(token) in before}
        self._control_ids = frozenset(self._control.values()) - {tokenizer.unk_token_id}
        longest_first = sorted((t for t in self._control if t.strip()), key=len, reverse=True)
        self._control_re = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._normalizer = getattr(self._backend, "normalizer", None)

        own_eos = self._single_id(self._eos_text, "eos_token", "name a token of the tokenizer's vocabulary")
        separator, turn_end = self._probe_answer()
        self.eos_id: int = own_eos if eos_token is not None or turn_end is None else turn_end
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys((self.eos_id, own_eos)))
        self._separator = separator
        first = tokenizer.convert_ids_to_tokens(self._encode("a"))[0]
        self._writes_blank = first.startswith(("▁", "Ġ"))  # the tokenizer itself puts a blank before every text
        self._lead = "" if self._writes_blank and separator == " " else separator

        bos = tokenizer.bos_token
        self._bos_re = re.compile(rf"(?:\s*{re.escape(bos)})+") if bos else None
        adds_bos = bool(bos) and tokenizer("a", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]
        self._writes_bos = self._bos_re is not None and self._bos_re.match(before) is not None
        self.bos_id: int | None = tokenizer.bos_token_id if adds_bos or self._writes_bos else None
        self.digest = self._digest()

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the dialogue and the generation prefix, with one BOS if the tokenizer or template uses one.

        Raises DataError for a malformed dialogue, one that the template refuses, or special text under "error".
        """
        return self._assemble(self._pieces(messages))

    def answer_ids(self, text: str, finished: bool = True) -> list[int]:
        """Token ids of a response without outer white space, + EOS if it is finished."""
        ids = self._encode_data(self._lead + text.strip()) if text.strip() else []
        return [*ids, self.eos_id] if finished else ids

    def text(self, ids: Sequence[int]) -> str:
        """The decoded response, without special tokens and outer white space."""
        decoded = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(decoded).strip()

    def limited_prompt_ids(
        self, messages: Sequence[Message], max_prompt_tokens: int, *, long_prompt: str = "truncate"
    ) -> list[int] | None:
        """`prompt_ids` limited to max_prompt_tokens, whatever the responses are.

        long_prompt: "truncate" shortens from the left, BOS kept; "drop" returns None; "error" raises DataError.
        """
        if long_prompt not in ("truncate", "drop", "error"):
            raise ConfigError(f"got {long_prompt!r}", "use truncate, drop or error", field="long_prompt")
        if max_prompt_tokens < 2:
            raise ConfigError(f"got {max_prompt_tokens}", "allow at least 2 tokens", field="max_prompt_tokens")
        prompt = self.prompt_ids(messages)
        if len(prompt) <= max_prompt_tokens:
            return prompt
        if long_prompt == "drop":
            return None
        if long_prompt == "error":
            problem = f"the prompt has {len(prompt)} tokens, {max_prompt_tokens} fit: {messages[-1]['content'][:60]!r}"
            raise DataError(problem, "raise context_tokens, or set long_prompt to truncate or drop", field="prompt")
        kept_bos = prompt[:1] if prompt[0] == self.bos_id else []
        return kept_bos + prompt[len(prompt) - (max_prompt_tokens - len(kept_bos)) :]

    def group(
        self,
        messages: Sequence[Message],
        answers: Sequence[tuple[str, bool]],
        *,
        max_tokens: int,
        max_prompt_tokens: int | None = None,
        long_prompt: str = "truncate",
    ) -> PrefixGroup | None:
        """A prompt and its responses (text, finished); prompt + any one response has at most max_tokens tokens.

        The prompt is limited to max_prompt_tokens (default max_tokens // 2) by `limited_prompt_ids`, so its tokens do
        not depend on the responses. A response that is too long is cut on the right (and then has no EOS) and keeps at
        least one token. Returns None if the prompt is dropped. Raises DataError for a response without tokens.
        """
        if max_prompt_tokens is None:
            max_prompt_tokens = max_tokens // 2
        if max_prompt_tokens >= max_tokens:
            raise ConfigError(f"got {max_prompt_tokens}", f"below max_tokens ({max_tokens})", field="max_prompt_tokens")
        responses = [self.answer_ids(text, finished) for text, finished in answers]
        if not responses or not all(responses):
            raise DataError("an answer has no tokens", "drop empty answers before tokenising", field="answer")
        prompt = self.limited_prompt_ids(messages, max_prompt_tokens, long_prompt=long_prompt)
        if prompt is None:
            return None
        return PrefixGroup(prompt, [ids[: max_tokens - len(prompt)] for ids in responses])

    def document_ids(self, messages: Sequence[Message], text: str, finished: bool = True) -> list[int]:
        """A document for pretraining: prompt + response, or without messages [BOS] + tokens(text) (+ EOS)."""
        if messages:
            return self.prompt_ids(messages) + self.answer_ids(text, finished)
        start = [] if self.bos_id is None else [self.bos_id]
        return [*start, *self._encode_data(text.strip()), *([self.eos_id] if finished else [])]

    def rendered(self, messages: Sequence[Message], answer: str = "") -> str:
        """The text of a prompt (and response) as the template writes it, for display and tokenizer training."""
        return self._render(messages) + (self._separator + answer if answer else "")

    @property
    def hf_template(self) -> str:
        """The template for an exported tokenizer: Hugging Face's apply_chat_template then gives the same prompt ids."""
        bos = self.bos_id is not None and not self._writes_bos
        return ("{{ bos_token }}" if bos else "") + self.template

    def whole_ids(self, messages: Sequence[Message], answer: str) -> list[int]:
        """Prompt and response tokenised as one text, only for the comparison in `boundary_mismatches`."""
        data = self._spells_control(answer)
        text = (self._lead if data else self._separator) + answer.strip()
        return self._assemble([*self._pieces(messages), Piece(text, data)])

    # -- rendering

    def _pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """The rendered prompt; each content that spells a special token is a separate piece."""
        if not messages:
            raise DataError("the dialogue has no message", "give at least one user message", field="messages")
        for message in messages:
            if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
                fix = "each message is {role: system, user or assistant, content: text}"
                raise DataError(f"got {message!r:.120}", fix, field="messages")
        risky = {n for n, m in enumerate(messages) if self._spells_control(m["content"])}
        if not risky:
            return [Piece(self._render(messages), False)]
        # Contents are replaced by private-use characters that occur in none of them, so the template treats them as
        # ordinary text and nothing in them is read as one of the template's own markers.
        used = set("".join(m["content"] for m in messages))
        free = (chr(c) for c in range(_FIRST_MARK, _FIRST_MARK + 0xFFFD) if chr(c) not in used)
        contents: dict[str, str] = {}
        swapped: list[Message] = []
        for n, message in enumerate(messages):
            content = message["content"]
            if n in risky:
                mark, core = next(free), content.strip()
                contents[mark] = core
                content = content.replace(core, mark)  # outer white space stays: a template may trim it
            swapped.append({**message, "content": content})
        parts = re.split(f"([{''.join(contents)}])", self._render(swapped))
        return [Piece(contents.get(part, part), part in contents) for part in parts if part]

    def _render(self, messages: Sequence[Message], generation: bool = True) -> str:
        """The dialogue rendered by transformers in jinja's ImmutableSandboxedEnvironment."""
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=generation,
                eos_token=self._eos_text,
                date_string=_DATE,
            )
        except Exception as problem:  # templates raise whatever they like; the person gets the template's own words
            why = f"the chat template refuses this dialogue: {one_line(problem)}"
            fix = "change the dialogue's roles, or set template to vicuna, chatml, plain or a jinja file"
            raise DataError(why, fix, field="template") from problem
        if len(text) > MAX_RENDERED_CHARS + 4 * sum(len(m["content"]) for m in messages):
            fix = "use another template"
            raise ConfigError(f"the chat template wrote {len(text)} characters", fix, field="template")
        return str(text)

    def _probe(self) -> str:
        """The text that the template writes around a short dialogue; ConfigError if it fails or does not end."""
        try:
            return within(PROBE_SECONDS, lambda: self._render([{"role": "user", "content": _PROBE}]))
        except (DataError, TimeoutError) as problem:
            said = problem.problems[0].message if isinstance(problem, DataError) else "the chat template does not end"
            fix = "set template to vicuna, chatml, plain or a jinja file"
            raise ConfigError(said, fix, field="template") from problem

    def _probe_answer(self) -> tuple[str, int | None]:
        """(white space between generation prefix and response, id of the special token that ends the turn)."""
        user: Message = {"role": "user", "content": "x"}
        before = self._render([user])
        try:
            whole = self._render([user, {"role": "assistant", "content": _PROBE}], generation=False)
        except DataError as problem:
            log.info("template without assistant turns: %s", problem)
            return "", None
        if whole.count(_PROBE) != 1:
            return "", None
        start, end = whole.split(_PROBE)
        separator = start.removeprefix(before) if start.startswith(before) else ""
        after = self._encode(end.lstrip()) if end.strip() else []
        turn_end = after[0] if after and after[0] in self._control_ids else None
        return (separator if not separator.strip() else ""), turn_end

    # -- encoding

    def _assemble(self, pieces: Sequence[Piece]) -> list[int]:
        """Ids of rendered pieces, with one BOS or none; adjacent template text is encoded as one text."""
        joined: list[Piece] = []
        for piece in pieces:
            if joined and not piece.data and not joined[-1].data:
                joined[-1] = Piece(joined[-1].text + piece.text, False)
            else:
                joined.append(piece)
        if self._bos_re is not None and not joined[0].data:
            match = self._bos_re.match(joined[0].text)
            joined[0] = Piece(joined[0].text[match.end() if match else 0 :], False)
        if self._writes_blank:  # it would write a second blank where two pieces meet
            for n in range(1, len(joined)):
                (left, left_data), (right, right_data) = joined[n - 1], joined[n]
                if not right_data and right.startswith(" "):
                    joined[n] = Piece(right[1:], right_data)
                elif not left_data and left.endswith(" "):
                    joined[n - 1] = Piece(left[:-1], left_data)
        ids = [i for text, data in joined if text for i in (self._encode_data(text) if data else self._encode(text))]
        if self.bos_id is not None:
            ids = [self.bos_id, *ids]
        if not ids:
            raise DataError("the prompt has no tokens", "give a prompt with words of the vocabulary", field="prompt")
        return ids

    def _encode(self, text: str, as_data: bool = False) -> list[int]:
        backend = self._backend
        if backend is None:
            encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=as_data, verbose=False)
            return list(encoded["input_ids"])
        # The same as the call above, five times faster; every call of the tokenizer sets this state anew.
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        backend.encode_special_tokens = as_data
        return list(backend.encode(text, add_special_tokens=False).ids)

    def _encode_data(self, text: str) -> list[int]:
        """Ids of a text from data, never those of a special token, whatever the text spells."""
        if not self._spells_control(text):
            return self._encode(text)
        if self.special_text == "error":
            found = self._control_re.search(text)
            problem = f"the text spells the special token {found.group() if found else text[:40]!r}"
            raise DataError(problem, "remove it from the data, or set special_text to plain", field="special_text")
        ids = self._encode(text, as_data=True)
        if self._control_ids.isdisjoint(ids):
            return ids
        # The token is in the model's own vocabulary (word-level, unigram) or an added token that is not marked
        # special: cut each occurrence, in the text and then as the normalizer writes it, so that no piece spells it.
        ids = []
        for piece in self._cut(text):
            part = self._encode(piece, as_data=True)
            if self._normalizer is not None and not self._control_ids.isdisjoint(part):
                cut = self._cut(self._normalizer.normalize_str(piece))
                part = [i for bit in cut for i in self._encode(bit, as_data=True)]
            ids += part
        if not self._control_ids.isdisjoint(ids):
            problem = f"the tokenizer makes a special token of ordinary text: {text[:60]!r}"
            raise DataError(problem, "remove it from the data, or use another tokenizer", field="special_text")
        return ids

    def _cut(self, text: str) -> list[str]:
        """Split the text after the first character of each special token that it spells."""
        cuts = [0, *(match.start() + 1 for match in self._control_re.finditer(text)), len(text)]
        return [text[a:b] for a, b in itertools.pairwise(cuts)]

    def _spells_control(self, text: str) -> bool:
        if self._control_re.search(text):
            return True
        return self._normalizer is not None and bool(self._control_re.search(self._normalizer.normalize_str(text)))

    def _single_id(self, token: str, field: str, fix: str) -> int:
        token_id: Any = self.tokenizer.convert_tokens_to_ids(token)
        if token_id is None or (token_id == self.tokenizer.unk_token_id and token != self.tokenizer.unk_token):
            raise ConfigError(f"{token!r} is not a token of the tokenizer", fix, field=field)
        return int(token_id)

    def _digest(self) -> str:
        state: Any = json.loads(self._backend.to_str()) if self._backend is not None else self.tokenizer.get_vocab()
        for volatile in ("truncation", "padding"):  # set by every call, not part of the vocabulary
            state.pop(volatile, None)
        parts = [state, self.tokenizer.special_tokens_map, self.template, self.special_text, self.eos_id, self.bos_id]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def boundary_mismatches(chat: Chat, pairs: Iterable[tuple[Sequence[Message], str]]) -> float:
    """Share in [0, 1] of (messages, response) for which tokens(prompt) + tokens(response) != tokens(whole)."""
    differs = [
        chat.prompt_ids(messages) + chat.answer_ids(answer, finished=False) != chat.whole_ids(messages, answer)
        for messages, answer in pairs
    ]
    return sum(differs) / len(differs) if differs else 0.0


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or on the Hub. Raises ConfigError if it is missing or needs its own code."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as problem:  # transformers wraps network, format and trust failures in many types
        fix = "check the path; without a network download the model first and give its folder"
        if "trust_remote_code" in str(problem):
            fix = "use a model without code of its own, or set trust_remote_code if you trust its authors"
        why = f"no tokenizer loads from {str(path)!r}: {one_line(problem)}"
        raise ConfigError(why, fix, field="model") from problem
