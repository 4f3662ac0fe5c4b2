"""Hugging Face models loaded from checked folders. safetensors only, no pickle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
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
from macpo.engine.foreign import check_model_config, header, largest_size, read_json_object
from macpo.engine.model_folders import local_folder, num_parameters, refuse_adapter, weight_files
from macpo.engine.models.support import refuse_unsupported

_SUSPICIOUS = 1 << 20  # a size of a config from which on the model is counted before it is made


_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that most numbers of a model folder have on disk; float32 if none has one that models compute in."""
    counts: Counter[torch.dtype] = Counter()
    for file in weight_files(folder):
        for tensor in header(file).values():
            if tensor.dtype in _STORED:
                counts[_STORED[tensor.dtype]] += tensor.numel
    return counts.most_common(1)[0][0] if counts else torch.float32


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
