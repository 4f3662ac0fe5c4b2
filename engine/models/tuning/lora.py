"""LoRA adapters in peft's layout: created from a seed, loaded, and saved with the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
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
from transformers.pytorch_utils import Conv1D

from macpo.engine.config import FullSettings, LoraSettings
from macpo.engine.distributed.failures import is_out_of_memory
from macpo.engine.errors import ConfigError, IntegrityError, one_line
from macpo.engine.foreign import header
from macpo.engine.model_folders import local_folder, weight_files
from macpo.engine.models.tuning.adapter_rules import base_copies, check_copies, check_layers, read_config
from macpo.engine.models.tuning.text_path import outside_pattern, outside_text

_ADAPTER = "default"


def new_adapter(model: PreTrainedModel, settings: LoraSettings, *, seed: int) -> PeftModel:
    """Wrap a model with a fresh adapter on its text path: B = 0, A uniform as in peft (Kaiming with a = sqrt 5).

    Each matrix's numbers depend on `seed` and its own name only, never on device or module order.

    Raises:
        ConfigError: no linear module has a target's name, or another kind of module has.
    """
    targets = settings.target_modules
    alpha: Any = int(settings.alpha) if settings.alpha.is_integer() else settings.alpha  # an int where readers want one
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        lora_dropout=0.0,
        bias="none",
        exclude_modules=outside_pattern(model),
        task_type=TaskType.CAUSAL_LM,
    )
    outside = re.compile(config.exclude_modules) if isinstance(config.exclude_modules, str) else None
    names = [f".{name}" for name, _ in model.named_modules() if outside is None or not outside.fullmatch(name)]
    named = [] if isinstance(targets, str) else targets
    lost = [target for target in named if not any(name.endswith(f".{target}") for name in names)]
    if lost:
        raise _cannot_target(model, ", ".join(lost))
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
        ConfigError: not an adapter that is used exactly (see `adapter_rules`), pickled, or of another base.
        IntegrityError: damaged or incomplete weights.
    """
    folder = local_folder(path, kind="adapter")
    config = read_config(folder)
    config.base_model_name_or_path = model.name_or_path  # where the base came from here; peft warns of any other name
    (file,) = weight_files(folder, "adapter_model")
    wrapped = _wrap(model, config, folder)
    copies = base_copies(wrapped, _shapes(file), _own_weights(wrapped), folder)
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise IntegrityError(f"cannot be read ({error})", "get a fresh copy", file=file) from error
    check_copies(tensors, copies, folder)
    set_peft_model_state_dict(wrapped, {name: tensor for name, tensor in tensors.items() if name not in copies})
    return wrapped


def check_adapter(model: PreTrainedModel, path: str | Path, tuning: LoraSettings | FullSettings | None = None) -> None:
    """Check an adapter for a model by its config and the names and shapes of its weights alone.

    Args:
        model: the base, which may be on the meta device; it is wrapped in place.
        tuning: how training goes on from the adapter; None where it is only used.

    Raises:
        ConfigError: as `load_adapter`; or training cannot go on from it under these settings.
    """
    folder = local_folder(path, kind="adapter")
    (file,) = weight_files(folder, "adapter_model")
    wrapped = _wrap(model, read_config(folder), folder)
    base_copies(wrapped, _shapes(file), _own_weights(wrapped), folder)
    if isinstance(tuning, LoraSettings):
        check_same_shape(wrapped, tuning, str(path))
    elif tuning is not None:
        check_mergeable(wrapped, str(path))


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in header(file).items()}


def _own_weights(wrapped: PeftModel) -> dict[str, Tensor]:
    """The adapter's own weights by their names in a file."""
    found: dict[str, Tensor] = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return found


