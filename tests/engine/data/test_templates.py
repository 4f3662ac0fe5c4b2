"""Templates of the kinds that people have: prompt + response is what the template writes for the whole dialogue.

The templates are ours, written after habits of published ones: a missing generation prefix, thoughts, dates, tools,
trimmed text, system messages that are refused, strict alternation.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from macpo.data.preferences import load_preferences
from macpo.engine.data.chat import Chat, boundary_mismatches
from macpo.engine.data.messages import Message, message_of, with_tools
from macpo.engine.errors import ConfigError, DataError, TemplateRefusal

CASES = Path(__file__).parents[4] / "shared" / "cases" / "data"
WORDS = ["red", "two  blanks", "a\nline", "fox", "it is", "was ?", "- one\n- two", "(x)", "né", "1, 2"]
LOOP = "{% for m in messages %}"
TURN = "'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'"
ASSISTANT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
THINKING = (
    LOOP + "{% set text = m['content'].split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.reasoning_content if m.reasoning_content else '' %}"
    "{% if '</think>' in m['content'] %}{% set thought = m['content'].split('</think>')[0].split('<think>')[-1] %}"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ (text if m['role'] == 'assistant' else m['content']) + '<|im_end|>\n' }}{% endfor %}" + ASSISTANT
)
KINDS = {
    "ignores add_generation_prompt": LOOP + "{{ " + TURN + " }}{% endfor %}",
    "empty thought before the last response": THINKING,
    "prefix writes an empty thought": THINKING
    + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}",
    "opens a thought that every last response has": THINKING
    + "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}",
    "drops earlier thoughts": LOOP
    + "{% set text = m['content'] if loop.last else m['content'].split('</think>')[-1] %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + text + '<|im_end|>\n' }}{% endfor %}" + ASSISTANT,
    "today's date": "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %B %Y') + '.<|im_end|>\n' }}"
    + LOOP + "{{ " + TURN + " }}{% endfor %}" + ASSISTANT,
    "date_string": "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "{{ 'Date: ' + date_string + '\n' }}" + LOOP + "{{ " + TURN + " }}{% endfor %}" + ASSISTANT,
    "refuses a system message": LOOP
    + "{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ " + TURN + " }}{% endfor %}" + ASSISTANT,
    "strict alternation": LOOP + "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else ' ' + m['content'] + ' ' + eos_token }}"
    "{% endfor %}",
    "trims": LOOP + "{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] | trim) + '<|im_end|>\n' }}{% endfor %}"
    + ASSISTANT,
}  # fmt: skip
ARGUMENTS: dict[str, dict[str, Any]] = {"prefix writes an empty thought": {"enable_thinking": False}}
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    + LOOP + "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m.reasoning_content %}"
    "{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}{{ m['content'] }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + ASSISTANT
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<unk>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(WORDS, trainers.BpeTrainer(special_tokens=specials, initial_alphabet=alphabet))
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    made.add_tokens([AddedToken(f"<{end}{tag}>", special=False) for tag in ("think", "tool_call") for end in ("", "/")])
    return made


def dialogue(n: int) -> list[Message]:
    """A dialogue of 1, 3 or 5 turns; later ones hold a thought in an earlier response."""
    turns = [f"{WORDS[(n + k) % len(WORDS)]} {n}" for k in range(1 + 2 * (n % 3))]
    said = [f"<think>\nhm {n}\n</think>\n\n{turn}" if k == 1 and n % 2 else turn for k, turn in enumerate(turns)]
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(said)]


def chat_of(kind: str, tokenizer: PreTrainedTokenizerFast) -> Chat:
    return Chat(tokenizer, KINDS[kind], arguments=ARGUMENTS.get(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_response_are_the_whole_dialogue(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Against transformers alone: what it writes for the dialogue with the response, and for its generation prefix."""
    chat = chat_of(kind, tokenizer)
    words = {"chat_template": KINDS[kind], "date_string": "26 Jul 2024", "return_dict": False} | chat.arguments
    for n in range(20):
        messages, response = dialogue(n), ("  indented\n", "it is a fox", "red")[n % 3]
        ours = chat.prompt_ids(messages) + chat.reply_ids(messages, response)
        if "strftime_now" in KINDS[kind]:
            words["chat_template"] = KINDS[kind].replace("strftime_now('%d %B %Y')", "'26 July 2024'")
        whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": response}], **words)
        assert whole[: len(ours)] == ours, (n, tokenizer.decode(ours), tokenizer.decode(whole))
        assert ours[-1] == chat.eos_id and chat.text(chat.response_ids(response)[:-1]) == response
        if not chat.about or "ignores" not in chat.about[0]:
            assert chat.prompt_ids(messages) == tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, **words
            )
    rows = [(dialogue(n), "it is") for n in range(6)]
    assert boundary_mismatches(chat, rows) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_tokenizer_gives_the_prompts_of_training(
    kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """20 dialogues for each of ten templates, read back by transformers alone and given nothing but the dialogue."""
    chat = chat_of(kind, tokenizer)
    chat.hf_tokenizer().save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for n in range(20):
        expected = again.apply_chat_template(dialogue(n), add_generation_prompt=True, return_dict=False)
        assert chat.prompt_ids(dialogue(n)) == expected
    assert Chat(again).eos_id == chat.eos_id
    assert Chat(again).prompt_ids(dialogue(5)) == chat.prompt_ids(dialogue(5))  # training goes on from an export


def test_an_unclosed_thought_is_refused_with_a_remedy_that_helps(tokenizer: PreTrainedTokenizerFast) -> None:
    opens = LOOP + "{{ " + TURN + " }}{% endfor %}" + ASSISTANT + "{% if add_generation_prompt %}"
    plain = opens + "{{ '<think>\n' }}{% endif %}"
    chat, user = Chat(tokenizer, plain), dialogue(0)
    with pytest.raises(TemplateRefusal, match=r"opens <think>, and the response never closes it.*Fix: give responses"):
        chat.reply_ids(user, "a fox")
    open_id, close_id = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    for reply in ("<think>\nhm\n</think>\n\na fox", "hm\n</think>\n\na fox"):  # as data has it, and as it is generated
        ids = chat.reply_ids(user, reply)
        assert tokenizer.decode(ids) == "hm\n</think>\n\na fox<|im_end|>"
        assert ids.count(close_id) == 1 and (chat.prompt_ids(user) + ids).count(open_id) == 1
    assert tokenizer.decode(chat.reply_ids(user, "hm", finished=False)) == "hm"  # cut while it thinks
    switch = opens + "{{ '<think>\n' if enable_thinking is not defined or enable_thinking else '' }}{% endif %}"
    with pytest.raises(TemplateRefusal, match=r"Fix: set template_arguments: \{enable_thinking: false\}"):
        Chat(tokenizer, switch).reply_ids(user, "a fox")
    helped = Chat(tokenizer, switch, arguments={"enable_thinking": False})
    assert boundary_mismatches(helped, [(user, "a fox")]) == 0


def test_what_differs_only_before_the_response_is_said(tokenizer: PreTrainedTokenizerFast) -> None:
    """A template that marks the last question writes it otherwise once the response is there."""
    marks = LOOP + "{{ ('* ' if loop.last else '') + " + TURN + " }}{% endfor %}" + ASSISTANT
    chat, user = (
        Chat(tokenizer, marks.replace("'* ' if loop.last", "'* ' if loop.last and m.role == 'user'")),
        dialogue(2),
    )
    assert "earlier turns differently" in chat.note(user, "a fox")
    assert tokenizer.decode(chat.reply_ids(user, "a fox")) == "a fox<|im_end|>"
    assert boundary_mismatches(chat, [(user, "a fox")]) == 1
    trims = chat_of("trims", tokenizer)
    assert trims.note(user, " a fox") == "the template trims white space" and not trims.note(user, "a fox")
    assert tokenizer.decode(trims.reply_ids(user, " a fox\n")) == "a fox<|im_end|>"
    other = (
        LOOP + "{{ ('<|im_start|>model\n' if m.role == 'assistant' else '') + " + TURN + " }}{% endfor %}" + ASSISTANT
    )
    with pytest.raises(ConfigError, match="before a response, but generates after"):
        Chat(tokenizer, other.replace("<|im_start|>assistant", "<|im_start|>bot"))


def test_tags_become_tokens_in_a_response_and_plain_text_in_a_question(tokenizer: PreTrainedTokenizerFast) -> None:
    chat, tag = Chat(tokenizer, THINKING), tokenizer.convert_tokens_to_ids("</think>")
    assert tag not in chat.prompt_ids([{"role": "user", "content": "what is </think> ?"}])
    assert chat.reply_ids(dialogue(0), "<think>\nhm\n</think>\n\nred").count(tag) == 1
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert chat.reply_ids(dialogue(0), "red <|im_end|> dog").count(ends) == 1  # the end that the template writes


def test_arguments_are_read_or_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"template_arguments: the chat template reads no argument 'enable_thinking'"):
        Chat(tokenizer, KINDS["trims"], arguments={"enable_thinking": False})
    with pytest.raises(ConfigError, match=r"'messages' is not an argument to set"):
        Chat(tokenizer, KINDS["trims"], arguments={"messages": []})
    kind = "prefix writes an empty thought"
    assert (
        Chat(tokenizer, KINDS[kind], arguments={"enable_thinking": False}).digest != Chat(tokenizer, KINDS[kind]).digest
    )


