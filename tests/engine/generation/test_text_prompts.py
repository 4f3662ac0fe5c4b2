"""Prompts as texts: tokenised as everywhere else, their responses ended and decoded by the template."""

from __future__ import annotations

from typing import Any

import pytest
from architectures import VOCAB, model_of
from generation_checks import character_tokenizer

from macpo.engine.data.chat import Chat
from macpo.engine.data.texts import messages_of, prompt_list
from macpo.engine.errors import ConfigError, DataError
from macpo.engine.generation import Generator, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=6)
TEMPLATE = "{% for m in messages %}{{ m.role[0] + m.content }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(character_tokenizer(VOCAB), TEMPLATE)


def test_a_text_is_the_token_ids_that_its_template_writes(chat: Chat) -> None:
    dialogue = [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    ids = [chat.prompt_ids([{"role": "user", "content": "abc"}]), chat.prompt_ids(dialogue)]
    assert chat.tokenizer.decode(ids[0]).replace(" ", "") == "uabca"
    params = SamplingParams(max_new_tokens=5, n=2, seed=3)
    generator = Generator(model_of("llama"), chat)
    as_ids = generator.generate(ids, params)
    assert generator.generate(["abc", dialogue], params) == as_ids
    assert generator.generate([ids[0], dialogue], params) == as_ids, "both kinds in one call"
    assert as_ids[0].text == as_ids[0].samples[0].text


def test_one_text_or_dialogue_alone_is_one_prompt(chat: Chat) -> None:
    generator = Generator(model_of("llama"), chat)
    (one,) = generator.generate("abc", GREEDY)
    assert generator.generate([{"role": "user", "content": "abc"}], GREEDY) == [one]
    assert generator.generate(iter(["abc"]), GREEDY) == [one]
    assert generator.generate([], GREEDY) == []


def test_the_templates_end_token_ends_the_response_to_a_text_and_what_it_writes_around_it_is_left_out(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator(model_of("llama"), chat)
    (whole,) = generator.generate("abc", GREEDY)
    tokens = whole.samples[0].token_ids
    at = next(i for i in range(1, len(tokens)) if tokens[i] not in tokens[:i])
    monkeypatch.setattr(chat, "stop_ids", (tokens[at],))
    (short,) = generator.generate("abc", GREEDY)
    assert short.samples[0].token_ids == tokens[:at] and short.samples[0].end_token == tokens[at]
    (ids,) = generator.generate([chat.prompt_ids([{"role": "user", "content": "abc"}])], GREEDY)
    assert ids.samples[0].token_ids == tokens, "a prompt of ids ends as its params say"
    (ignored,) = generator.generate("abc", SamplingParams(temperature=0.0, max_new_tokens=6, ignore_eos=True))
    assert len(ignored.samples[0].token_ids) == 6
    monkeypatch.setattr(chat, "unframed", lambda text: f"<{text}>")
    (framed,) = generator.generate("abc", GREEDY)
    assert framed.text == f"<{short.text}>"


def test_a_plain_tokenizer_gets_its_own_template() -> None:
    tokenizer = character_tokenizer(VOCAB)
    tokenizer.chat_template = TEMPLATE
    (one,) = Generator(model_of("llama"), tokenizer).generate("abc", GREEDY)
    assert [one] == Generator(model_of("llama"), Chat(tokenizer)).generate("abc", GREEDY)


@pytest.mark.parametrize(
    ("prompts", "error", "why"),
    [
        (["abc"], ConfigError, "a prompt that is a text needs a tokenizer"),
        ([float("nan")], DataError, "a prompt is a string, chat messages or token ids"),
        ([[{"role": "user", "content": None}]], DataError, "null content"),
        ([[]], DataError, "the prompt is empty"),
    ],
)
def test_what_is_no_prompt(prompts: Any, error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        Generator(model_of("llama")).generate(prompts, GREEDY)


def test_tools_of_a_dialogue_are_kept() -> None:
    tools = [{"type": "function", "function": {"name": "clock"}}]
    dialogue = [{"role": "user", "content": [{"type": "text", "text": "when ?"}], "tools": tools}]
    assert messages_of(dialogue) == [{"role": "user", "content": "when ?", "tools": tools}]
    assert prompt_list(dialogue) == [dialogue] and prompt_list((1, 2)) == [1, 2] and messages_of([1, 2]) is None
