"""LoRA adapters in peft's layout: created from a seed, loaded, and saved with the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from macpo.engine.config import LoraSettings
from macpo.engine.errors import ConfigError, IntegrityError
from macpo.engine.models.loading import local_folder, read_json_object, weight_files

_ADAPTER = "default"


def new_adapter(model: PreTrainedModel, settings: LoraSettings, *, seed: int) -> PeftModel:
    """Wrap a model with a fresh adapter: B = 0, A uniform as in peft (Kaiming with a = sqrt 5), drawn by `seed`.

    Each matrix's numbers depend on the seed and its own name only, never on device or module order.

    Raises:
        ConfigError: no linear module has a target's name.
    """
    targets = settings.target_modules
    alpha: Any = int(settings.alpha) if settings.alpha.is_integer() else settings.alpha  # an int where readers want one
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        lora_dropout=0.0,
        bias="none",
        task_type=TaskType.CAUSAL_LM,
    )
    wrapped = _wrap(model, config)
    for name, module in wrapped.named_modules():
        if isinstance(module, LoraLayer) and _ADAPTER in module.lora_A:
            weight: Any = module.lora_A[_ADAPTER].weight
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            noise = torch.rand(weight.shape, generator=generator) * 2 - 1
            with torch.no_grad():
                weight.copy_(noise / math.sqrt(weight.shape[1]))
    return wrapped


def load_adapter(model: PreTrainedModel, path: str | Path) -> PeftModel:
    """Wrap a model with the adapter of a folder or Hub id; its dropout is set to 0.

    Raises:
        ConfigError: not a LoRA adapter, pickled, or for another architecture.
        IntegrityError: damaged or incomplete weights.
    """
    folder = local_folder(path, kind="adapter")
    read_json_object(folder / "adapter_config.json")
    (file,) = weight_files(folder, "adapter_model")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        fix = "use peft's layout"
        raise ConfigError(f"the adapter's config is not understood ({error})", fix, file=path) from error
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"a {config.peft_type} adapter", "only LoRA adapters are supported", file=path)
    config.lora_dropout = 0.0
    config.init_lora_weights = True  # the weights come from the file; other values may read or change the base
    config.inference_mode = False
    config.base_model_name_or_path = model.name_or_path  # where the base came from here; peft warns of any other name
    wrapped = _wrap(model, config)
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise IntegrityError(f"cannot be read ({error})", "get a fresh copy", file=file) from error
    expected = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    if expected != set(tensors):
        odd = sorted(expected ^ set(tensors))
        fix = "load it on the base model that it was trained on"
        raise ConfigError(f"{len(odd)} adapter weights do not match the base model, first {odd[0]}", fix, file=path)
    try:
        set_peft_model_state_dict(wrapped, tensors)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError(f"the adapter does not fit the base model ({why})", "use its own base", file=path) from error
    return wrapped


def _wrap(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    try:
        with warnings.catch_warnings():
            # peft asks transformers for an attribute that was renamed; nothing that a user could act on
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            wrapped = get_peft_model(model, config)
    except ValueError as error:
        linears = sorted({name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        problem = f"LoRA cannot target {config.target_modules} ({' '.join(str(error).split())[:160]})"
        fix = f"choose from {', '.join(linears)}, or all-linear"
        raise ConfigError(problem, fix, field="target_modules") from error
    assert isinstance(wrapped, PeftModel)
    return wrapped.eval()


def check_same_shape(wrapped: PeftModel, settings: LoraSettings, path: str) -> None:
    """Raise ConfigError if an adapter that continues training differs from the settings."""
    config: Any = wrapped.peft_config[_ADAPTER]
    got, asked = (config.r, float(config.lora_alpha)), (settings.rank, float(settings.alpha))
    if got != asked:
        problem = f"the adapter has rank {got[0]} and alpha {got[1]:g}, the settings say {asked[0]} and {asked[1]:g}"
        raise ConfigError(problem, "set rank and alpha as the adapter has them", file=path)
    if not isinstance(settings.target_modules, str):
        have = {name.split(".")[-1] for name, module in wrapped.named_modules() if isinstance(module, LoraLayer)}
        if have != {name.split(".")[-1] for name in settings.target_modules}:
            raise ConfigError(
                f"the adapter sits on {', '.join(sorted(have))}, the settings say {', '.join(settings.target_modules)}",
                "set target_modules as the adapter has them",
                file=path,
            )


def save_adapter(
    wrapped: PeftModel, out_dir: Path, *, base_name: str, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write adapter_config.json and adapter_model.safetensors as peft and vLLM read them, the same bytes every time.

    Args:
        base_name: the base model's name or path to record in the config.
        state: the whole adapter weights by their names in `wrapped`, if its own are shards.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = wrapped.peft_config[_ADAPTER].to_dict()
    config |= {"base_model_name_or_path": base_name, "inference_mode": True}
    # peft keeps names in sets, whose order differs between processes
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(config.items())}
    (out_dir / "adapter_config.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    tensors = get_peft_model_state_dict(wrapped, state_dict=state, save_embedding_layers=False)
    packed = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    save_file(packed, out_dir / "adapter_model.safetensors", metadata={"format": "pt"})
