"""What a chat template writes for a dialogue, and what of it is prompt and what is response.

The prompt is the dialogue with the generation prefix; the response is what the template writes after it for the whole
dialogue, up to the token that ends the turn. So the two together are what the template writes, or the difference is
known by a name (`Response.note`), or the row is refused.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from macpo.engine.data.jinja_environment import values
from macpo.engine.data.messages import LINKS, PARTS, THOUGHTS, Message, split_tools
from macpo.engine.data.templates import TEMPLATES, SafeTemplate
from macpo.engine.data.token_text import Piece, TokenText, closing, open_tag
from macpo.engine.errors import ConfigError, DataError, MacpoError, TemplateRefusal, one_line, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("macpo.chat")

FIX = "set template to vicuna, alpaca, chatml, plain or a jinja file"
_FIRST_MARK = 0xF0000  # private-use plane 15: placeholders for contents, never part of a template
_MARK = re.compile("[\U000f0000-\U000fffff]")
_PROBE = "\U000ffffd"  # stands for a response while the template is probed


@dataclass(frozen=True, slots=True)
class Frame:
    """What a template writes around the response to a single question."""

    header: str = ""
    """What it writes before the response alone: it ignores `add_generation_prompt`, so this belongs to the prompt."""
    prefix: str = ""
    """The generation prefix, with the header."""
    lead: str = ""
    """What it writes between generation prefix and response: a separator, or an empty thought."""
    tail: str = ""
    """White space between the response and the token that ends the turn."""
    end: str = ""
    """What follows the response, with the tail."""
    prefix_only: str = ""
    """The end of the generation prefix that the whole dialogue has not."""

    @property
    def opened(self) -> str | None:
        """`<think>` where the generation prefix opens a thought that a whole dialogue need not have."""
        return open_tag(self.prefix_only)


@dataclass(frozen=True, slots=True)
class Response:
    """The text of a response as it is trained, between the prompt and the token that ends it.

    `note` says in words how prompt and response differ from the whole dialogue or from the data; "" where they do not.
    """

    pieces: list[Piece]
    note: str = ""


class Rendering:
    """One template of one tokenizer. `source` is the text that is rendered, settings included."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str, *, eos: str, date: str) -> None:
        self.tokenizer, self.source, self._eos, self._date = tokenizer, source, eos, date
        self.is_ours = source in TEMPLATES.values()
        self._template = SafeTemplate(source)
        self.frame = Frame()
        self.before = self._probe()

    # -- what the template does

    def measure(self, tokens: TokenText) -> None:
        """Find the frame, and guard the tokens that the template writes."""
        user: Message = {"role": "user", "content": "x"}
        try:
            bare = self.render([user], generation=False)
            whole = self.render([user, {"role": "assistant", "content": _PROBE}], generation=False)
        except DataError as problem:
            log.info("template without assistant turns: %s", problem)
            tokens.guard_template("", self.before, "", "")
            return
        start, found, end = whole.partition(_PROBE)
        tokens.guard_template(bare, self.before, start, end if found else "")
        if not found or _PROBE in end:
            return
        prompt = self.render([user])
        prefix = prompt.removeprefix(bare) if prompt.startswith(bare) else ""
        tail = end[: len(end) - len(end.lstrip())] if end.strip() else ""
        header, lead, extra = "", "", ""
        if start.startswith(prompt):
            lead = start.removeprefix(prompt)
            if prompt == bare and lead.strip():
                header = prefix = lead.rstrip(" ")
                lead = lead.removeprefix(header)
        elif prompt.startswith(start):
            extra = prompt.removeprefix(start)
        elif not prefix.strip() or not start.rstrip().endswith(prefix.rstrip()):
            why = f"the chat template writes {start[-40:]!r} before a response, but generates after {prompt[-40:]!r}"
            raise ConfigError(why, FIX, field="template")
        if extra.strip() and "<" not in extra:
            why = f"the chat template begins generation with {extra!r}, which a whole dialogue has not"
            raise ConfigError(why, FIX, field="template")
        self.frame = Frame(header, prefix, lead, tail, end, extra)

    def render(self, messages: Sequence[Message], generation: bool = True) -> str:
        """The dialogue as transformers would render it, header included.

        Raises:
            TemplateRefusal: the template raises an error. ConfigError: it does not end, or does far more than it was
                asked for.
        """
        return self._write(messages, generation) + (self.frame.header if generation else "")

    def _write(self, messages: Sequence[Message], generation: bool, **arguments: Any) -> str:
        turns, tools = split_tools(messages)
        tokens = {**self.tokenizer.special_tokens_map, "eos_token": self._eos, "date_string": self._date}
        try:
            given = values(turns, tools, generation, **{**tokens, **arguments})
            return self._template.render(given, len(str(messages)))
        except MacpoError:
            raise
        except Exception as problem:  # templates raise whatever they like; the person gets the template's own words
            why = f"the chat template refuses this dialogue: {one_line(problem)}"
            raise TemplateRefusal(why, f"change the dialogue's roles, or {FIX}", field="template") from problem

    # -- dialogues

    def prompt(self, messages: Sequence[Message], tokens: TokenText) -> list[Piece]:
        """The rendered prompt; each content that spells a guarded token is a separate piece.

        Raises:
            TemplateRefusal: the template refuses the dialogue, or leaves out a message or a part of one.
        """
        marked, marks = _marked(messages, tokens)
        text = self.render(marked)
        self._check_written(marked, text, marks)
        return _pieces(text, marks)

    def response(
        self, messages: Sequence[Message], reply: str | Message, tokens: TokenText, finished: bool = True
    ) -> Response:
        """What the template writes for a reply to a dialogue, after the prompt.

        Raises:
            TemplateRefusal: it leaves out a part of the reply; or prompt and reply together would be in another format
                than the whole dialogue.
        """
        frame, text = self.frame, reply if isinstance(reply, str) else str(reply["content"])
        if isinstance(reply, str) and self.is_ours:
            return Response(framed(frame, text, finished))
        message: Message = {"role": "assistant", "content": reply} if isinstance(reply, str) else reply
        marked, marks = _marked([*messages, message], tokens)
        try:
            whole = self.render(marked, generation=False)
        except TemplateRefusal:
            if frame == Frame() and isinstance(reply, str):  # a template without assistant turns
                return Response(framed(frame, text, finished))
            raise
        self._check_written(marked, whole, marks)
        prompt = self.render(marked[:-1])
        rest, note = self._after(prompt, whole, marked)
        if note == _THOUGHT:
            rest = self._closing(rest, marked[-1]["content"], finished)
        at = rest.rfind(frame.end) if frame.end.strip() else -1
        rest = rest[:at] if at >= 0 else rest.removesuffix(frame.end)
        if isinstance(reply, str) and not note:
            if rest == frame.lead + marked[-1]["content"]:
                return Response(framed(frame, text, finished))
            note = "the template trims white space" if _same(rest, frame.lead + marked[-1]["content"]) else ""
            note = note or "the template writes responses in words of its own"
        return Response(_pieces(rest + (frame.tail if finished else ""), marks), note)

    def _after(self, prompt: str, whole: str, messages: Sequence[Message]) -> tuple[str, str]:
        """(what follows the prompt in the whole dialogue, what differs before it in words)."""
        if whole.startswith(prompt):
            return whole.removeprefix(prompt), ""
        frame = self.frame
        if frame.prefix_only and prompt.endswith(frame.prefix_only):
            shared = prompt.removesuffix(frame.prefix_only)
            if whole.startswith(shared):
                return whole.removeprefix(shared), _THOUGHT if frame.opened else _PREFIX
        mark = "\U000ffffe"
        probe = self.render([*messages[:-2], {**messages[-2], "content": mark}, messages[-1]], generation=False)
        at = whole.rfind(frame.prefix) if frame.prefix.strip() else -1
        after_prefix = probe.rfind(frame.prefix) if frame.prefix.strip() else -1
        if at >= 0 and mark in probe[:after_prefix]:
            return whole[at + len(frame.prefix) :], _HISTORY
        problem = "the chat template writes the whole dialogue differently from its generation prefix and the response"
        raise TemplateRefusal(problem, FIX, field="template")

    def _closing(self, rest: str, content: str, finished: bool) -> str:
        """The reply after a generation prefix that opens a thought, which the reply goes on with and closes."""
        tag = str(self.frame.opened)
        if closing(tag) not in rest and (closing(tag) in content or not finished):
            rest = content + self.frame.end  # the template drops the thoughts of a whole dialogue
        if closing(tag) not in rest and finished:
            problem = f"the generation prefix opens {tag}, and the response never closes it"
            raise TemplateRefusal(problem, self._thoughtless_fix(), field="template")
        return rest.lstrip().removeprefix(tag).removeprefix("\n") if rest.lstrip().startswith(tag) else rest

    def _thoughtless_fix(self) -> str:
        """The template's own argument against thoughts, where it has one."""
        user: Message = {"role": "user", "content": "x"}
        for name in ("enable_thinking", "thinking"):
            if name in self.source and open_tag(self._write([user], True, **{name: False})) is None:
                return f"set template_arguments: {{{name}: false}}, or give responses with their thoughts"
        return "give responses with their thoughts, or set template to one that opens none"

    def dialogue(self, messages: Sequence[Message], tokens: TokenText) -> list[Piece]:
        """The whole dialogue, without a generation prefix."""
        marked, marks = _marked(messages, tokens)
        return _pieces(self.render(marked, generation=False), marks)

    # -- nothing is left out

    def _check_written(self, messages: Sequence[Message], text: str, marks: dict[str, Piece]) -> None:
        """Raise TemplateRefusal for a message or a part that the template leaves out or takes for another."""
        for n, message in enumerate(messages):
            role, content = message["role"], str(message["content"])
            if role == "assistant":  # thoughts of earlier turns may go
                content = re.split(r"</\w+>", content)[-1]
            if not _within(content, text):
                problem = f"the chat template leaves out the {role} message {_shown(content, marks)}"
                raise TemplateRefusal(problem, f"remove it, or {FIX}", field="template")
            if role not in ("system", "user", "assistant") and self._mistaken(messages, n):
                problem = f"the chat template has no turn for a message of role {role!r}"
                raise TemplateRefusal(problem, "use a model whose template knows tools, or remove it", field=role)
            for part in PARTS:
                if part in message and self._ignored(messages, n, part):
                    problem = f"the chat template leaves out {part!r} of the {role} message"
                    raise TemplateRefusal(problem, f"remove it, or {FIX}", field=part)
        if "tools" in messages[0]:
            without = [{k: v for k, v in messages[0].items() if k != "tools"}, *messages[1:]]
            if self.render(without, self._generates(messages)) == self.render(messages, self._generates(messages)):
                fix = "use a model whose template knows tools, or remove the column"
                raise TemplateRefusal("the chat template leaves out 'tools'", fix, field="tools")

    def _mistaken(self, messages: Sequence[Message], n: int) -> bool:
        """Whether a message of a rare role is written as the assistant's or the user's would be."""
        generates = self._generates(messages)
        text = self.render(messages, generates)
        for role in ("assistant",) if messages[n]["role"] == "developer" else ("assistant", "user"):
            other = [*messages[:n], {**messages[n], "role": role}, *messages[n + 1 :]]
            try:
                if self.render(other, generates) == text:
                    return True
            except TemplateRefusal:
                continue
        return False

    def _ignored(self, messages: Sequence[Message], n: int, part: str) -> bool:
        """Whether a part changes nothing where it stands last; thoughts of earlier turns may go."""
        message = messages[n]
        if message["role"] == "tool" and part in LINKS:
            return False
        shown = messages[: n + 1] if part in THOUGHTS else messages
        without = [*shown[:n], {k: v for k, v in message.items() if k != part}, *shown[n + 1 :]]
        generates = self._generates(shown)
        return self.render(shown, generates) == self.render(without, generates)

    @staticmethod
    def _generates(messages: Sequence[Message]) -> bool:
        return messages[-1]["role"] != "assistant"

    def _probe(self) -> str:
        """The text that the template writes around a short dialogue; ConfigError if it fails."""
        try:
            return self.render([{"role": "user", "content": _PROBE}])
        except DataError as problem:
            raise ConfigError(problem.problems[0].message, FIX, field="template") from problem


