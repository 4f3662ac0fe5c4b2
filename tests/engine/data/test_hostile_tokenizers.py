"""Tokenizers that somebody else wrote: what goes wrong inside the library in Rust is one line of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from macpo.engine.console import run_cli
from macpo.engine.data.chat import Chat, load_tokenizer
from macpo.engine.errors import ConfigError
from macpo.engine.processes import Terminated

SLOW = "(a+)+$"  # exponential in the number of a's: the library gives up, with a panic that is no Exception


def backend() -> Tokenizer:
    made = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "[UNK]": 2}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(SLOW), "isolated")
    return made


def test_an_expression_that_takes_for_ever_is_refused() -> None:
    chat = Chat(PreTrainedTokenizerFast(tokenizer_object=backend(), eos_token="</s>"), "vicuna")
    with pytest.raises(ConfigError, match="cannot encode"):
        chat.prompt_ids([{"role": "user", "content": "a" * 40 + "b"}])


def test_a_panic_elsewhere_is_an_unexpected_error_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(lambda: backend().encode("a" * 40 + "b")) == 1
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error:")]
    assert "PanicException" in line and "--debug" in line


def test_sigterm_while_a_tokenizer_loads_is_no_error_of_the_tokenizer(tmp_path: Path, monkeypatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise Terminated

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", stop)
    with pytest.raises(Terminated):
        load_tokenizer(tmp_path)
    assert run_cli(lambda: load_tokenizer(tmp_path)) == 75
