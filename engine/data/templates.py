"""Built-in chat templates, and limits for foreign ones, because jinja is code.

`eos` = the text of the EOS token, `_` = one blank:

    vicuna         [system_]USER:_question_ASSISTANT:_answer eos USER:_…      (LLaMA-Factory's; nothing around eos)
    vicuna-system  the same with Vicuna's system sentence where the dialogue has no system message, LLaMA-Factory's too
    alpaca         system_### Instruction:\nquestion\n\n### Response:\n_answer eos \n\n_### Instruction:\n…
    chatml         <|im_start|>role\ncontent<|im_end|>\n …; both markers must be tokens of the tokenizer
    plain          every content followed by a newline

LLaMA-Factory encodes the pieces of a dialogue one by one (llmtuner 0.5.3, data/template.py), and a SentencePiece
tokenizer such as Llama 2's begins each with a blank. Where its text begins a piece, ours has one.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, ValidationInfo

from macpo.engine.data import template_worker
from macpo.engine.data.metering import Metered, Overspent, Uncountable
from macpo.engine.errors import ConfigError, one_line
from macpo.engine.paths import absolute, relative_to

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("macpo.chat")

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_VICUNA = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] + ' ' }}"
    "{% elif m['role'] == 'user' %}"
    "{{ (' ' if loop.previtem is defined and loop.previtem['role'] == 'user' else '') + 'USER: ' + m['content'] }}"
    "{% else %}{{ ' ASSISTANT: ' + m['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
TEMPLATES = {
    "vicuna": _VICUNA,
    "vicuna-system": "{% if messages[0]['role'] != 'system' %}" + VICUNA_SYSTEM + " {% endif %}" + _VICUNA,
    "alpaca": (
        "{% if messages[0]['role'] != 'system' %}" + ALPACA_SYSTEM + "{% endif %}"
        "{% for m in messages %}"
        "{% if m['role'] == 'system' %}{{ m['content'] }}"
        "{% elif m['role'] == 'user' %}"
        "{{ '\n\n' if loop.previtem is defined and loop.previtem['role'] != 'system' else '' }}"
        "{{ ' ### Instruction:\n' + m['content'] }}"
        "{% else %}{{ '\n\n### Response:\n ' + m['content'] + eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '\n\n### Response:\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "plain": "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}",
}
MAX_TEMPLATE_CHARS = 256 * 1024
"""Size limit for foreign templates; the largest published ones have about 30 thousand characters."""
MAX_RENDERED_CHARS = 1024 * 1024
"""Characters that a template may write beyond four times the dialogue itself."""


def _absolute(text: str, info: ValidationInfo) -> str:
    """A template's name or jinja text as it is; the path of a file becomes absolute."""
    if text in ("auto", *TEMPLATES) or "{{" in text or "{%" in text:
        return text
    path = absolute(text, relative_to(info))
    return path if set("/~.") & set(text) or Path(path).is_file() else text


Template = Annotated[str, AfterValidator(_absolute)]
"""A setting that names a template."""


def template_text(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    if template == "auto":
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        if not own:
            log_once(f"{tokenizer.name_or_path or 'tokenizer'} has no chat template: using vicuna (USER: … ASSISTANT:)")
            return TEMPLATES["vicuna"]
        text = str(own)
    elif template in TEMPLATES:
        return TEMPLATES[template]
    elif "{{" in template or "{%" in template:
        text = template
    elif Path(template).is_file():
        try:
            text = Path(template).read_text(encoding="utf-8")
        except UnicodeDecodeError as problem:
            raise ConfigError(f"invalid UTF-8 at byte {problem.start}", "save it as UTF-8", file=template) from None
    else:
        known = ", ".join(["auto", *TEMPLATES])
        raise ConfigError(f"no template or file named {template!r}", f"use {known}, or a jinja file", field="template")
    if len(text) > MAX_TEMPLATE_CHARS:
        raise ConfigError(f"the template has {len(text)} characters", f"at most {MAX_TEMPLATE_CHARS}", field="template")
    return text


@functools.cache
def log_once(text: str) -> None:
    log.warning("%s", text)


class SafeTemplate:
    """A template that is nobody's to trust: counted here if it can be, else rendered by a process with limits."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._metered = _metered(source)

    @property
    def is_counted(self) -> bool:
        """Whether it is rendered in this process."""
        return self._metered is not None

    def render(self, values: dict[str, Any], num_chars: int) -> str:
        """The text that it writes.

        Args:
            values: what it is given, of JSON's own types.
            num_chars: characters of the dialogue in them.

        Raises:
            ConfigError: it takes too long, or too much memory, or writes far more than it was given. Any other type:
                what the template raises.
        """
        most = MAX_RENDERED_CHARS + 4 * num_chars
        if self._metered is not None and num_chars <= MAX_RENDERED_CHARS:
            try:
                return self._checked(self._metered.render(values, 8 * most, template_worker.SECONDS), most)
            except Overspent:
                why = "the chat template does not end, or does far more than its dialogue asks for"
                raise ConfigError(why, "use another template", field="template") from None
            except Uncountable:
                pass
        reply = template_worker.ask({"source": self.source, "values": values, "max_chars": most})
        if "error" in reply:
            raise ValueError(reply["error"])
        return self._checked(reply["text"], most) if "text" in reply else self._checked(range(reply["wrote"]), most)

    @staticmethod
    def _checked(text: Any, most: int) -> str:
        if len(text) > most:
            raise ConfigError(
                f"the chat template wrote {len(text)} characters", "use another template", field="template"
            )
        return str(text)


@functools.lru_cache(maxsize=64)
def _metered(source: str) -> Metered | None:
    try:
        return Metered(source)
    except Uncountable:
        return None


@functools.lru_cache(maxsize=64)
def names_read(source: str) -> frozenset[str]:
    """The names that a template reads besides those it defines. Raises ConfigError for a template that is no jinja."""
    metered = _metered(source)
    if metered is not None:
        return frozenset(template_worker.names_of(metered.tree))
    reply = template_worker.ask({"names": source})
    if "error" in reply:
        why = f"the chat template refuses this dialogue: {one_line(reply['error'])}"
        raise ConfigError(why, "set template to vicuna, alpaca, chatml, plain or a jinja file", field="template")
    return frozenset(reply["names"])
