"""Names of columns: what the layouts read, what people call the same things, and the setting that maps them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from macpo.engine.errors import ConfigError

_PAIRS = {"prompt", "chosen", "rejected", "response_0", "response_1", "better_response_id", "safer_response_id"}
_EXAMPLES = {
    "instruction",
    "input",
    "output",
    "system",
    "history",
    "conversations",
    "messages",
    "response",
    "completion",
}
KNOWN_COLUMNS = frozenset(_PAIRS | _EXAMPLES)
"""Every name that some layout reads."""

ALIASES = {
    "prompt": "question query user_prompt prompt_text user problem instruction input text context",
    "chosen": "preferred better best chosen_response response_chosen accepted positive winner good",
    "rejected": "dispreferred worse worst rejected_response response_rejected negative loser bad",
    "response": "answer reply output target assistant",
    "messages": "conversation dialogue dialog chat",
    "system": "system_prompt system_message",
}
"""What people call a column, the commonest first."""


def mapping_line(missing: Iterable[str], there: Collection[str]) -> str:
    """Return the setting that maps missing columns: `data.columns: {prompt: question}`; NAME where none is likely."""
    free = {name.lower(): name for name in there if name not in KNOWN_COLUMNS or name in ("input", "output")}
    pairs = []
    for ours in missing:
        likely = next((free[alias] for alias in ALIASES.get(ours, "").split() if alias in free), "NAME")
        pairs.append(f"{ours}: {likely}")
    return f"data.columns: {{{', '.join(pairs)}}}"


def check_read(columns: Mapping[str, str], layout: str, reads: Collection[str]) -> None:
    """Raise ConfigError for a mapped column that the rows' layout does not read."""
    for ours, theirs in columns.items():
        if ours not in reads:
            problem = f"{ours!r} (here {theirs!r}) is not read: rows in the layout {layout} have {', '.join(reads)}"
            raise ConfigError(
                problem, f"remove {ours}, or set data.format to a layout that reads it", field="data.columns"
            )