def _wrap(model: PreTrainedModel, config: LoraConfig, file: str | Path = "") -> PeftModel:
    try:
        with warnings.catch_warnings():
            # peft asks transformers for an attribute that was renamed, and warns of tied layers, which `merged` unties
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings", category=UserWarning)
            wrapped = get_peft_model(model, config)
    except ValueError as error:
        why = one_line(error, 160)
        raise _cannot_target(model, str(config.target_modules), why) from error
    except Exception as error:  # peft works with whatever an adapter's config says
        if is_out_of_memory(error):
            raise
        why = one_line(error, 160)
        raise ConfigError(f"the adapter's config is not understood ({why})", "use peft's layout", file=file) from error
    assert isinstance(wrapped, PeftModel)
    check_layers(wrapped, file)
    return wrapped.eval()


def _cannot_target(model: PreTrainedModel, targets: str, why: str = "") -> ConfigError:
    problem = f"LoRA cannot target {targets}" + (f" ({why})" if why else "")
    fix = f"choose from {', '.join(sorted(_linears(model)))}, or all-linear"
    return ConfigError(problem, fix, field="target_modules")


def merged(wrapped: PeftModel, path: str | Path) -> PreTrainedModel:
    """The base with its adapter merged in, as one model; the wrapper and its base are used up.

    An output layer that shares the embedding's weight gets one of its own where an adapter sits on it, because the
    embedding stays as it is.

    Raises:
        ConfigError: the adapter cannot be merged.
    """
    check_mergeable(wrapped, path)
    base: Any = wrapped.get_base_model()
    head = base.get_output_embeddings()
    if isinstance(head, LoraLayer):
        layer: Any = head.get_base_layer()
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")  # peft unties the config, as it should
        model: PreTrainedModel = wrapped.merge_and_unload()
    return model


def check_mergeable(wrapped: PeftModel, path: str | Path) -> None:
    """Raise ConfigError if the adapter has biases that a layer of the base has no place for."""
    for name, module in wrapped.get_base_model().named_modules():
        biased = isinstance(module, LoraLayer) and module.lora_bias.get(_ADAPTER)
        if biased and getattr(module.get_base_layer(), "bias", None) is None:
            problem = f"the adapter's bias (lora_bias) cannot be merged into {name}, which has none"
            fix = "use it as an adapter: `tuning: {type: lora}`, export without --merge"
            raise ConfigError(problem, fix, file=path)


def check_same_shape(wrapped: PeftModel, settings: LoraSettings, path: str) -> None:
    """Raise ConfigError if an adapter that continues training differs from the settings."""
    config: Any = wrapped.peft_config[_ADAPTER]
    got, asked = (config.r, float(config.lora_alpha)), (settings.rank, float(settings.alpha))
    if got != asked:
        problem = f"the adapter has rank {got[0]} and alpha {got[1]:g}, the settings say {asked[0]} and {asked[1]:g}"
        raise ConfigError(problem, "set rank and alpha as the adapter has them", file=path)
    base: Any = wrapped.get_base_model()
    have = {name.split(".")[-1] for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    asked_for = settings.target_modules
    want = _linears(base) if isinstance(asked_for, str) else {name.split(".")[-1] for name in asked_for}
    if have != want:
        says = asked_for if isinstance(asked_for, str) else ", ".join(asked_for)
        raise ConfigError(
            f"the adapter sits on {', '.join(sorted(have))}, the settings say {says}",
            "set target_modules as the adapter has them",
            file=path,
        )


def _linears(base: PreTrainedModel) -> set[str]:
    """The names that `all-linear` stands for: those of every linear layer on the text path but the output layer."""
    outside, head = outside_text(base), base.get_output_embeddings()
    within = {id(module) for name in outside for module in base.get_submodule(name).modules()} | {id(head)}
    layers = [(name, m) for name, m in base.named_modules() if isinstance(m, (nn.Linear, Conv1D, LoraLayer))]
    layers = [(name, m) for name, m in layers if not re.search(r"\.(base_layer|lora_[AB])\b", name)]
    return {name.split(".")[-1] for name, module in layers if id(module) not in within}


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
