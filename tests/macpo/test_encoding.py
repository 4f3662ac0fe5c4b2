"""What an agent's settings make of rows: twins that truncation makes, lines of refusals, and dates in stage keys."""

from __future__ import annotations

import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from macpo.engine.config import InitSettings
from macpo.engine.data.chat import Chat
from macpo.engine.data.records import Pair, Prompt
from macpo.engine.data.template_settings import DATE, date_of
from macpo.engine.errors import DataError, TemplateRefusal
from macpo.engine.models.from_scratch import train_tokenizer
from macpo.method.encoding import encode_pairs
from macpo.method.policies import StageAgent

SETTINGS = InitSettings(tokenizer="word", vocab_size=64)
AGENT: dict[str, Any] = {
    "name": "policy",
    "model": None,
    "template": "vicuna",
    "eos_token": None,
    "special_text": "plain",
    "context_tokens": 20,
    "max_prompt_tokens": 10,
    "long_prompt": "truncate",
    "trust_remote_code": False,
}
DATED = "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"


def policy(**agent: Any) -> Any:
    """What `encode_pairs` reads of a policy."""
    chat = Chat(train_tokenizer(["a good bad end of the report"], SETTINGS), "vicuna")
    return SimpleNamespace(agent=StageAgent(**(AGENT | agent)), chat=chat, ctx=SimpleNamespace(name="train"))


def test_pairs_that_truncation_makes_equal_are_dropped_and_cut_responses_are_counted() -> None:
    long = "the report " * 12
    pairs = [
        Pair(Prompt.of("a"), long + "good", long + "bad"),
        Pair(Prompt.of("the"), "good end", "bad end"),
        Pair(Prompt.of("of"), "good " + long, "bad end"),
    ]
    groups, kept, counts = encode_pairs(policy(), pairs)
    assert kept == [1, 2] and len(groups) == 2
    assert counts == {"dropped_long_prompt": 0, "dropped_identical_when_cut": 1, "cut_chosen": 2, "cut_rejected": 1}
    with pytest.raises(DataError, match=r"none of 1 pairs is left: they differ only beyond context_tokens \(20\)"):
        encode_pairs(policy(), pairs[:1])


def test_a_refusal_names_file_and_line_or_the_line_of_a_record() -> None:
    tool = [{"role": "user", "content": "a"}, {"role": "tool", "content": "good"}]
    pair = Pair(Prompt.of(tool, origin=("pairs.jsonl", 7)), "good", "bad")
    with pytest.raises(TemplateRefusal, match=r"^error: pairs.jsonl:7: tool: the chat template has no turn for"):
        encode_pairs(policy(), [pair])
    with pytest.raises(TemplateRefusal, match=r"role 'tool' \(line 7 of the data, prompt \w{16}: 'good'\)"):
        encode_pairs(policy(), [Pair.from_json(pair.to_json())])


def test_only_templates_that_write_a_date_have_it_in_their_key(tmp_path: Path) -> None:
    day = datetime.date(2026, 1, 2)
    (tmp_path / "chat_template.jinja").write_text(DATED)
    assert date_of("auto", str(tmp_path), day) == day and date_of("auto", str(tmp_path), DATE) == DATE
    assert date_of("vicuna", str(tmp_path), day) is None and date_of("auto", None, day) is None
    given = DATED.replace("strftime_now('%Y')", "date_string")
    assert (
        date_of(given, None, day) == day and date_of(given, None, DATE) is None
    )  # as it was before there was a setting
