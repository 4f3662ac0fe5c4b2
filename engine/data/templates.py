"""Built-in chat templates, and limits for foreign ones, because jinja is code.

`eos` = the text of the EOS token, `_` = one blank:

    vicuna         [system_]USER:_question_ASSISTANT:_answer eos USER:_…      (LLaMA-Factory's; nothing around eos)
    vicuna-system  the same with Vicuna's system sentence where the dialogue has no system message
    chatml         <|im_start|>role\ncontent<|im_end|>\n …; both markers must be tokens of the tokenizer
    plain          every content followed by a newline
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from macpo.engine.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("macpo.chat")

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
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
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "plain": "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}",
}
MAX_TEMPLATE_CHARS = 256 * 1024
"""Size limit for foreign templates; the largest published ones have about 30 thousand characters."""


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
        text = Path(template).read_text(encoding="utf-8")
    else:
        known = ", ".join(["auto", *TEMPLATES])
        raise ConfigError(f"no template or file named {template!r}", f"use {known}, or a jinja file", field="template")
    if len(text) > MAX_TEMPLATE_CHARS:
        raise ConfigError(f"the template has {len(text)} characters", f"at most {MAX_TEMPLATE_CHARS}", field="template")
    return text


@functools.cache
def log_once(text: str) -> None:
    log.warning("%s", text)


def one_line(problem: BaseException) -> str:
    return " ".join(str(problem).split())[:200] or type(problem).__name__


def within(seconds: float, call: Callable[[], str]) -> str:
    """Call `call` in a thread; after `seconds` raise TimeoutError here and in the thread."""
    results: list[str] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as problem:
            errors.append(problem)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(TimeoutError))
        raise TimeoutError
    if errors:
        raise errors[0]
    return results[0]