_THOUGHT = "the generation prefix opens a thought, which the template's whole dialogue has not"
_PREFIX = "the generation prefix has an empty thought, which the template's whole dialogue has not"
_HISTORY = "the template writes earlier turns differently once the response is there"


def framed(frame: Frame, text: str, finished: bool = True) -> list[Piece]:
    """A response that the template writes to the character, with its separator or empty thought before it."""
    text += frame.tail if finished else ""
    return (
        [Piece(frame.lead, None), Piece(text, "assistant")]
        if frame.lead.strip()
        else [Piece(frame.lead + text, "assistant")]
    )


def _marked(messages: Sequence[Message], tokens: TokenText) -> tuple[list[Message], dict[str, Piece]]:
    """The dialogue with private-use characters that occur nowhere in it, and what they stand for.

    Such a character replaces a content that spells a guarded token, so the template treats it as ordinary text and
    nothing in it is read as one of the template's own markers. In other parts it stands inside the token.
    """
    used = set(_MARK.findall(str(messages)))
    free = (chr(c) for c in range(_FIRST_MARK, _FIRST_MARK + 0xFFF0) if chr(c) not in used)
    marks: dict[str, Piece] = {}
    marked: list[Message] = []

    def broken(value: Any, role: str) -> Any:
        if isinstance(value, str):
            if not tokens.spells(value, role):
                return value
            mark = next(free)
            marks[mark] = Piece("", role)
            return tokens.broken(value, role, mark)
        if isinstance(value, dict):
            return {broken(name, role): broken(part, role) for name, part in value.items()}
        return [broken(part, role) for part in value] if isinstance(value, list) else value

    for message in messages:
        content, role = message["content"], message["role"]
        if tokens.spells(content, role):
            mark, core = next(free), content.strip()
            marks[mark] = Piece(core, role)
            content = content.replace(core, mark)  # outer white space stays: a template may trim it
        rest = {name: broken(part, "tool") for name, part in message.items() if name not in ("role", "content")}
        marked.append({"role": role, "content": content, **rest})
    return marked, marks


def _pieces(text: str, marks: dict[str, Piece]) -> list[Piece]:
    """Cut rendered text at the marks."""
    if not marks:
        return [Piece(text, None)]
    parts = re.split(f"([{''.join(marks)}])", text)
    return [marks.get(part, Piece(part, None)) for part in parts if part]


def _within(content: str, text: str) -> bool:
    core = content.strip()
    return core in text or json.dumps(core, ensure_ascii=False)[1:-1] in text or _squeezed(core) in _squeezed(text)


def _same(one: str, other: str) -> bool:
    return _squeezed(one) == _squeezed(other)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _shown(content: str, marks: dict[str, Piece]) -> str:
    return shown(_MARK.sub(lambda mark: marks.get(mark.group(), Piece("", None)).text, content))
