"""Model and adapter folders: found, checked as untrusted input, and loaded. safetensors only, no pickle."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import Mxfp4Config

from macpo.engine.config import Quantization
from macpo.engine.distributed.failures import is_out_of_memory
from macpo.engine.errors import ConfigError, ResourceError, one_line
from macpo.engine.files import explained
from macpo.engine.foreign import MAX_HEADER_BYTES, check_model_config, header, largest_size, read_json_object
from macpo.engine.models.support import refuse_unsupported
from macpo.engine.opening import refuse_special
from macpo.engine.paths import expanded

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]
_HASHED = {".safetensors", ".json", ".model", ".jinja", ".txt"}
_WHOLE_BYTES = 64 * 1024 * 1024
_BLOCK_BYTES = 64 * 1024
_CACHE_DEPTH = 4  # hub/models/OWNER/NAME: how far above a folder the contents of its cache may lie
_SUSPICIOUS = 1 << 20  # a size of a config from which on the model is counted before it is made
_CONVERT = "convert it once with model.save_pretrained(FOLDER, safe_serialization=True) where you trust the file"


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


_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that most numbers of a model folder have on disk; float32 if none has one that models compute in."""
    counts: Counter[torch.dtype] = Counter()
    for file in weight_files(folder):
        for tensor in header(file).values():
            if tensor.dtype in _STORED:
                counts[_STORED[tensor.dtype]] += tensor.numel
    return counts.most_common(1)[0][0] if counts else torch.float32


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


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """torch.float32 from "float32" and so on."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"{dtype!r} is not a floating-point type", "use float32 or bfloat16")
    return found


def read_config(folder: Path) -> PretrainedConfig:
    """The config of a model folder. Raises ConfigError where transformers does not take it; no code of it is run."""
    written = read_json_object(folder / "config.json")
    check_model_config(written, folder / "config.json")
    try:
        with quiet_transformers():
            found: PretrainedConfig = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # a config's own checks raise types of several libraries
        why = one_line(error)
        remote = "auto_map" in written
        fix = "set trust_remote_code if you trust its code" if remote else "use one that transformers knows"
        raise ConfigError(f"the config is not one of a model that can be built ({why})", fix, file=folder) from error
    return found


def load_causal_lm(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    quantization: Quantization = "none",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal LM from a folder or Hub id, in eval mode.

    Args:
        path: Hugging Face layout with safetensors weights.
        dtype: dtype of the loaded weights; with quantization, of those that stay whole and of the computation.
        quantization: "nf4" loads the linear layers, but not the head, in 4 bits. MXFP4 weights (gpt-oss) are unpacked,
            which is exact.
        trust_remote_code: run the model's own Python; only the user can turn it on, never the files.

    Raises:
        ConfigError: not found, pickled, unknown or unsupported architecture, weights that do not fit the config, or no
            bitsandbytes.
        IntegrityError: a damaged weight file.
    """
    folder = local_folder(path, trust_remote_code=trust_remote_code)
    refuse_adapter(folder)
    config = read_json_object(folder / "config.json")
    check_model_config(config, folder / "config.json")
    own_code = trust_remote_code and "auto_map" in config
    if config.get("model_type") in CONFIG_MAPPING and not own_code:  # the probe judges a model's own code
        found = read_config(folder)
        refuse_unsupported(found)
        _refuse_larger_config(config, found, num_parameters(weight_files(folder)), folder)
    weight_files(folder)
    packed = has_mxfp4(config)
    if packed and quantization == "nf4":
        problem = "the weights are MXFP4 already, which quantization nf4 would pack a second time"
        raise ConfigError(problem, "set quantization to none, which unpacks them", field="tuning.quantization")
    options = _in_4_bits(as_dtype(dtype), torch.device(device)) if quantization == "nf4" else {}
    if packed:  # packed experts have no gradient with respect to their inputs, and other kernels on every device
        options = {"quantization_config": Mxfp4Config(dequantize=True)}
    remote = "auto_map" in config and not trust_remote_code
    fix = "set trust_remote_code if you trust its code" if remote else "use a causal LM that transformers knows"
    misfit = "use weights that belong to this config.json"
    options |= {"dtype": as_dtype(dtype), "trust_remote_code": trust_remote_code}
    model = from_folder(AutoModelForCausalLM, folder, path, fix, misfit, **options)
    if packed:  # else transformers would save the unpacked weights under the packed ones' names
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [each for each in conversions if not _unpacks(each)]
    ready: PreTrainedModel = (model if "device_map" in options else model.to(device)).eval()
    for module in ready.modules() if quantization == "nf4" else ():
        layer: Any = module
        if type(layer).__name__ == "Linear4bit":
            layer.quant_state = layer.weight.quant_state  # FSDP2 keeps the weight's numbers, not what hangs on it
            layer.support_avx512bf16_for_cpu = False  # it would repack the shared weight when first scored with
    return ready


