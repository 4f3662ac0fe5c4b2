"""Chat templates and THE tokenisation rule: ids = tokens(prompt) + tokens(response) (+ EOS if it is finished).

    chat = Chat(load_tokenizer("path-or-hub-id"))
    group = chat.group(messages, [(chosen, True), (rejected, True)], max_tokens=1024)

Every part is tokenised once, with add_special_tokens=False, and the parts are concatenated; nothing is ever tokenised
again as a whole, so the shared prefix of a group is exactly the prompt. What the parts are is what the template writes
for the whole dialogue (engine/data/rendering.py).
"""

from __future__ import annotations

import copy
import datetime
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.messages import ROLES, Message
from macpo.engine.data.rendering import Rendering, framed
from macpo.engine.data.template_settings import (
    DATE,
    DATE_STRING,
    reads_clock,
    reads_date_string,
    with_date_string,
    with_settings,
)
from macpo.engine.data.templates import template_text
from macpo.engine.data.token_text import Piece, TokenText
from macpo.engine.data.truncation import shortened
from macpo.engine.errors import ConfigError, DataError, ResourceError, is_failure, one_line, shown
from macpo.engine.opening import refuse_special

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MAX_TOKEN_ID = 1 << 24


class Chat:
    """One tokenizer with one template.

    template: "auto" (the tokenizer's own, else vicuna with one log line), a name in TEMPLATES, jinja text, or a file.
    special_text: what to do if data spells a special token (`</s>`, `<|im_start|>`, …): "plain" encodes it as
    ordinary text, never as the token; "error" raises DataError.
    eos_token: text of the token that ends a response. Default: the token with which the template ends an assistant
    turn, else the tokenizer's EOS. A pad token equal to EOS is harmless, because nothing is padded in training.
    arguments: values of what the template reads besides the dialogue, such as {"enable_thinking": False}.
    date: the day that a template writes which asks for one; default `template_settings.DATE`.

    `eos_id` ends a finished response, `stop_ids` end generation, `digest` is SHA-256 hex of all that decides the ids.
    Raises ConfigError for an unusable template, an argument that it does not read, or a missing EOS.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str = "auto",
        *,
        special_text: str = "plain",
        eos_token: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        date: datetime.date | None = None,
    ) -> None:
        self.tokenizer, self.special_text = tokenizer, special_text
        self.tokens = TokenText(tokenizer, special_text)
        self.template = template_text(tokenizer, template)
        self.arguments, self.date = dict(arguments or {}), date or DATE
        self._eos_text = eos_token if eos_token is not None else tokenizer.eos_token
        if self._eos_text is None:
            fix = "set eos_token to the text of a token that ends a response"
            raise ConfigError("the tokenizer has no EOS token, so no response could ever end", fix, field="eos_token")
        if template == "chatml":
            for marker in ("<|im_start|>", "<|im_end|>"):
                self.tokens.single_id(
                    marker, "template", "use a template of plain text such as vicuna, or add the token"
                )
        source = with_settings(self.template, self.arguments, self.date)
        self._rendering = Rendering(tokenizer, source, eos=self._eos_text, date=self.date.strftime(DATE_STRING))
        self._rendering.measure(self.tokens)
        frame, before = self._rendering.frame, self._rendering.before

        own_eos = self.tokens.single_id(self._eos_text, "eos_token", "name a token of the tokenizer's vocabulary")
        after = self.tokens.encode(frame.end.lstrip()) if frame.end.strip() else []
        turn_end = after[0] if after and after[0] in self.tokens.control_ids else None
        self.eos_id: int = own_eos if eos_token is not None or turn_end is None else turn_end
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys((self.eos_id, own_eos)))

        bos = tokenizer.bos_token
        self._bos_re = re.compile(rf"(?:\s*{re.escape(bos)})+") if bos else None
        adds_bos = bool(bos) and tokenizer("a", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]
        self._writes_bos = self._bos_re is not None and self._bos_re.match(before) is not None
        self.bos_id: int | None = tokenizer.bos_token_id if adds_bos or self._writes_bos else None
        self.digest = self._digest()

    # -- token ids

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the dialogue and the generation prefix, with one BOS if the tokenizer or template uses one.

        Raises DataError for a malformed dialogue or special text under "error", TemplateRefusal for a dialogue that the
        template refuses, or of which it would leave out a message or a part.
        """
        return self._assemble(self._pieces(messages))

    def response_ids(self, text: str, finished: bool = True) -> list[int]:
        """Token ids of a response that the template writes to the character, + EOS if it is finished."""
        ids = self._response_ids(framed(self._rendering.frame, text, finished)) if text.strip() else []
        return [*ids, self.eos_id] if finished else ids

    def reply_ids(self, messages: Sequence[Message], reply: str | Message, finished: bool = True) -> list[int]:
        """Token ids of a response as the template writes it after this dialogue, + EOS if it is finished.

        Raises TemplateRefusal where the template would write it in another format, or leaves out a part of it.
        """
        if isinstance(reply, str) and not reply.strip():
            return [self.eos_id] if finished else []
        ids = self._response_ids(self._rendering.response(messages, reply, self.tokens, finished).pieces)
        return [*ids, self.eos_id] if finished else ids

    def text(self, ids: Sequence[int]) -> str:
        """The decoded response, without special tokens and what the template writes around it."""
        decoded = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return self.unframed(str(decoded))

    def unframed(self, decoded: str) -> str:
        """A decoded response without what the template writes around it."""
        frame = self._rendering.frame
        return decoded.removeprefix(frame.lead).removesuffix(frame.tail)

    def limited_prompt_ids(
        self, messages: Sequence[Message], max_prompt_tokens: int, *, long_prompt: str = "truncate"
    ) -> list[int] | None:
        """`prompt_ids` limited to max_prompt_tokens, whatever the responses are.

        long_prompt: "truncate" shortens the dialogue as engine/data/truncation.py says, so that it still begins as the
        template begins; "drop" returns None, as "truncate" does where not even an empty turn fits; "error" raises
        DataError.
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
            problem = f"the prompt has {len(prompt)} tokens, {max_prompt_tokens} fit: {shown(messages[-1]['content'])}"
            raise DataError(problem, "raise context_tokens, or set long_prompt to truncate or drop", field="prompt")
        return shortened(messages, self.prompt_ids, max_prompt_tokens)

    def group(
        self,
        messages: Sequence[Message],
        responses: Sequence[tuple[str | Message, bool]],
        *,
        max_tokens: int,
        max_prompt_tokens: int | None = None,
        long_prompt: str = "truncate",
    ) -> PrefixGroup | None:
        """A prompt and its responses (text or message, finished); prompt + any response has at most max_tokens tokens.

        The prompt is limited to max_prompt_tokens (default max_tokens // 2) by `limited_prompt_ids`, so its tokens do
        not depend on the responses. A response that is too long is cut on the right (and then has no EOS) and keeps at
        least one token. Returns None if the prompt is dropped. Raises DataError for a response without tokens.
        """
        if max_prompt_tokens is None:
            max_prompt_tokens = max_tokens // 2
        if max_prompt_tokens >= max_tokens:
            raise ConfigError(f"got {max_prompt_tokens}", f"below max_tokens ({max_tokens})", field="max_prompt_tokens")
        if not responses or any(isinstance(response, str) and not response.strip() for response, _ in responses):
            raise DataError("a response has no tokens", "drop empty responses before tokenising", field="response")
        prompt = self.limited_prompt_ids(messages, max_prompt_tokens, long_prompt=long_prompt)
        if prompt is None:
            return None
        written = [self.reply_ids(messages, response, finished) for response, finished in responses]
        return PrefixGroup(prompt, [ids[: max_tokens - len(prompt)] for ids in written])

    def document_ids(self, messages: Sequence[Message], text: str | Message, finished: bool = True) -> list[int]:
        """A document for pretraining: prompt + response, or without messages [BOS] + tokens(text) (+ EOS)."""
        if messages:
            return self.prompt_ids(messages) + self.reply_ids(messages, text, finished)
        start = [] if self.bos_id is None else [self.bos_id]
        return [*start, *self.tokens.encode_data(str(text).strip(), "user"), *([self.eos_id] if finished else [])]

    # -- what the template writes

    def rendered(self, messages: Sequence[Message], response: str = "") -> str:
        """The text of a prompt (and response) as the template writes it, for display and tokenizer training."""
        return self._rendering.render(messages) + (self._rendering.frame.lead + response if response else "")

    def note(self, messages: Sequence[Message], reply: str | Message) -> str:
        """How prompt and response differ from the template's whole dialogue or from the data, in words; "" if not."""
        return self._rendering.response(messages, reply, self.tokens).note

    def whole_ids(self, messages: Sequence[Message], reply: str | Message) -> list[int]:
        """What the template writes for the whole dialogue with this response, tokenised as one text."""
        message: Message = {"role": "assistant", "content": reply} if isinstance(reply, str) else reply
        return self._assemble(self._rendering.dialogue([*messages, message], self.tokens))

    @property
    def about(self) -> list[str]:
        """What there is to say of the template to the person who uses it, a line each."""
        frame, said = self._rendering.frame, []
        if frame.header:
            said.append(f"the template ignores add_generation_prompt: prompts end with its header {frame.header!r}")
        if frame.lead.strip():
            said.append(f"the template writes {frame.lead!r} before a response: it is trained with it")
        if self.dated:
            said.append(f"the template writes a date: {self.date.isoformat()} in every prompt (template_date)")
        after = frame.end.strip().removeprefix(str(self.tokenizer.convert_ids_to_tokens(self.eos_id))).strip()
        if after:
            said.append(f"the template writes {after!r} after a response, which is not trained")
        return said

    @property
    def dated(self) -> bool:
        """Whether prompts hold a date."""
        return reads_clock(self.template) or reads_date_string(self.template)

    @property
    def hf_template(self) -> str:
        """The template for an exported tokenizer: Hugging Face's apply_chat_template then gives the same prompt ids.

        The values of arguments, the date and a missing generation prefix are written into it.
        """
        bos = self.bos_id is not None and not self._writes_bos
        text, header = with_date_string(self._rendering.source, self.date), self._rendering.frame.header
        if header:
            text = text.removesuffix("\n") + "{% if add_generation_prompt %}{{ " + repr(header) + " }}{% endif %}"
        return ("{{ bos_token }}" if bos else "") + text

    def hf_tokenizer(self) -> PreTrainedTokenizerBase:
        """A copy of the tokenizer that carries the template and the end token that training used."""
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.chat_template = self.hf_template
        if tokenizer.eos_token != self._eos_text:
            tokenizer.eos_token = self._eos_text
        return tokenizer

    def _pieces(self, messages: Sequence[Message]) -> list[Piece]:
        if not messages:
            raise DataError("the dialogue has no message", "give at least one user message", field="messages")
        for message in messages:
            if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
                fix = f"each message is {{role: {', '.join(ROLES[:-1])} or {ROLES[-1]}, content: text}}"
                raise DataError(f"got {shown(message, 120)}", fix, field="messages")
        return self._rendering.prompt(messages, self.tokens)

    def _response_ids(self, pieces: list[Piece]) -> list[int]:
        first, *rest = pieces
        if self.tokens.writes_blank and first.text.startswith(" ") and self._rendering.frame.lead == " ":
            pieces = [first._replace(text=first.text[1:]), *rest]
        return self.tokens.piece_ids(pieces)

    def _assemble(self, pieces: Sequence[Piece]) -> list[int]:
        """Ids of rendered pieces, with one BOS or none."""
        first, *rest = pieces
        if self._bos_re is not None and not first.data:
            match = self._bos_re.match(first.text)
            first = first._replace(text=first.text[match.end() if match else 0 :])
        ids = self.tokens.piece_ids([first, *rest])
        if self.bos_id is not None:
            ids = [self.bos_id, *ids]
        if not ids:
            raise DataError("the prompt has no tokens", "give a prompt with words of the vocabulary", field="prompt")
        return ids

    def _digest(self) -> str:
        backend = self.tokens.backend
        state: Any = json.loads(backend.to_str()) if backend is not None else self.tokenizer.get_vocab()
        for volatile in ("truncation", "padding"):  # set by every call, not part of the vocabulary
            state.pop(volatile, None)
        source = self._rendering.source + self._rendering.frame.header
        parts = [state, self.tokenizer.special_tokens_map, source, self.special_text, self.eos_id, self.bos_id]
        if reads_date_string(self.template) and self.date != DATE:
            parts.append(self.date.isoformat())
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def boundary_mismatches(chat: Chat, pairs: Iterable[tuple[Sequence[Message], str | Message]]) -> float:
    """Share in [0, 1] of (messages, response) whose tokens are not those that the template writes for the whole.

    Prompt and response with its end token are compared with the whole dialogue as one text, up to where they end. An
    end token that the template does not write is left out of the comparison.
    """
    differs = [_differs(chat, messages, reply) for messages, reply in pairs]
    return sum(differs) / len(differs) if differs else 0.0


def _differs(chat: Chat, messages: Sequence[Message], reply: str | Message) -> bool:
    whole = chat.whole_ids(messages, reply)
    ours = chat.prompt_ids(messages) + chat.reply_ids(messages, reply)
    if whole[: len(ours)] == ours:
        return False
    return whole[len(ours) - 1 : len(ours)] == [chat.eos_id] or whole[: len(ours) - 1] != ours[:-1]


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or on the Hub. Raises ConfigError if it is missing or needs its own code."""
    from transformers import AutoTokenizer

    if Path(path).is_dir():
        refuse_special(Path(path))
    try:
        found = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        largest = max(found.get_vocab().values(), default=0)
        found("a", verbose=False)  # settings of other types break only here
    except BaseException as problem:  # of many types
        if not is_failure(problem):
            raise
        fix = "check the path; without a network download the model first and give its folder"
        if "trust_remote_code" in str(problem):
            fix = "use a model without code of its own, or set trust_remote_code if you trust its authors"
        why = f"no tokenizer loads from {str(path)!r}: {one_line(problem)}"
        raise ConfigError(why, fix, field="model") from problem
    if largest > MAX_TOKEN_ID:
        too_many = f"the tokenizer has the token id {largest:,}: no machine holds the embeddings of so many"
        raise ResourceError(too_many, "get a fresh copy of the tokenizer", file=path)
    return found
