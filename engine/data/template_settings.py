"""What a chat template reads besides the dialogue: arguments from the recipe, and one date for the whole run.

Both are written into the template's own text, so that an exported template needs neither.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import nodes

from macpo.engine.data.jinja_environment import environment
from macpo.engine.data.templates import TEMPLATES, names_read
from macpo.engine.errors import ConfigError, one_line
from macpo.engine.foreign import read_json_object
from macpo.engine.paths import expanded

DATE = datetime.date(2024, 7, 26)
"""Day that dated templates write by default: Llama 3's own, so that prompts do not depend on the day of the run."""
DATE_STRING = "%d %b %Y"
_OURS = ("messages", "tools", "documents", "add_generation_prompt", "date_string", "bos_token", "eos_token")
_SECONDS = frozenset("HIMSfpXcsT")  # formats of a clock, which a day does not have


def with_settings(template: str, arguments: Mapping[str, Any], date: datetime.date) -> str:
    """The template's text with the values of its arguments and its date in it; itself where it reads neither.

    Raises:
        ConfigError: a template that is no jinja; an argument that it does not read; a clock instead of a date.
    """
    tree, names = _parsed(template), names_read(template)
    known = sorted(names - {*_OURS, "strftime_now", "raise_exception", "namespace", "dict"})
    for name, value in arguments.items():
        if name in _OURS or name not in names:
            fix = f"it reads {', '.join(known)}" if known else "leave it out: it reads none"
            problem = f"the chat template reads no argument {name!r}"
            if name in _OURS:
                problem, fix = f"{name!r} is not an argument to set", "use template, eos_token or template_date for it"
            raise ConfigError(problem, fix, field="template_arguments")
        json.dumps(value)
    lines = [_default(name, value) for name, value in sorted(arguments.items())]
    formats = _date_formats(tree)
    if formats:
        written = {each: date.strftime(each) for each in formats}
        lines.append("{% macro strftime_now(format) %}{{ " + repr(written) + "[format] }}{% endmacro %}")
    return "".join(lines) + "\n" + template if lines else template


def with_date_string(template: str, date: datetime.date) -> str:
    """The template with a default for the `date_string` that it reads; itself where it reads none."""
    if not reads_date_string(template):
        return template
    return _default("date_string", date.strftime(DATE_STRING)) + "\n" + template


def reads_date_string(template: str) -> bool:
    """Whether the template writes a date that it is given as an argument."""
    return "date_string" in template and "date_string" in names_read(template)


def reads_clock(template: str) -> bool:
    """Whether the template asks for today's date."""
    return "strftime_now" in template and bool(_date_formats(_parsed(template)))


def template_of(folder: Path) -> str:
    """The chat template that a model's folder holds, without loading its tokenizer; "" where it has none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    config = folder / "tokenizer_config.json"
    try:
        found = read_json_object(config).get("chat_template") if config.is_file() else None
    except ConfigError:  # loading the tokenizer says what is wrong with it
        return ""
    if isinstance(found, list):
        found = {str(each.get("name")): each.get("template") for each in found if isinstance(each, dict)}
    return str((found.get("default") if isinstance(found, dict) else found) or "")


def date_of(template: str, model: str | None, date: datetime.date) -> datetime.date | None:
    """The date that an agent's prompts hold, as part of what its stages depend on.

    None where they hold none, and for the default date as the value of `date_string`, which is the template's own. A
    template on the Hub is not read for this: it counts as dated where the date is not the default.

    Args:
        template: name or text of the template.
        model: folder or Hub id of the model whose template "auto" is; None for one that the run trains.
    """
    text = TEMPLATES.get(template, template)
    if template == "auto" and model is not None and not expanded(model).is_dir():
        return date if date != DATE else None
    if template == "auto":
        text = template_of(expanded(model)) if model is not None else ""
    if reads_clock(text):
        return date
    return date if date != DATE and reads_date_string(text) else None


def _parsed(template: str) -> nodes.Template:
    try:
        return environment().parse(template)
    except Exception as problem:  # also of the parser itself: too deep, or a number of a million digits
        why = f"the chat template refuses this dialogue: {one_line(problem)}"
        fix = "set template to vicuna, alpaca, chatml, plain or a jinja file"
        raise ConfigError(why, fix, field="template") from problem


def _date_formats(tree: nodes.Template) -> list[str]:
    """The formats that a template gives `strftime_now`, in the order of the text."""
    formats = []
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name == "strftime_now":
            given = [*call.args, *(keyword.value for keyword in call.kwargs)]
            if len(given) != 1 or not isinstance(given[0], nodes.Const) or _SECONDS & set(_codes(given[0].value)):
                problem = "the chat template writes more of the clock than a date, or computes how"
                raise ConfigError(problem, "use a template that writes a date such as %d %b %Y", field="template")
            formats.append(str(given[0].value))
    return list(dict.fromkeys(formats))


def _codes(format: str) -> str:
    return "".join(part[:1] for part in str(format).replace("%%", "").replace("%-", "%").split("%")[1:])


def _default(name: str, value: Any) -> str:
    return f"{{% if {name} is not defined %}}{{% set {name} = {value!r} %}}{{% endif %}}"
