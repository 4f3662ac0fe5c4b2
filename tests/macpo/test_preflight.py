"""`macpo check` and `plan` refuse what `run` refuses, before any work and all of it at once; plans for named GPUs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import model_of
from commands import macpo
from safetensors.torch import load_file, save_file
from standalone_runs import INIT, make_base, recipe_of
from tiny import tiny

from macpo.engine.recipe import dump

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("preflight") / "base")


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def bytes_of(change: Callable[[bytearray], bytes]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(bytearray(path.read_bytes())))

    return changed


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return changed


def without_eos(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token"}))


def more_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    written = json.loads(path.read_text())
    written["model"]["vocab"] |= {f"new{k}": len(written["model"]["vocab"]) + k for k in range(40)}
    path.write_text(json.dumps(written))


LAST = "model.layers.1.mlp.up_proj.weight"
FOLDERS: dict[str, tuple[Callable[[Path], None], int, str]] = {
    "pickled": (pickled, 2, "holds only pickled weights"),
    "header flipped": (bytes_of(lambda raw: bytes(raw[:20] + bytes([raw[20] ^ 255]) + raw[21:])), 5, "damaged header"),
    "truncated": (bytes_of(lambda raw: bytes(raw[:-100])), 5, "the file should have"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), 2, "holds no model.safetensors"),
    "no config": (lambda folder: (folder / "config.json").unlink(), 2, "the file is missing"),
    "other shape": (config(intermediate_size=99), 2, "gate_proj.weight is 48 x 16 in the weights, 99 x 16 by the"),
    "rows": (config(vocab_size=50), 2, "model.embed_tokens.weight is"),
    "a tensor less": (tensors(lambda have: {k: v for k, v in have.items() if k != LAST}), 2, f"missing, first {LAST}"),
    "more layers": (config(num_hidden_layers=3), 2, "9 weights are missing, first model.layers.2."),
    "layers": (config(num_hidden_layers=10**9), 4, "num_hidden_layers is 1,000,000,000: no machine holds such a model"),
    "unknown": (config(model_type="nosuch"), 2, "model type `nosuch`"),
    "encoder-decoder": (config(model_type="t5"), 2, "t5 is an encoder-decoder, whose prompt does not share a row"),
    "chunked": (config(layer_types=["chunked_attention"] * 2), 2, "LlamaForCausalLM has layers of type chunked_"),
    "not a dict": (lambda folder: (folder / "config.json").write_text("[1]"), 2, "is not a JSON object"),
    "hidden": (config(hidden_size="wide"), 2, "config"),
    "no eos": (without_eos, 2, "the tokenizer has no EOS token"),
    "vocabulary": (more_tokens, 2, "embedding rows"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), 2, "no tokenizer loads from"),
}


def refused(recipe: Path, out: Path, capsys: pytest.CaptureFixture[str], code: int, said: str, *words: str) -> str:
    """The message, which check, plan and run have in common."""
    messages = []
    for command in ("check", "plan", "run"):
        assert macpo(command, recipe, *words) == code, command
        messages.append("\n".join(x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")))
        assert said in messages[-1] and "Fix: " in messages[-1]
    assert not out.exists()
    assert len(set(messages)) == 1
    return messages[0]


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_cannot_be_loaded(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    change, code, said = FOLDERS[case]
    change(shutil.copytree(base, tmp_path / "model"))
    (tmp_path / "r.yaml").write_text(dump(recipe_of("preference", tmp_path / "model", tmp_path / "out")))
    message = refused(tmp_path / "r.yaml", tmp_path / "out", capsys, code, said)
    assert len(message.splitlines()) == 1 and ": model: " in message


@pytest.mark.parametrize(
    ("setting", "code", "said"),
    [
        ("context_tokens=4096", 2, "context_tokens is 4,096, and the model has 64 positions"),
        ("output=TMP/r.yaml/run", 2, "output: cannot write into the output folder: Not a directory"),
        ("output=TMP/r.yaml", 2, "cannot write into the output folder"),
        ("output=/proc/run", 2, "cannot write into the output folder"),
        ("compute.cache=TMP/r.yaml", 2, "compute.cache: cannot write"),
        ("compute.memory_gb=0.00001", 4, "the budget is 0.00 GB"),
        ("compute.parallel.tensor=2", 2, "1 ranks cannot be split into groups of 2"),
        ("tuning={type: lora, target_modules: [nope]}", 2, "LoRA cannot target nope. Fix: choose from down_proj"),
        ("adapter=/nowhere/a", 2, "adapter: there is no model folder '/nowhere/a'"),
        ("training.reference_model=/nowhere/a", 2, "training.reference_model: there is no model folder"),
        ("template=nope", 2, "no template or file named 'nope'"),
        ("eos_token=nope", 2, "'nope' is not a token of the tokenizer"),
        ("data={path: TMP/r.yaml, subset: nope}", 2, "has no subset 'nope'"),
        pytest.param(
            "compute.device=cuda", 2, "no GPU can be used here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_run(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, code: int, said: str
) -> None:
    (tmp_path / "r.yaml").write_text(dump(recipe_of("preference", base, tmp_path / "out")))
    words = "--set", setting.replace("TMP", str(tmp_path))
    if setting.startswith("compute.parallel"):  # how many processes there will be, check does not know
        assert macpo("plan", tmp_path / "r.yaml", *words) == macpo("run", tmp_path / "r.yaml", *words) == code
        assert capsys.readouterr().err.count(said) == 2
        return
    refused(tmp_path / "r.yaml", tmp_path / "out", capsys, code, said, *words)


def test_a_load_balancing_loss_is_not_compiled(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers collects the router's logits by hooks that torch.compile cannot follow."""
    mixture = model_of("mixtral", num_key_value_heads=2, num_local_experts=2, output_router_logits=True, vocab_size=300)
    folder = shutil.copytree(base, tmp_path / "model")
    mixture.save_pretrained(folder)
    (tmp_path / "r.yaml").write_text(dump(recipe_of("preference", folder, tmp_path / "out")))
    words = "--set", "compute.parallel.compile=true"
    message = refused(tmp_path / "r.yaml", tmp_path / "out", capsys, 2, "load-balancing loss", *words)
    assert 'turn compute.parallel.compile off, or set "output_router_logits": false' in message