def from_folder(kind: Any, folder: Path, path: str | Path, fix: str, misfit: str, **options: Any) -> Any:
    """A model by one of transformers' Auto classes, from safetensors alone and with every weight that it needs.

    Raises:
        ConfigError: of `path`, with `fix`, or with `misfit` where weights do not belong to the config.
    """
    try:
        with quiet_transformers():
            loaded: Any = kind.from_pretrained(
                str(folder),
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # the check below names them
                **options,
            )
    except Exception as error:  # transformers' own checks raise whatever they like
        if is_out_of_memory(error) or isinstance(error, MemoryError):
            raise
        why = one_line(error, 300)
        raise ConfigError(f"cannot be loaded by {kind.__name__} ({why})", fix, file=path) from error
    model, report = loaded
    lost = sorted(report["missing_keys"]) + sorted(str(key[0]) for key in report["mismatched_keys"])
    if lost:
        problem = f"{len(lost)} weights are missing or of the wrong shape, first {lost[0]}"
        raise ConfigError(problem, misfit, file=path)
    return model


def _refuse_larger_config(written: Mapping[str, Any], config: PretrainedConfig, held: int, folder: Path) -> None:
    """As `refuse_larger`, for the model of a config, which is built without storage where it could be large."""
    if largest_size(written) < _SUSPICIOUS:
        return
    try:
        with torch.device("meta"), quiet_transformers():
            made: Any = AutoModelForCausalLM.from_config(config)
    except Exception:  # loading says why
        return
    refuse_larger(made, held, folder)


def refuse_larger(model: torch.nn.Module, held: int, folder: Path) -> None:
    """Raise ResourceError where a config's model is far larger than its weights, which loading would make up.

    Args:
        model: on the meta device.
        held: how many numbers the weight files hold; packed ones hold up to eight in one.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    if total > 8 * max(held, _SUSPICIOUS):
        problem = f"the config's model has {total:,} parameters, the weights hold {held:,}"
        raise ResourceError(problem, "use weights that belong to this config.json", file=folder)


def has_mxfp4(config: Mapping[str, Any]) -> bool:
    """Whether a model with this config.json has MXFP4 weights, which are unpacked when they are loaded."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "mxfp4"


def _unpacks(conversion: Any) -> bool:
    return any(name.endswith("_blocks") for name in conversion.source_patterns)


def _in_4_bits(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Keywords of `from_pretrained` for NF4 (arXiv 2305.14314), stored as bfloat16, which FSDP2 can shard."""
    missing = [name for name in ("bitsandbytes", "accelerate") if find_spec(name) is None]
    if missing:
        problem = f"quantization nf4 needs {' and '.join(missing)}, which is not installed"
        fix = "pip install 'macpo[quant]', or set quantization to none"
        raise ConfigError(problem, fix, field="tuning.quantization")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def embedding_rows(model: PreTrainedModel) -> int:
    """How many token ids the model has an embedding for."""
    table: Any = model.get_input_embeddings()
    return int(getattr(table, "num_embeddings", table.weight.shape[0]))  # the weight may be one rank's part


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence progress bars and load reports of transformers; errors are still raised."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
