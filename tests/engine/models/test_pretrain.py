"""Models trained from scratch: tokenizer, Llama, documents as prefix groups, corpus files."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM

from macpo.engine.config import InitSettings, PretrainSettings
from macpo.engine.data.chat import Chat, load_tokenizer
from macpo.engine.data.records import Example, Prompt
from macpo.engine.errors import ConfigError, DataError
from macpo.engine.models.from_scratch import (
    build_model,
    document_groups,
    llama_shape,
    read_corpus,
    save_base,
    train_tokenizer,
)
from macpo.engine.models.policy import PolicyModule
from macpo.engine.training.objectives import sft
from macpo.engine.training.trainer import train

TINY = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "context": 32}
WORD = InitSettings(tokenizer="word", vocab_size=64, **TINY)
BPE = InitSettings(tokenizer="bpe", vocab_size=300, **TINY)
DOCUMENTS = [
    Example(Prompt.of("how do i print the invoice ?"), "first open the printer , then print the invoice ."),
    Example(Prompt.of("how do i fold the shirt ?"), "lay it flat , then fold the shirt .", finished=False),
    Example(Prompt.of(()), "the printer prints and the shirt is folded .", by="corpus"),
]


def test_word_tokenizer_keeps_the_most_frequent_words_and_the_template() -> None:
    tokenizer = train_tokenizer(DOCUMENTS, WORD)
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["<unk>", "<s>", "</s>", "USER:", "ASSISTANT:"]
    ranked = tokenizer.convert_ids_to_tokens(range(5, 9))
    assert ranked[0] == "the"  # 9 times
    assert tokenizer("the shirt")["input_ids"][0] == tokenizer.bos_token_id
    small = train_tokenizer(DOCUMENTS, WORD.model_copy(update={"vocab_size": 8}))
    assert len(small) == 8
    assert small.convert_ids_to_tokens(range(5, 8)) == ranked[:3]
    chat = Chat(tokenizer, "vicuna")
    assert tokenizer.unk_token_id not in chat.prompt_ids(DOCUMENTS[0].prompt.messages)
    assert chat.text(chat.response_ids(DOCUMENTS[0].response)) == DOCUMENTS[0].response
    assert tokenizer.unk_token_id in chat.response_ids("a word that nobody said")


def test_bpe_tokenizer_reads_and_writes_any_text() -> None:
    tokenizer = train_tokenizer([*DOCUMENTS, "a plain string"], BPE)
    assert 259 < len(tokenizer) <= 300
    chat = Chat(tokenizer, "vicuna")
    text = "Ünï¢ode 🦊\ttab\u2028and\x00 </s> <s>"
    assert chat.text(chat.response_ids(text)) == text
    assert len(chat.response_ids("the invoice", finished=False)) < len("the invoice")
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(tokenizer.get_vocab())


def test_tokenizers_are_the_same_in_every_process() -> None:
    code = (
        "import json, sys; from macpo.engine.config import InitSettings;"
        "from macpo.engine.models.from_scratch import *;"
        "documents = [Example.from_json(row) for row in json.loads(sys.argv[1])];"
        "kinds = [InitSettings.model_validate_json(text) for text in sys.argv[2:]];"
        "print(*(Chat(train_tokenizer(documents, kind)).digest for kind in kinds))"
    )
    rows = json.dumps([document.to_json() for document in DOCUMENTS])
    run = subprocess.run(
        [sys.executable, "-c", code, rows, WORD.model_dump_json(), BPE.model_dump_json()],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert run.stdout.split() == [Chat(train_tokenizer(DOCUMENTS, kind)).digest for kind in (WORD, BPE)]


def test_chatml_markers_become_tokens() -> None:
    for kind in (WORD, BPE):
        tokenizer = train_tokenizer(DOCUMENTS, kind, "chatml")
        chat = Chat(tokenizer, "chatml")
        assert chat.eos_id == tokenizer.convert_tokens_to_ids("<|im_end|>") == 4
        assert chat.prompt_ids(DOCUMENTS[0].prompt.messages).count(3) == 2
        assert "<|im_start|>" not in train_tokenizer(DOCUMENTS, kind).get_vocab()


def test_too_small_a_vocabulary_and_no_text_are_named() -> None:
    with pytest.raises(ConfigError, match=r"init.vocab_size: got 5. Fix: a vocabulary above 5 words"):
        train_tokenizer(DOCUMENTS, WORD.model_copy(update={"vocab_size": 5}))
    with pytest.raises(ConfigError, match=r"init.vocab_size: got 258. Fix: at least 259"):
        train_tokenizer(DOCUMENTS, BPE.model_copy(update={"vocab_size": 258}))
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        train_tokenizer([" ", "\n"], BPE)


def test_model_is_a_function_of_settings_and_seed() -> None:
    tokenizer = train_tokenizer(DOCUMENTS, WORD)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first, again, other = (build_model(WORD, tokenizer, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
        assert torch.equal(a, c) == (a.dim() == 1), name  # norms start at one, whatever the seed
    assert first.get_input_embeddings().weight is first.get_output_embeddings().weight
    assert first.config.vocab_size == len(tokenizer)
    assert (first.config.bos_token_id, first.config.eos_token_id) == (1, 2)
    shape = llama_shape(InitSettings(hidden_size=128, num_kv_heads=2))
    assert (shape.intermediate_size, shape.num_key_value_heads, shape.vocab_size) == (344, 2, 2048)


def test_documents_become_groups_of_one_token_and_the_rest() -> None:
    chat = Chat(train_tokenizer(DOCUMENTS, WORD), "vicuna")
    groups = document_groups(chat, DOCUMENTS, max_tokens=64)
    for group, document in zip(groups, DOCUMENTS, strict=True):
        assert group.prompt_ids == [chat.bos_id]
        assert len(group.responses) == 1
        assert (group.responses[0][-1] == chat.eos_id) == document.finished
    dialogue, _, plain = (chat.tokenizer.decode(group.responses[0]) for group in groups)
    assert dialogue == f"USER: {DOCUMENTS[0].prompt.messages[0]['content']} ASSISTANT: {DOCUMENTS[0].response} </s>"
    assert plain == f"{DOCUMENTS[2].response} </s>"


@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4), limit=st.integers(2, 24))
@settings(max_examples=40, deadline=None)
def test_long_documents_go_on_and_every_token_is_predicted_once(lengths: list[int], limit: int) -> None:
    chat = Chat(train_tokenizer(["a b c d e"], WORD), "vicuna")
    documents = [Example(Prompt.of(()), " ".join("abcde"[i % 5] for i in range(n))) for n in lengths]
    groups = document_groups(chat, documents, limit)
    expected = [token for d in documents for token in chat.document_ids((), d.response)[1:]]
    assert [token for group in groups for token in group.responses[0]] == expected
    assert all(2 <= group.max_length <= limit for group in groups)
    with pytest.raises(ConfigError, match=r"init.context"):
        document_groups(chat, documents, 1)
    with pytest.raises(DataError, match="no document has two tokens"):
        document_groups(chat, [Example(Prompt.of(()), "", finished=False)], limit)


def test_a_base_is_built_pretrained_by_the_engine_saved_and_loaded(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(DOCUMENTS, WORD)
    model = build_model(WORD, tokenizer, 3)
    groups = document_groups(Chat(tokenizer, "vicuna"), DOCUMENTS, WORD.context)
    optim = PretrainSettings(learning_rate=1e-2, epochs=12, batch=3)
    train(PolicyModule(model), groups, sft(), optim, seed=0, workdir=tmp_path / "work")
    rows = [json.loads(line) for line in (tmp_path / "work" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    save_base(model, tokenizer, tmp_path / "model")
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = torch.tensor([groups[0].prompt_ids + groups[0].responses[0]])
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    chat = Chat(load_tokenizer(tmp_path / "model"))  # the exported template, not the fallback
    assert chat.template.startswith("{{ bos_token }}")
    assert [chat.bos_id, *groups[0].responses[0]] == chat.document_ids(
        DOCUMENTS[0].prompt.messages, DOCUMENTS[0].response
    )


def test_corpus_files(tmp_path: Path) -> None:
    text = "first line\u2028still first\x85\n\n second line \r\n"
    rows = "".join(json.dumps({"text": t}) + "\n" for t in ("one\ntwo", "three"))
    for name, content in (("a.txt", text), ("b.jsonl", rows)):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
        assert read_corpus(tmp_path / name) == read_corpus(str(tmp_path / f"{name}.gz"))
    documents = read_corpus(tmp_path / "a.txt")
    assert [d.response for d in documents] == ["first line\u2028still first", "second line"]
    assert all(d.prompt.messages == () and d.by == "corpus" and d.finished for d in documents)
    assert [d.response for d in read_corpus(tmp_path / "b.jsonl")] == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("name", "content", "kind", "problem"),
    [
        ("a.txt", b"\n \n", DataError, "the corpus has no document"),
        ("a.txt", b"fine\nb\xff", DataError, r"a.txt:2: invalid UTF-8 at byte 6"),
        ("a.txt.gz", gzip.compress(b"x" * 99, mtime=0)[:-9], DataError, "damaged gzip"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"txt": "y"}\n',
            DataError,
            r"l:2: text: missing or empty \(keys seen: txt\)",
        ),
        ("a.jsonl", b'{"text": " "}\n', DataError, r"a.jsonl:1: text: missing or empty"),
        ("a.jsonl", b'{"text": "x"', DataError, r"a.jsonl:1: the last line is truncated at column"),
        ("a.csv", b"x", ConfigError, "cannot read 'a.csv'"),
    ],
)
def test_bad_corpora_are_named(tmp_path: Path, name: str, content: bytes, kind: type[Exception], problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(kind, match=problem):
        read_corpus(tmp_path / name)
    with pytest.raises(ConfigError, match="no file"):
        read_corpus(tmp_path / "missing.txt")


def test_dialogues_can_be_learnt_by_their_responses_alone() -> None:
    documents = [Example(Prompt.of("who is it ?"), "it is me ."), Example(Prompt.of(()), "plain text")]
    settings = InitSettings(hidden_size=16, num_heads=2, tokenizer="word", vocab_size=64)
    chat = Chat(train_tokenizer(documents, settings), "vicuna")
    dialogue, plain = document_groups(chat, documents, 64, learn="answers")
    assert dialogue.prompt_ids == chat.prompt_ids(documents[0].prompt.messages)
    assert dialogue.responses == [chat.response_ids("it is me .")]
    assert plain.prompt_ids == [chat.bos_id] and len(plain.responses[0]) == 3


def test_initial_weights_have_unit_scale_by_default() -> None:
    """With tied embeddings and std 0.02, small models learn to copy many times later (LOG.md)."""
    assert llama_shape(InitSettings(hidden_size=64)).initializer_range == 0.125
    assert llama_shape(InitSettings(hidden_size=64, initializer_range=0.02)).initializer_range == 0.02