def test_all_problems_at_once_each_with_its_setting(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the main recipe and of its arms; a damaged file beside wrong settings is code 2."""
    for name in ("first", "second", "third"):
        shutil.copytree(base, tmp_path / name)
    pickled(tmp_path / "first")
    bytes_of(lambda raw: bytes(raw[:-1]))(tmp_path / "second")
    without_eos(tmp_path / "third")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"peft_type": "IA3"}')
    teachers = [
        {"model": str(tmp_path / "first")},
        {"model": str(base), "positive": str(tmp_path / "adapter")},
        {"init": INIT | {"context": 32}},
    ]
    arms = {"other": {"student.model": str(tmp_path / "third")}}
    made = tiny(tmp_path / "out", teachers=teachers, student={"model": str(tmp_path / "second")}, ablations=arms)
    (tmp_path / "r.yaml").write_text(dump(made))
    message = refused(tmp_path / "r.yaml", tmp_path / "out", capsys, 2, "")
    for said in (
        "first: teachers.0.model: holds only pickled weights",
        "adapter/adapter_model.safetensors",
        "teachers.2.init.context: context_tokens is 64, and the model has 32 positions",
        "second/model.safetensors: student.model: the file should have",
        "student.model: eos_token: the tokenizer has no EOS token",
    ):
        assert said in message or said == "adapter/adapter_model.safetensors", (said, message)
    assert "adapter: teachers.1.positive: holds no adapter_model.safetensors" in message
    assert len(message.splitlines()) == 5, message


def test_a_reference_model_with_other_tokens(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_base(tmp_path / "other", tokenizer="bpe")
    (tmp_path / "r.yaml").write_text(dump(recipe_of("preference", base, tmp_path / "out")))
    said = "training.reference_model: "
    message = refused(
        tmp_path / "r.yaml", tmp_path / "out", capsys, 2, said, "--set", f"training.reference_model={other}"
    )
    assert "has another vocabulary than the policy" in message


@pytest.mark.parametrize("kind", ["demo", "preference", "sft"])
def test_a_plan_for_gpus_that_are_not_here(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`device: cuda` is judged by the GPUs that are named."""
    words = ["--set", "compute.device=cuda", "--set", "compute.dtype=auto", "--set", f"output={tmp_path / 'out'}"]
    assert macpo("plan", RECIPES / f"{kind}.yaml", *words, "--gpu", "h200", "--gpus", "8") == 0
    said = capsys.readouterr().out
    assert "8 ranks with 150.8 GB each" in said and "on H200" in said and "disk: about " in said
    rows = {line.split()[0]: line for line in said.splitlines() if line}
    trained = rows["iter3-student-train" if kind == "demo" else "train-policy"]
    assert "GB" in trained and " s " in trained  # memory of a rank, time of a step
    assert kind == "demo" or "512 to train on, 200 held out" in rows["data:"]
    assert kind == "demo" or all(
        int(rows[name].split()[1].replace(",", "")) for name in rows if name.startswith("eval")
    )


def test_a_base_too_large_for_the_named_gpu(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text(dump(recipe_of("sft", base, tmp_path / "out")))
    words = ["--gpu", "h100", "--set", "compute.memory_gb=0.00001", "--set", "compute.device=cuda"]
    assert macpo("plan", tmp_path / "r.yaml", *words) == 4
    assert "raise compute.memory_gb" in capsys.readouterr().err
