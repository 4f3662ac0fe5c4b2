"""Model and adapter folders as untrusted input: found, checked and told apart by their content; nothing is loaded."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from macpo.engine.errors import ConfigError, one_line
from macpo.engine.files import explained
from macpo.engine.foreign import MAX_HEADER_BYTES, header, read_json_object
from macpo.engine.opening import refuse_special
from macpo.engine.paths import expanded

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]
_HASHED = {".safetensors", ".json", ".model", ".jinja", ".txt"}
_WHOLE_BYTES = 64 * 1024 * 1024
_BLOCK_BYTES = 64 * 1024
_CACHE_DEPTH = 4  # hub/models/OWNER/NAME: how far above a folder the contents of its cache may lie
_CONVERT = "convert it once with model.save_pretrained(FOLDER, safe_serialization=True) where you trust the file"


@dataclass(frozen=True, slots=True)
class PolicyRef:
    """The folders or Hub ids of a policy's weights: of its base model, and of its adapter."""

    base: str
    adapter: str | None = None


def local_folder(path: str | Path, *, kind: str = "model", trust_remote_code: bool = False) -> Path:
    """The folder of a local path or a Hub id (downloaded, or taken from the Hub's cache when offline).

    Raises:
        ConfigError: no such folder; or a Hub id that is neither cached nor reachable.
    """
    text = str(path)
    folder = expanded(text)
    if folder.is_dir():
        with explained(folder):
            refuse_special(folder)
        return folder
    if folder.exists():
        raise ConfigError(f"{kind} {text!r} is a file, not a folder", "name the folder that holds config.json")
    if isinstance(path, Path) or not _HUB_ID.fullmatch(text):
        raise ConfigError(f"there is no {kind} folder {text!r}", "check the path; a Hub id looks like owner/name")
    from huggingface_hub import snapshot_download

    patterns = [*_HUB_FILES, *(["*.py"] if trust_remote_code else [])]
    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except Exception as error:  # the Hub's client raises many kinds; all mean that the files are not to be had
        why = one_line(error, 160)
        raise ConfigError(
            f"{kind} {text!r} is no folder here and could not be had from the Hub ({type(error).__name__}: {why})",
            "check the spelling and the network; offline, download it beforehand (`hf download`) and set "
            "HF_HUB_OFFLINE=1, or give a folder",
        ) from error


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter in peft's layout, and not a whole model."""
    return (folder / "adapter_config.json").exists()


def refuse_adapter(folder: Path) -> None:
    """Raise ConfigError for an adapter where a whole model is needed; transformers would load another base under it."""
    if is_adapter(folder):
        base = read_json_object(folder / "adapter_config.json").get("base_model_name_or_path")
        named = f" ({base})" if base else ""
        fix = (
            f"name its base{named} as the model, and this folder as `positive` or `adapter`; or merge it into its base"
        )
        raise ConfigError("an adapter (adapter_config.json), where a whole model is needed", fix, file=folder)


def weight_files(folder: Path, stem: str = "model") -> list[Path]:
    """The safetensors files that transformers loads from a folder, each checked: a plain name, a regular file, a sane
    header.

    Args:
        folder: a model folder (`stem="model"`) or an adapter folder (`stem="adapter_model"`).

    Raises:
        ConfigError: no safetensors file, only pickled ones, or an index that points outside the folder.
        IntegrityError: a damaged header.
    """
    names = _weight_names(folder, stem)
    files = [_checked(folder, name) for name in names]
    for file in files:
        header(file)
    return files


def _weight_names(folder: Path, stem: str) -> list[str]:
    """What transformers loads: the file that config.json names, else the single file, else those of the index."""
    single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    named = None
    if stem == "model" and (folder / "config.json").is_file():
        named = read_json_object(folder / "config.json").get("transformers_weights")
    if named is not None and not isinstance(named, str):
        raise ConfigError("transformers_weights is not a file name", "get a fresh copy", file=folder / "config.json")
    chosen = named or next((name for name in (single, index) if (folder / name).is_file()), single)
    if chosen.endswith(".index.json"):
        if chosen != Path(chosen).name:
            raise ConfigError(f"config.json names {chosen!r}, which is not a plain file name", "get a fresh copy")
        weight_map = read_json_object(folder / chosen).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ConfigError("weight_map is missing or malformed", "get a fresh copy", file=folder / chosen)
        return sorted(set(weight_map.values()))
    if named is None and not os.path.lexists(folder / single):
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
        if pickled:
            problem = f"holds only pickled weights ({pickled[0]}), which can run code when loaded"
            raise ConfigError(problem, _CONVERT, file=folder)
        raise ConfigError(f"holds no {single}", "name a complete Hugging Face folder", file=folder)
    return [chosen]


def _checked(folder: Path, name: str) -> Path:
    path = folder / name
    if name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
        problem = f"names {name!r} as weights, which is not a plain file name"
        raise ConfigError(problem, "get a fresh copy", file=folder)
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):  # also a name that no file can have
        raise ConfigError(f"{name} is missing", "get a fresh copy", file=folder) from None
    if not stat.S_ISREG(target.stat().st_mode) or not _belongs(target, folder):
        fix = "copy the file that it links to into the folder (cp -L), if you trust it"
        raise ConfigError(f"{name} is not a regular file inside the folder or its cache", fix, file=folder)
    return path


def _belongs(target: Path, folder: Path) -> bool:
    """Whether a file lies in the model's folder or in a cache whose layout links such folders to it.

    Caches keep contents apart from names: the Hub's links `REPOSITORY/snapshots/REVISION/file` to
    `REPOSITORY/blobs/HASH`, others to a folder `blobs` beside one of the folder's parents, and a folder made by
    `hf download --local-dir` may link into the Hub's or ModelScope's cache. Nothing else may leave the folder.
    """
    home = folder.resolve()
    roots = [home]
    if home.parent.name == "snapshots":
        roots.append(home.parent.parent)
    roots += [parent / "blobs" for parent in list(home.parents)[:_CACHE_DEPTH]]
    repository = target.parent.parent
    if target.parent.name == "blobs" and repository.name.startswith("models--"):
        roots.append(repository)
    roots.append(expanded(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope"))
    return any(target.is_relative_to(root) or target.is_relative_to(root.resolve()) for root in roots)


def num_parameters(files: Iterable[Path]) -> int:
    """How many numbers the safetensors files hold, from their headers."""
    return sum(tensor.numel for file in files for tensor in header(file).values())


def fingerprint_model(path: str | Path) -> str:
    """Identity of a model or adapter for stage keys: changes when its weights, config or tokenizer change.

    A folder is hashed: small files whole, a weight file larger than 64 MiB by its size, header and 64 blocks spread
    over it (training changes every block, and hashing 140 GB at each start would take too long). A Hub id stands for
    itself, downloaded or not, so that keys do not change with the state of the cache.

    Raises:
        ConfigError: neither a folder nor a Hub id.
    """
    folder = expanded(path)
    if not folder.is_dir():
        if isinstance(path, Path) or not _HUB_ID.fullmatch(path):
            fix = "check the path; a Hub id looks like owner/name"
            raise ConfigError(f"there is no model folder {str(path)!r}", fix)
        return f"hub:{path}"
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in _HASHED and file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}:".encode())
            with explained(file), file.open("rb") as stream:
                if size <= _WHOLE_BYTES:
                    digest.update(stream.read())
                    continue
                digest.update(stream.read(int.from_bytes(stream.read(8), "little") % MAX_HEADER_BYTES))
                for block in range(64):
                    stream.seek(block * (size - _BLOCK_BYTES) // 63)
                    digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()
