"""Files of models, adapters and tokenizers of any other shape: one error of the project's own, before anything is made.

The values are those that a fuzzer found in these loaders, and their relatives.
"""

from __future__ import annotations

import copy
import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from architectures import model_of
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

from macpo.engine.data.chat import Chat, load_tokenizer
from macpo.engine.errors import ConfigError, IntegrityError, MacpoError, ResourceError
from macpo.engine.files import read_json
from macpo.engine.foreign import header, read_json_object
from macpo.engine.model_folders import fingerprint_model, local_folder
from macpo.engine.models.loading import load_causal_lm
from macpo.engine.models.tuning.lora import load_adapter
from macpo.engine.planning.headers import inspect

ODD = [None, True, -1, 10**9, 10**400, 0.5, "", "x\x1b[2K", [], [None], {}, {"": None}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    model_of("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(model_of("llama"), config).save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(call: Callable[[], object], *kinds: type[MacpoError]) -> MacpoError:
    began = time.process_time()
    with pytest.raises(kinds or MacpoError) as caught:
        call()
    assert time.process_time() - began < 5
    for line in str(caught.value).split("\n"):
        assert line.startswith("error: ") and line.isprintable() and len(line) <= 500
    return caught.value


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a dtype with one bit flipped": lambda h: edit(h, dtype="F36"),
    "another dtype": lambda h: edit(h, dtype="F16"),
    "a dtype that is no text": lambda h: edit(h, dtype=["F32"]),
    "a shape with a negative number": lambda h: edit(h, shape=[-1, -1]),
    "a shape of 10^400": lambda h: edit(h, shape=[10**400]),
    "a shape of truths": lambda h: edit(h, shape=[True]),
    "no offsets": lambda h: edit(h, data_offsets=None),
    "one offset": lambda h: edit(h, data_offsets=[0]),
    "offsets that overlap": lambda h: shift(h, -4),
    "offsets with a gap": lambda h: shift(h, 4),
    "an entry that is no object": lambda h: {**h, first(h): 3},
    "a list": lambda h: [h],
    "a number of thousands of digits": lambda h: json.dumps(h).replace("[0,", "[" + "9" * 5000 + ",", 1),
    "deep nesting": lambda h: "[" * 100_000,
}


def first(found: dict[str, Any]) -> str:
    return next(name for name in found if name != "__metadata__")


def edit(found: dict[str, Any], **parts: Any) -> dict[str, Any]:
    return {**found, first(found): found[first(found)] | parts}


def shift(found: dict[str, Any], by: int) -> dict[str, Any]:
    name = [each for each in found if each != "__metadata__"][1]
    begin, end = found[name]["data_offsets"]
    return {**found, name: found[name] | {"data_offsets": [begin + by, end + by]}}


@pytest.mark.parametrize("kind", HEADERS)
def test_damaged_headers_of_safetensors(kind: str, base: Path, here: Callable[[Path], Path]) -> None:
    folder = here(base)
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    made = HEADERS[kind](json.loads(raw[8 : 8 + length]))
    text = (made if isinstance(made, str) else json.dumps(made)).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    refused(lambda: header(file), IntegrityError)
    refused(lambda: load_causal_lm(folder), IntegrityError)
    refused(lambda: inspect(folder), IntegrityError)


def test_a_whole_header_is_read_with_its_types(base: Path) -> None:
    found = header(base / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {"F32"}
    total = sum(tensor.end - tensor.begin for tensor in found.values())
    assert total == 4 * sum(tensor.numel for tensor in found.values())
    assert inspect(base).num_parameters == total // 4


@pytest.mark.parametrize("field", ["r", "lora_alpha", "target_modules", "rank_pattern", "layers_to_transform", "bias"])
def test_adapter_configs_of_other_types(field: str, adapter: Path, here: Callable[[Path], Path]) -> None:
    folder, model = here(adapter), model_of("llama")
    for value in ODD:
        change(folder / "adapter_config.json", **{field: value})
        try:
            load_adapter(copy.deepcopy(model), folder)
        except MacpoError as error:
            assert len(str(error)) <= 500


@pytest.mark.parametrize("pattern", ["(a+)+$", "((a+)b?)+$", "(a|a)*$", ".*" * 9, "("])
def test_patterns_of_adapters_that_take_for_ever(pattern: str, adapter: Path, here: Callable[[Path], Path]) -> None:
    folder = here(adapter)
    for field in ({"target_modules": pattern}, {"rank_pattern": {pattern: 3}}):
        shutil.copy(adapter / "adapter_config.json", folder)
        change(folder / "adapter_config.json", **field)
        refused(lambda: load_adapter(model_of("llama"), folder), ConfigError)


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("num_hidden_layers", 10**6, ResourceError),
        ("num_hidden_layers", "2", ConfigError),
        ("vocab_size", 10**12, ResourceError),
        ("vocab_size", 10**9, ResourceError),
        ("vocab_size", 10**400, ResourceError),
        ("hidden_size", 10**9, ResourceError),
        ("hidden_size", {}, ConfigError),
        ("model_type", {"": None}, ConfigError),
        ("model_type", "none such", ConfigError),
        ("layer_types", 5, ConfigError),
        ("text_config", [1], ConfigError),
        ("transformers_weights", {"a": 1}, ConfigError),
        ("rope_parameters", "x", ConfigError),
    ],
)
def test_configs_of_other_shapes(
    field: str, value: Any, kind: type[MacpoError], base: Path, here: Callable[[Path], Path]
) -> None:
    folder = here(base)
    change(folder / "config.json", **{field: value})
    refused(lambda: load_causal_lm(folder), kind)
    refused(lambda: inspect(folder), kind)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, '{"a": ' + "9" * 5000 + "}", "null", "\xff", ""])
def test_json_that_is_no_object(text: str, tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_bytes(text.encode("latin-1"))
    refused(lambda: read_json_object(file), ConfigError)
    if text != "null":
        refused(lambda: read_json(file), MacpoError)


@pytest.mark.parametrize("path", ["~nobody-of-this-name/x", "a\0b", "~nobody-of-this-name"])
def test_paths_of_nobody(path: str) -> None:
    refused(lambda: local_folder(path), ConfigError)
    refused(lambda: fingerprint_model(path), ConfigError)


@pytest.mark.parametrize("vocab", [{"<unk>": 0, "a": 10**9}, {"a": 0}, {"<unk>": -1}, {"<unk>": 10**12}, {}], ids=str)
def test_tokenizers_of_other_shapes(vocab: dict[str, int], tmp_path: Path) -> None:
    words = Tokenizer(token_models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, "<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(tmp_path)
    tree = json.loads((tmp_path / "tokenizer.json").read_text())
    tree["model"]["vocab"] = vocab
    tree["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    began = time.process_time()
    try:
        Chat(load_tokenizer(tmp_path), "plain").prompt_ids([{"role": "user", "content": "a b"}])
    except MacpoError as error:
        assert len(str(error)) <= 500
    assert time.process_time() - began < 5
