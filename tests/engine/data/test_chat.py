"""Chat: one tokenisation rule, never a double BOS, never a special id out of data."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from macpo.engine.data.chat import Chat, boundary_mismatches, load_tokenizer
from macpo.engine.data.messages import Message
from macpo.engine.data.pack import pack
from macpo.engine.data.templates import ALPACA_SYSTEM, MAX_TEMPLATE_CHARS, TEMPLATES, VICUNA_SYSTEM, log_once
from macpo.engine.errors import ConfigError, DataError

STORIES = Path(__file__).parents[4] / "shared" / "models" / "stories260K"
TEXT = ["the quick brown fox jumps over the lazy dog USER: what is it ? ASSISTANT: it is a fox , not a dog", "a b c"]
MARKERS = ["<|im_start|>", "<|im_end|>", "<|user|>", "[INST]", "[/INST]"]
HEAD = "{% for m in messages %}"


def user(*contents: str) -> list[Message]:
    """A dialogue of user and assistant turns in alternation."""
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def wrap(backend: Tokenizer, adds_bos: bool, **kwargs: object) -> PreTrainedTokenizerFast:
    if adds_bos:
        bos = backend.token_to_id("<s>")
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    options = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | kwargs
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def byte_level(adds_bos: bool = True, **kwargs: object) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<unk>", "<s>", "</s>", *MARKERS]
    backend.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet)
    )
    return wrap(backend, adds_bos, **kwargs)


def metaspace(adds_bos: bool = True, **kwargs: object) -> PreTrainedTokenizerFast:
    """Llama 2's layout: a blank written before every text, bytes for what is unknown."""
    specials = ["<unk>", "<s>", "</s>", *MARKERS]
    vocab = {token: i for i, token in enumerate([*specials, *(f"<0x{b:02X}>" for b in range(256))])}
    for char in sorted(set("".join(TEXT)) - {" "} | {"▁", "<", ">", "/", "s", "|", "_"}):
        vocab.setdefault(char, len(vocab))
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    return wrap(backend, adds_bos, **kwargs)


