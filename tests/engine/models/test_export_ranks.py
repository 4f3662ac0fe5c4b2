"""Final weights of a policy that is spread over two ranks: the files of one rank, read back before they count."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VOCAB, model_of
from forks import forked, ranks
from pair_models import tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from macpo.engine.config import FullSettings, LoraSettings, ParallelSettings
from macpo.engine.data.chat import Chat, load_tokenizer
from macpo.engine.distributed.world import World
from macpo.engine.errors import ConfigError, IntegrityError, ResourceError
from macpo.engine.model_folders import PolicyRef, weight_files
from macpo.engine.models import saving
from macpo.engine.models.model_cache import ModelCache
from macpo.engine.models.parallelize import parallelize
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.saving import logits_of, publish, save_policy

WAYS = {"shard": ParallelSettings(sharding="shard"), "tensor": ParallelSettings(tensor=2)}
LORA = LoraSettings(rank=2, target_modules="all-linear")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    model_of("llama", tie_word_embeddings=True).save_pretrained(folder)
    return folder


def policy_of(base: Path, tuning: FullSettings | LoraSettings | None) -> PolicyModule:
    """A frozen policy (None), or one whose trained weights differ from the base's, drawn by name."""
    policy = ModelCache().policy(PolicyRef(str(base)), tuning, seed=1)
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters().items():
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return policy


def write(policy: PolicyModule, base: Path, out: Path, **changes: Any) -> None:
    words = {
        "base": str(base),
        "base_name": "some/base",
        "chat": Chat(tokenizer(), "vicuna"),
        "card": "# card\n",
    } | changes
    publish(policy, out, **words)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_ranks_write_what_one_writes(base: Path, tmp_path: Path) -> None:
    """Tied embeddings; full, adapter and frozen; FSDP2 and tensor parallelism: the same bytes and logits."""
    tunings = {"full": FullSettings(), "lora": LORA, "frozen": None}

    def body(world: World) -> None:
        for kind, tuning in tunings.items():
            for way, settings in WAYS.items():
                policy = parallelize(policy_of(base, tuning), settings, world)
                assert policy.collective
                write(policy, base, tmp_path / f"{kind}-{way}")

    assert ranks(2, body) == [0, 0]
    for kind, tuning in tunings.items():
        single = policy_of(base, tuning)
        write(single, base, tmp_path / kind)
        for way in WAYS:
            assert content(tmp_path / f"{kind}-{way}") == content(tmp_path / kind), (kind, way)
    names = set(content(tmp_path / "full"))
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert "adapter_model.safetensors" in content(tmp_path / "lora")


def test_what_goes_wrong_on_rank_0_stops_both_and_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaging(policy: PolicyModule, out: Path, **words: Any) -> None:
        save_policy(policy, out, **words)
        if World.current().is_main:
            tensors = load_file(out / "model.safetensors")
            tensors["model.norm.weight"] = tensors["model.norm.weight"] + 0.5
            save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})

    def body(world: World) -> None:
        policy = parallelize(policy_of(base, FullSettings()), WAYS["shard"], world)
        with monkeypatch.context() as patch:
            patch.setattr(saving, "save_policy", damaging)
            with pytest.raises(IntegrityError, match="logits differ"):
                write(policy, base, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
        with pytest.raises(ResourceError, match=r"no space to write it.*, [\d,]{6} bytes needed, [\d,]+ bytes free"):
            write(policy, base, tmp_path / "out")
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not (tmp_path / "out").exists()
        write(policy, base, tmp_path / "out")
        with pytest.raises(ConfigError, match="exists"):
            write(policy, base, tmp_path / "out")
        if world.is_main:
            os.environ["MACPO_KILL_AT"] = "file-written:1"  # everything but the card is there
        write(policy, base, tmp_path / "killed")

    assert ranks(2, body) == [-signal.SIGKILL, 7]
    assert (tmp_path / "out").exists() and not (tmp_path / "killed").exists()
    assert (tmp_path / ".killed.macpo-export" / "folder" / "model.safetensors").exists()
    write(policy_of(base, FullSettings()), base, tmp_path / "killed")
    assert content(tmp_path / "killed") == content(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"killed", "out"}


def test_a_large_model_is_cut_into_files_with_an_index(base: Path, tmp_path: Path) -> None:
    policy = policy_of(base, FullSettings())
    save_policy(policy, tmp_path, base_name="x", max_file_bytes=20_000)
    files = weight_files(tmp_path)
    assert len(files) > 2 and all(file.stat().st_size < 25_000 for file in files)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(again, VOCAB), logits_of(policy, VOCAB), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_a_policy_are_those_of_the_plain_model(name: str, dtype: torch.dtype) -> None:
    model = model_of(name).to(dtype)
    got = logits_of(PolicyModule(model), VOCAB)
    assert got.shape == (saving.NUM_TOKENS - 1, VOCAB) and got.dtype == torch.float32
    wanted = logits_of(model, VOCAB)
    saving.compare(wanted, got, dtype, Path("x"))
    with pytest.raises(IntegrityError, match="logits differ"):
        saving.compare(wanted, got + 0.2 * wanted.abs().max(), dtype, Path("x"))
    with pytest.raises(IntegrityError, match="logits differ by nan"):
        saving.compare(wanted, got * float("nan"), dtype, Path("x"))


def test_a_full_disk_is_told_before_and_while_weights_are_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
        save_policy(policy_of(base, FullSettings()), tmp_path / "full", base_name="x")

    assert forked(fill) == 4
    monkeypatch.setattr("macpo.engine.files.free_bytes", lambda path: 1000)
    for tuning in (FullSettings(), LORA):
        policy = policy_of(base, tuning)
        needed = 4 * sum(parameter.numel() for parameter in policy.trainable_parameters().values())
        with pytest.raises(ResourceError, match=f"the model needs {needed:,} bytes, 1,000 bytes free"):
            save_policy(policy, tmp_path / "out", base_name="x")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("tuning", [FullSettings(), LORA])
def test_saved_weights_have_the_permissions_that_the_umask_leaves(
    base: Path, tmp_path: Path, umask: int, tuning: FullSettings | LoraSettings
) -> None:
    before = os.umask(umask)
    try:
        save_policy(policy_of(base, tuning), tmp_path / "policy", base_name="x")
        (tmp_path / "policy" / "plain").write_text("x")
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "policy").iterdir()}
    assert set(modes.values()) == {oct(0o666 & ~umask)} and len(modes) > 2, modes


def test_what_a_killed_export_left_is_deleted_whatever_it_is(tmp_path: Path) -> None:
    """A kill at each of its first and last steps; what bears its name without its mark is another's."""
    work = tmp_path / ".out.macpo-export"
    for made in ([], ["made-by-macpo-export"], ["made-by-macpo-export", "folder/x", "folder.trash/x"]):
        work.mkdir()
        for name in made:
            (work / name).parent.mkdir(exist_ok=True)
            (work / name).write_text("x")
        saving.refuse_existing(tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
    (work / "folder").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists"):
        saving.refuse_existing(tmp_path / "out")
    assert (work / "folder").is_dir()


def test_a_fifo_among_a_models_files_is_refused_not_waited_for(base: Path, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja"):
        folder = Path(shutil.copytree(base, tmp_path / name))
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        for load in (ModelCache().policy, load_tokenizer):
            with pytest.raises(ConfigError, match=rf"{name}: a FIFO in the place of a regular file. Fix: "):
                load(PolicyRef(str(folder)) if load is not load_tokenizer else folder)