@pytest.mark.parametrize(("kind", "said"), [("today's date", "02 January 2026"), ("date_string", "02 Jan 2026")])
def test_one_date_whatever_the_day(
    kind: str, said: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = set()
    for day in (1, 2):

        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz: datetime.tzinfo | None = None, day: int = day) -> Clock:  # type: ignore[override]
                return cls(2030, 5, day)

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
        prompts.add(tokenizer.decode(Chat(tokenizer, KINDS[kind]).prompt_ids(dialogue(0))))
    assert len(prompts) == 1 and "2024" in prompts.pop()
    chat = Chat(tokenizer, KINDS[kind], date=datetime.date(2026, 1, 2))
    assert said in tokenizer.decode(chat.prompt_ids(dialogue(0))) and chat.dated
    assert said in chat.hf_tokenizer().apply_chat_template(dialogue(0), tokenize=False)
    assert chat.digest != Chat(tokenizer, KINDS[kind]).digest


def test_what_a_template_leaves_out_is_refused_by_name(tokenizer: PreTrainedTokenizerFast) -> None:
    plain, user = Chat(tokenizer, "chatml"), dialogue(0)
    call = {"function": {"name": "clock", "arguments": {"town": "Ulm"}}}
    calling = message_of({"role": "assistant", "content": None, "tool_calls": [call]})
    with pytest.raises(TemplateRefusal, match="leaves out 'tools'"):
        plain.prompt_ids(with_tools(user, [{"name": "clock"}]))
    with pytest.raises(TemplateRefusal, match="leaves out 'tool_calls' of the assistant message"):
        plain.prompt_ids([*user, calling, {"role": "tool", "content": "12:00"}])
    with pytest.raises(TemplateRefusal, match="leaves out 'reasoning_content'"):
        plain.reply_ids(user, {"role": "assistant", "content": "red", "reasoning_content": "hm"})
    with pytest.raises(TemplateRefusal, match="no turn for a message of role 'tool'"):
        Chat(tokenizer, "vicuna").prompt_ids([*user, {"role": "tool", "content": "12:00"}])
    deaf = Chat(tokenizer, LOOP + "{% if m['role'] != 'system' %}{{ " + TURN + " }}{% endif %}{% endfor %}" + ASSISTANT)
    with pytest.raises(TemplateRefusal, match='leaves out the system message "be kind"'):
        deaf.prompt_ids([{"role": "system", "content": "be kind"}, *user])
    with pytest.raises(TemplateRefusal, match="no system here"):
        chat_of("refuses a system message", tokenizer).prompt_ids([{"role": "system", "content": "be kind"}, *user])
    for bad, why in (
        ({"weight": 0}, "a part 'weight'"),
        ({"content": [{"type": "image"}]}, "'image' that is not text"),
    ):
        with pytest.raises(DataError, match=why):
            message_of({"role": "user", "content": "hi"} | bad)