def unigram(adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """SentencePiece's unigram layout, in which the vocabulary itself holds the special tokens at score 0."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((token, 0.0) for token in MARKERS)]
    chars = sorted(set("".join(TEXT)) - {" "} | set("▁<>/s|_[]IN"))
    backend = Tokenizer(models.Unigram([*pieces, *((c, -5.0) for c in chars)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens(["<unk>", "<s>", "</s>", *MARKERS])
    return wrap(backend, adds_bos)


def words(adds_bos: bool = True, lower: bool = False) -> PreTrainedTokenizerFast:
    """One token a word; the special tokens are words of the vocabulary."""
    vocab = ["<unk>", "<s>", "</s>", *MARKERS, *sorted(set(" ".join(TEXT).split()))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocab)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if lower:
        backend.normalizer = normalizers.Lowercase()
    backend.add_special_tokens(["<unk>", "<s>", "</s>", *MARKERS])
    return wrap(backend, adds_bos)


TOKENIZERS = {
    "byte-level": byte_level(),
    "byte-level without bos": byte_level(adds_bos=False),
    "metaspace": metaspace(),
    "unigram": unigram(),
    "words": words(),
    "lower-case words without bos": words(adds_bos=False, lower=True),
}
# Ten layouts of published templates: who writes BOS, and where, is what differs.
LAYOUTS = {
    "vicuna": "vicuna",
    "vicuna-system": "vicuna-system",
    "alpaca": "alpaca",
    "plain": "plain",
    "chatml": "chatml",
    "bos in the template": "{{ bos_token }}" + TEMPLATES["vicuna"],
    "bos twice": "{{ bos_token + bos_token }}" + TEMPLATES["vicuna"],
    "bos after white space": "\n {{ bos_token }}" + TEMPLATES["chatml"],
    "bos in the first turn": HEAD + "{{ (bos_token if loop.first else '') + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% endfor %}",
    "bos as text": "<s>" + TEMPLATES["plain"],
    "trimmed": HEAD + "{{ '<|user|>' + (m['content'] | trim) + eos_token }}{% endfor %}",
}
CHATS = {
    (name, layout): Chat(tokenizer, template)
    for (name, tokenizer), (layout, template) in itertools.product(TOKENIZERS.items(), LAYOUTS.items())
}
SPELLED = ["<s>", "</s>", "<unk>", *MARKERS, "<S>", "</S>", " ", "\n", "fox", "dog", "ASSISTANT:", "é", "\U000f0000"]
hostile = st.lists(st.sampled_from(SPELLED) | st.text(max_size=4), max_size=8).map("".join)
few = settings(max_examples=25, deadline=None)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(content=hostile)
@few
def test_never_a_double_bos_nor_a_special_id_from_data(layout: str, content: str) -> None:
    for name, tokenizer in TOKENIZERS.items():
        chat = CHATS[name, layout]
        ids = chat.prompt_ids(user(f"a {content} b"))
        neutral = chat.prompt_ids(user("a fox b"))
        specials = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        specials |= {tokenizer.convert_tokens_to_ids(marker) for marker in MARKERS}
        assert [i for i in ids if i in specials] == [i for i in neutral if i in specials]
        assert ids.count(tokenizer.bos_token_id) == (chat.bos_id is not None)
        adds = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        assert (ids[0] == tokenizer.bos_token_id) == (adds or layout.startswith("bos"))
        assert not specials & set(chat.response_ids(content, finished=False))


@given(content=hostile)
@few
def test_a_byte_level_response_survives_encoding_and_decoding(content: str) -> None:
    for layout in ("vicuna", "chatml", "plain"):
        chat = CHATS["byte-level", layout]
        assert chat.text(chat.response_ids(content)) == (content if content.strip() else "")


@pytest.mark.parametrize("name", TOKENIZERS)
@given(picked=st.lists(st.sampled_from(["the", "quick", "brown", "fox", "is", "a", "dog"]), min_size=1, max_size=9))
@few
def test_words_survive_every_kind_of_tokenizer(name: str, picked: list[str]) -> None:
    chat = CHATS[name, "vicuna"]
    response = " ".join(picked)
    ids = chat.response_ids(response)
    assert chat.text(ids) == response
    assert ids == [*chat.response_ids(response, finished=False), chat.eos_id]
    # Parts and whole agree where a blank separates response and prompt, for every way to write blanks.
    assert boundary_mismatches(chat, [(user("is it a dog ?"), response)]) == 0


def test_boundary_mismatches_are_detected_and_their_rate_is_reported() -> None:
    chat = Chat(byte_level(), HEAD + "{{ m['content'] }}{% endfor %}")
    glued = (user("the qui"), "ck brown")  # "quick" is one token, "qui" + "ck" are not
    assert boundary_mismatches(chat, [glued, (user("the fox "), "\u00e9")]) == 0.5
    assert boundary_mismatches(chat, []) == 0.0


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_fast_path_gives_the_ids_of_the_tokenizer_itself(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    chat = CHATS[name, "vicuna"]
    for text in (*TEXT, "two  blanks\n\nand a line", "fox </s> dog"):
        for plain in (False, True):
            expected = tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]
            assert chat.tokens.encode(text, as_data=plain) == expected
    # State that another caller leaves in the tokenizer changes nothing.
    tokenizer(TEXT[0], truncation=True, max_length=2, padding="max_length", pad_to_multiple_of=8) if (
        tokenizer.pad_token
    ) else tokenizer(TEXT[0], truncation=True, max_length=2)
    assert len(chat.response_ids(TEXT[0])) > 10


def test_special_text_can_be_refused_instead() -> None:
    chat = Chat(byte_level(), "vicuna", special_text="error")
    assert chat.response_ids("a fox")
    for call in (lambda: chat.response_ids("a </s> b"), lambda: chat.prompt_ids(user("a <|im_start|>system b"))):
        with pytest.raises(DataError, match=r"special_text: the text spells the special token '.*Fix: remove it"):
            call()
    with pytest.raises(ConfigError, match="special_text"):
        Chat(byte_level(), special_text="ignore")


def test_vicuna_text_is_exact_and_multi_turn() -> None:
    chat = Chat(byte_level(), "vicuna")
    text = chat.tokenizer.decode(chat.prompt_ids(user("hi", "a fox", "why ?")))
    assert text == "<s>USER: hi ASSISTANT: a fox</s>USER: why ? ASSISTANT:"
    assert chat.tokenizer.decode(chat.response_ids("it is")) == " it is</s>"
    system: list[Message] = [{"role": "system", "content": "be kind"}, *user("hi")]
    assert chat.rendered(system, "a dog") == "be kind USER: hi ASSISTANT: a dog"
    with_system = Chat(byte_level(), "vicuna-system")
    assert with_system.rendered(user("hi")) == f"{VICUNA_SYSTEM} USER: hi ASSISTANT:"
    assert with_system.rendered(system) == "be kind USER: hi ASSISTANT:"
    assert chat.rendered(user("hi")[:1] * 2) == "USER: hi USER: hi ASSISTANT:"


def test_alpaca_text_is_exact_and_multi_turn() -> None:
    chat = Chat(byte_level(), "alpaca")
    text = chat.tokenizer.decode(chat.prompt_ids(user("hi", "a fox", "why ?")))
    asked = " ### Instruction:\n{}\n\n### Response:\n"
    assert text == f"<s>{ALPACA_SYSTEM}{asked.format('hi')} a fox</s>\n\n{asked.format('why ?')}"
    assert chat.tokenizer.decode(chat.response_ids("it is")) == " it is</s>"
    system: list[Message] = [{"role": "system", "content": "be kind"}, *user("hi")]
    assert chat.rendered(system, "a dog") == f"be kind{asked.format('hi')} a dog"


@pytest.mark.parametrize("name", ["byte-level", "words", "metaspace"])
def test_an_exported_template_gives_hugging_face_the_same_ids(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    for layout in LAYOUTS:
        if layout in ("bos twice", "bos after white space"):
            continue  # what we repair and Hugging Face does not
        chat = CHATS[name, layout]
        expected = tokenizer.apply_chat_template(
            user("a fox"), chat_template=chat.hf_template, add_generation_prompt=True, return_dict=False
        )
        assert chat.prompt_ids(user("a fox")) == expected


def test_no_template_falls_back_to_vicuna_with_one_log_line(caplog: pytest.LogCaptureFixture) -> None:
    log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "macpo.chat"):
        chats = [Chat(byte_level()) for _ in range(3)]
    assert [chat.template for chat in chats] == [TEMPLATES["vicuna"]] * 3
    assert [record.getMessage() for record in caplog.records if "no chat template" in record.getMessage()] == [
        "tokenizer has no chat template: using vicuna (USER: … ASSISTANT:)"
    ]


def test_template_by_name_text_file_or_from_the_tokenizer(tmp_path: Path) -> None:
    text = HEAD + "{{ '# ' + m['content'] }}{% endfor %}"
    (tmp_path / "mine.jinja").write_text(text)
    own = byte_level()
    own.chat_template = text
    several = byte_level()
    several.chat_template = {"default": text, "tool_use": TEMPLATES["plain"]}
    chats = [Chat(byte_level(), text), Chat(byte_level(), str(tmp_path / "mine.jinja")), Chat(own), Chat(several)]
    assert len({chat.digest for chat in chats}) == 1
    assert len({chat.digest for chat in (chats[0], Chat(own, "vicuna"), Chat(own, special_text="error"))}) == 3
    with pytest.raises(ConfigError, match=r"no template or file named 'vicunna'.*Fix: use auto, vicuna"):
        Chat(byte_level(), "vicunna")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for %}", "refuses"),
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{{ 'x' * 9000000 }}", "wrote 9000000 characters"),
        ("{{ 1 }}" + "x" * MAX_TEMPLATE_CHARS, f"has {MAX_TEMPLATE_CHARS + 7} characters"),
    ],
)
def test_templates_are_sandboxed_and_bounded(template: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"template: .*{problem}"):
        Chat(byte_level(), template)


def test_dialogues_are_checked() -> None:
    chat = Chat(byte_level(), "vicuna")
    with pytest.raises(DataError, match="no message"):
        chat.prompt_ids([])
    for broken in ({"role": "robot", "content": "x"}, {"role": "user", "content": None}, {"content": "x"}):
        with pytest.raises(DataError, match="each message is"):
            chat.prompt_ids([broken])  # type: ignore[list-item]
    with pytest.raises(DataError, match="no tokens"):
        Chat(words(adds_bos=False), "plain").prompt_ids(user(" "))
    picky = (
        HEAD + "{% if m['role'] == 'assistant' %}{{ raise_exception('only one turn') }}{% endif %}{{ m['content'] }}"
    )
    with pytest.raises(DataError, match="only one turn"):
        Chat(byte_level(), picky + "{% endfor %}").prompt_ids(user("a", "b", "c"))


def test_eos_is_required_and_can_be_named() -> None:
    bare = byte_level(eos_token=None)
    with pytest.raises(ConfigError, match=r"eos_token: the tokenizer has no EOS.*Fix: set eos_token"):
        Chat(bare)
    with pytest.raises(ConfigError, match=r"'<end>' is not a token of the tokenizer"):
        Chat(bare, eos_token="<end>")
    chat = Chat(bare, "vicuna", eos_token="<|im_end|>")
    assert chat.response_ids("a")[-1] == chat.eos_id == bare.convert_tokens_to_ids("<|im_end|>")
    assert chat.rendered(user("a", "b", "c")) == "USER: a ASSISTANT: b<|im_end|>USER: c ASSISTANT:"


def test_the_token_that_ends_a_turn_ends_a_response() -> None:
    tokenizer = byte_level()
    turn_end, eos = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id
    chat = Chat(tokenizer, "chatml")
    assert chat.eos_id == turn_end
    assert chat.stop_ids == (turn_end, eos)
    assert Chat(tokenizer, "chatml", eos_token="</s>").eos_id == eos
    assert Chat(tokenizer, "vicuna").stop_ids == (eos,)
    lacking = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<u>": 0, "e": 1}, "<u>")))
    lacking.add_special_tokens({"unk_token": "<u>", "eos_token": "e"})
    with pytest.raises(ConfigError, match=r"template: '<\|im_start\|>' is not a token"):
        Chat(lacking, "chatml")


def test_markers_that_are_added_but_not_marked_special_are_no_turns_either() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<turn>", special=False), AddedToken("<other>", special=False)])
    chat = Chat(tokenizer, HEAD + "{{ '<turn>' + m['content'] }}{% endfor %}")
    ids = chat.prompt_ids(user("a <turn> b <other>"))
    assert ids.count(tokenizer.convert_tokens_to_ids("<turn>")) == 2  # of the question, and the header of the response
    assert ids.count(tokenizer.convert_tokens_to_ids("<other>")) == 1  # no token of the template: ordinary text
    assert tokenizer.decode(ids) == "<s><turn>a <turn> b <other><turn>"


@pytest.mark.parametrize("name", ["byte-level", "metaspace", "words"])
def test_eos_stays_in_the_loss_also_where_it_is_the_pad_token(name: str) -> None:
    tokenizer = {"byte-level": byte_level, "metaspace": metaspace, "words": words}[name]()
    tokenizer.pad_token = tokenizer.eos_token
    chat = Chat(tokenizer, "vicuna")
    group = chat.group(user("a"), [("a fox", True), ("a dog", False)], max_tokens=64)
    assert group is not None
    batch = pack([group], max_tokens=64)[0]
    finished, unfinished = (batch.target[a:b].tolist() for a, b in itertools.pairwise(batch.cu_rows.tolist()))
    assert finished == chat.response_ids("a fox")
    assert finished[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in unfinished


@given(st.integers(1, 60), st.lists(st.integers(1, 60), min_size=1, max_size=3), st.integers(8, 40), st.data())
@settings(max_examples=60, deadline=None)
def test_a_long_prompt_never_empties_a_completion(
    question: int, sizes: list[int], limit: int, data: st.DataObject
) -> None:
    chat = CHATS["words", "vicuna"]
    prompt_limit = data.draw(st.integers(4, limit - 1) | st.none())
    messages = user(" ".join(f"{'fox' if i % 3 else 'dog'}" for i in range(question)))
    responses = [(" ".join(["a"] * n), True) for n in sizes]
    kwargs = {"max_tokens": limit, "max_prompt_tokens": prompt_limit}
    group = chat.group(messages, responses, **kwargs)  # type: ignore[arg-type]
    assert group is not None
    whole, allowed = chat.prompt_ids(messages), prompt_limit or limit // 2
    assert group.max_length <= limit
    assert group.prompt_ids == chat.limited_prompt_ids(messages, allowed)
    assert group.prompt_ids[:2] == whole[:2]  # BOS and the marker of the turn
    assert group.prompt_ids[2:] == whole[len(whole) - len(group.prompt_ids) + 2 :]
    assert len(group.prompt_ids) == min(len(whole), allowed)
    for (text, _), ids in zip(responses, group.responses, strict=True):
        full = chat.response_ids(text)
        assert ids
        assert ids == full[: len(ids)]
        assert (ids[-1] == chat.eos_id) == (len(ids) == len(full))  # cut on the right: no EOS
    assume(len(whole) > allowed)
    assert chat.group(messages, responses, long_prompt="drop", **kwargs) is None  # type: ignore[arg-type]
    with pytest.raises(DataError, match=f"the prompt has {len(whole)} tokens, {allowed} fit"):
        chat.group(messages, responses, long_prompt="error", **kwargs)  # type: ignore[arg-type]


def test_groups_that_cannot_be_trained_on_are_refused() -> None:
    chat = CHATS["words", "vicuna"]
    with pytest.raises(DataError, match="no tokens"):
        chat.group(user("a"), [("fox", True), ("", False)], max_tokens=20)
    with pytest.raises(DataError, match="no tokens"):
        chat.group(user("a"), [], max_tokens=20)
    with pytest.raises(ConfigError, match="long_prompt"):
        chat.group(user("a"), [("fox", True)], max_tokens=20, long_prompt="cut")
    with pytest.raises(ConfigError, match="max_prompt_tokens"):
        chat.group(user("a"), [("fox", True)], max_tokens=2)


def test_load_tokenizer_round_trip_and_errors(tmp_path: Path) -> None:
    byte_level().save_pretrained(tmp_path)
    assert Chat(load_tokenizer(tmp_path), "vicuna").digest == Chat(byte_level(), "vicuna").digest
    with pytest.raises(ConfigError, match=r"no tokenizer loads from .*Fix: check the path; without a network"):
        load_tokenizer(tmp_path / "missing")


@pytest.mark.skipif(not STORIES.is_dir(), reason="the real model is not here")
def test_a_real_sentencepiece_tokenizer() -> None:
    chat = Chat(load_tokenizer(STORIES), "vicuna")
    text = "Once upon a time, Tom said </s> <s> and ran.  Two blanks;\nа new line"
    assert chat.text(chat.response_ids(text)) == text
    prompt = chat.prompt_ids(user(text, "yes </s> no", "why?"))
    assert prompt.count(chat.bos_id) == 1
    assert prompt.count(chat.eos_id) == 1  # the end of the assistant's turn, not what it spells
    assert chat.tokenizer.decode(prompt) == f"<s> USER: {text} ASSISTANT: yes </s> no</s> USER: why? ASSISTANT:"
    assert boundary_mismatches(chat, [(user("hi"), "a story"), (user(text), text)]) == 0
