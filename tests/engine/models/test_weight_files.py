"""Which files of a model folder are its weights: the ones that transformers loads, in the layouts that people have."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from architectures import model_of
from safetensors.torch import load_file, save_file

from macpo.engine.errors import ConfigError
from macpo.engine.model_folders import fingerprint_model, weight_files
from macpo.engine.models.loading import load_causal_lm


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    model_of("llama").save_pretrained(folder)
    return folder


def link_into(store: Path, folder: Path, source: Path) -> Path:
    """Move a model's files into a content store, without their endings, and link them from a folder."""
    store.mkdir(parents=True)
    folder.mkdir(parents=True)
    for i, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, store / f"hash{i}")
        (folder / file.name).symlink_to(os.path.relpath(store / f"hash{i}", folder))
    return folder


LAYOUTS = {  # content store, folder of links
    "hub": ("models--o--n/blobs", "models--o--n/snapshots/abc"),
    "hub without its name": ("mirror/blobs", "mirror/snapshots/abc"),
    "local-dir": ("models--o--n/blobs", "elsewhere/n"),
    "models of a cache": ("cache/blobs", "cache/hub/models/o/n"),
    "ModelScope": ("scope/store", "elsewhere/n"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_that_are_linked_within_a_cache_load(
    llama: Path, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, name = LAYOUTS[layout]
    if layout == "ModelScope":
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "scope"))
    folder = link_into(tmp_path / store, tmp_path / name, llama)
    assert load_causal_lm(folder).num_parameters() > 0
    assert fingerprint_model(folder) == fingerprint_model(llama)
    (tmp_path / "link").symlink_to(folder)
    assert weight_files(tmp_path / "link")
    monkeypatch.chdir(folder)
    assert weight_files(Path())


def test_weights_that_are_linked_beside_a_cache_are_refused(llama: Path, tmp_path: Path) -> None:
    folder = link_into(tmp_path / "outside", tmp_path / "models--o--n" / "snapshots" / "abc", llama)
    with pytest.raises(ConfigError, match=r"not a regular file inside the folder or its cache.*cp -L"):
        load_causal_lm(folder)


def test_the_file_that_transformers_loads_is_the_one_that_is_checked(llama: Path, tmp_path: Path) -> None:
    """A single file wins over an index, and a file that config.json names over both."""
    folder = Path(shutil.copytree(llama, tmp_path / "copy"))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "missing.safetensors"}}))
    assert [file.name for file in weight_files(folder)] == ["model.safetensors"]
    want = load_file(folder / "model.safetensors")["lm_head.weight"]
    torch.testing.assert_close(load_causal_lm(folder).lm_head.weight.data, want, rtol=0, atol=0)
    other = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(other, folder / "other.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"transformers_weights": "other.safetensors"}
    (folder / "config.json").write_text(json.dumps(config))
    assert [file.name for file in weight_files(folder)] == ["other.safetensors"]
    torch.testing.assert_close(load_causal_lm(folder).lm_head.weight.data, want + 1, rtol=0, atol=0)
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "../other.safetensors"}))
    with pytest.raises(ConfigError, match="not a plain file name"):
        load_causal_lm(folder)