def test_a_template_that_knows_tools_writes_them(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = Chat(tokenizer, TOOLS)
    call = {"type": "function", "function": {"name": "clock", "arguments": '{"town": "Ulm <|im_end|>"}'}}
    calling = message_of({"role": "assistant", "content": None, "tool_calls": [call]})
    messages = with_tools([*dialogue(0), calling, {"role": "tool", "content": "12:00"}], [{"name": "clock"}])
    text = tokenizer.decode(chat.prompt_ids(messages))
    assert '[{"name": "clock"}]' in text and '"arguments": {"town": "Ulm <|im_end|>"}' in text and "tool\n12:00" in text
    end, tag = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<tool_call>"])
    assert chat.prompt_ids(messages).count(end) == 4  # system, user, assistant and tool: none from the argument
    ids = chat.reply_ids(dialogue(0), calling)
    assert ids.count(tag) == 1 and ids.count(end) == 1 and ids[-1] == end
    thought = {"role": "assistant", "content": "red", "reasoning_content": "hm"}
    assert tokenizer.decode(chat.reply_ids(dialogue(0), thought)) == "<think>\nhm\n</think>\n\nred<|im_end|>"


def test_a_shortened_prompt_is_a_dialogue(tokenizer: PreTrainedTokenizerFast) -> None:
    """Oldest turns go first and the system message stays; then it goes; then the last turn loses its beginning."""
    chat = Chat(tokenizer, "chatml")
    turns: list[Message] = [{"role": "system", "content": "be kind"}]
    for n in range(4):
        turns += [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": f"response {n}"}]
    turns += [{"role": "user", "content": "the last question " * 5}]
    lengths = [len(chat.prompt_ids([turns[0], *turns[k:]])) for k in (1, 3, 5, 7, 9)]
    for kept, length in zip((1, 3, 5, 7, 9), lengths, strict=True):
        assert chat.limited_prompt_ids(turns, length) == chat.prompt_ids([turns[0], *turns[kept:]])
    assert chat.limited_prompt_ids(turns, lengths[-1] - 1) == chat.prompt_ids(turns[9:])
    cut = chat.limited_prompt_ids(turns, 60)
    assert cut is not None and len(cut) <= 60
    text = tokenizer.decode(cut)
    assert text.startswith("<|im_start|>user\n") and text.endswith("question <|im_end|>\n<|im_start|>assistant\n")
    assert chat.limited_prompt_ids(turns, 5) is None  # less than an empty turn
    call = {"role": "assistant", "content": "look", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    tool = Chat(tokenizer, TOOLS)
    asked = [*turns[1:], call, {"role": "tool", "content": "12:00"}]
    shortest = tool.limited_prompt_ids(asked, len(tool.prompt_ids(asked)) - 1)
    assert shortest is not None and "<tool_call>" in tokenizer.decode(shortest)


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not here")
@pytest.mark.parametrize("name", ["c02_toolcalls", "c02b_toolrole", "c02c_toolanswer", "c02d_reasoning"])
def test_cases_with_parts(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    pairs, _ = load_preferences(CASES / f"{name}.jsonl")
    knows, lacks = Chat(tokenizer, TOOLS), Chat(tokenizer, "vicuna")
    for pair in pairs:
        replies = [(pair.reply(side), True) for side in ("chosen", "rejected")]
        group = knows.group(pair.prompt.messages, replies, max_tokens=4000)
        assert group is not None and group.responses[0] != group.responses[1]
        rows = [(pair.prompt.messages, reply) for reply, _ in replies]
        assert boundary_mismatches(knows, rows) == 0
        with pytest.raises(TemplateRefusal):
            lacks.group(pair.prompt.messages, replies, max_tokens=4000)
    assert pairs[0].prompt.origin == (str(CASES / f"{name}.jsonl"), 1)
    assert type(pairs[0]).from_json(json.loads(json.dumps(pairs[0].to_json()))) == pairs[0]


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not here")
def test_other_cases() -> None:
    for name in ("c10_parts", "c11_object"):
        pair = load_preferences(CASES / f"{name}.jsonl")[0][0]
        assert (pair.prompt.messages[0]["content"], pair.chosen, pair.rejected) == ("Say hi 0", "Hi 0", "No")
    pair = load_preferences(CASES / "c09_indent.jsonl")[0][0]
    assert pair.prompt.messages[0]["content"] == "def f0(x):\n" and pair.rejected == "    pass\n"
    with pytest.raises(
        DataError, match=r"c15_diverge.jsonl:1: rejected: its dialogue parts from chosen's at message 2"
    ):
        load_preferences(CASES / "c15_diverge.jsonl")
    with pytest.raises(DataError, match=r"c23_prefill.jsonl:1: prompt: its last message is not the user's"):
        load_preferences(CASES / "c23_prefill.jsonl")
