"""Which adapters are used exactly as their own trainer meant them; every other one is refused by name.

peft writes some forty kinds of adapters, and LoRA itself has over thirty options. Some change weights that the base
shares with other policies, some were trained on a base that their initialisation had rewritten, some need a forward of
their own. `read_config` allows what is computed exactly and names the rest, from adapter_config.json alone;
`check_layers` and `base_copies` judge the layers and the weights; `check_forward` a peft model that is given as such.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from macpo.engine.errors import ConfigError, one_line, shown
from macpo.engine.foreign import read_json_object
from macpo.engine.models.head import is_plain

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
"""What peft writes before the base's own name of a module."""
MERGE = (
    "merge it with peft, PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload().save_pretrained(FOLDER), and name "
    "FOLDER (with the base's tokenizer files) as a whole model instead"
)
_UNTIE = (
    "first give the base an output layer of its own, base.lm_head.weight = nn.Parameter(base.lm_head.weight.clone()); "
)
_TRAIN_LORA = "train a plain LoRA adapter instead: peft cannot merge this one into a whole model"
_CONVERT = (
    "save it where it was trained with save_pretrained(FOLDER, path_initial_model_for_weight_conversion=INITIAL), "
    "which makes a plain LoRA of it, or merge it there with merge_and_unload"
)
_UNMERGEABLE = re.compile(r".*PROMPT.*|.*TUNING|CPT|CARTRIDGE|LILY|POLY|XLORA|SHADOW")
_MERGEABLE_TUNING = {"LN_TUNING", "SUPERTUNING"}
_REPEATABLE_INITS = {"pissa", "olora", "mica"}
"""Initialisations that peft repeats from the base alone when it loads the adapter, so that it can merge it."""
_EXACT_INITS = {"true", "false", "gaussian", "orthogonal", "eva"}
"""Initialisations that leave the base as it is; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, …) train on another
base than the one on disk, or with another forward."""
_MAX_REPEATS = 6
"""Repetitions in a pattern for names of modules; peft and its users need up to five."""
_FREE = """
    auto_mapping base_model_name_or_path revision inference_mode r target_modules exclude_modules
    lora_alpha lora_dropout fan_in_fan_out use_rslora layers_to_transform layers_pattern rank_pattern alpha_pattern
    megatron_core loftq_config eva_config corda_config lora_ga_config use_dora qalora_group_size runtime_config
    lora_bias peft_version peft_type task_type init_lora_weights
"""
"""Fields of LoraConfig that may have any value: they hold here as in peft, or say nothing of the weights."""
_REFUSED = {
    "bias": ("trains biases of the base (bias: {value})", MERGE),
    "modules_to_save": ("replaces whole modules of the base (modules_to_save: {value})", MERGE),
    "trainable_token_indices": ("replaces rows of the embeddings (trainable_token_indices)", MERGE),
    "ensure_weight_tying": ("changes tied embeddings together (ensure_weight_tying)", _TRAIN_LORA),
    "target_parameters": ("sits on parameters instead of linear layers (target_parameters: {value})", MERGE),
    "layer_replication": ("repeats layers of the base (layer_replication)", _TRAIN_LORA),
    "alora_invocation_tokens": ("depends on the text (alora_invocation_tokens)", _TRAIN_LORA),
    "arrow_config": ("routes between adapters (arrow_config)", _TRAIN_LORA),
}


_Rank = Annotated[int, Field(ge=1, le=1 << 16)]
_Number = Annotated[float, Field(allow_inf_nan=False)]


class _Written(BaseModel):
    """The types of what an adapter_config.json says; what it leaves out is peft's default."""

    model_config = ConfigDict(extra="allow", strict=True)

    peft_type: str | None = None
    task_type: str | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: _Rank = 8
    lora_alpha: _Number = 8
    lora_dropout: _Number = 0
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, _Number] | None = None
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    inference_mode: bool = False
    qalora_group_size: int = 16
    init_lora_weights: bool | str | None = True
    auto_mapping: dict[str, Any] | None = None
    loftq_config: dict[str, Any] | None = None
    eva_config: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    lora_ga_config: dict[str, Any] | None = None

    @property
    def patterns(self) -> list[str]:
        """What peft takes for regular expressions."""
        targets = [self.target_modules, self.exclude_modules, self.layers_pattern]
        named = [*(self.rank_pattern or ()), *(self.alpha_pattern or ())]
        return [text for text in targets if isinstance(text, str)] + named


def _is_quick(pattern: str) -> bool:
    """Whether no search with the pattern takes exponential time, or that of many repetitions after one another."""
    try:
        tree = re._parser.parse(pattern)  # type: ignore[attr-defined]
    except (re.error, RecursionError, OverflowError):
        return True  # compiling it says what is wrong
    return _repeats(tree, False) <= _MAX_REPEATS


def _repeats(tree: Any, inside: bool) -> int:
    """How many repetitions a parsed pattern has; more than are allowed where one is inside another."""
    found = 0
    for operation, argument in tree:
        repeats = str(operation).endswith("_REPEAT") and int(argument[1]) > 1
        found += repeats
        if inside and (repeats or str(operation) == "BRANCH"):
            return _MAX_REPEATS + 1
        for part in argument if isinstance(argument, tuple | list) else ():
            for branch in part if isinstance(part, list) else [part]:
                if isinstance(branch, re._parser.SubPattern):  # type: ignore[attr-defined]
                    found += _repeats(branch, inside or repeats)
    return found


def _written(values: Mapping[str, Any], file: Path) -> _Written:
    try:
        found = _Written.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        problem = f"the adapter's config is not understood ({first['msg']}, got {shown(first['input'])})"
        field = str(first["loc"][0]) if first["loc"] else ""
        raise ConfigError(problem, "use peft's layout", file=file, field=field) from error
    for pattern in found.patterns:
        if not _is_quick(pattern):
            problem = f"the pattern {shown(pattern)} may take for ever"
            raise ConfigError(problem, "name the modules in a list", file=file, field="target_modules")
    return found


def read_config(folder: Path) -> LoraConfig:
    """The adapter's configuration, as it is loaded here: without dropout, its weights read and not drawn.

    Raises:
        ConfigError: missing or malformed; or a kind or option of adapter that is not computed exactly, with its name.
    """
    file = folder / CONFIG
    values = read_json_object(file)
    kind = str(values.get("peft_type")).upper()
    if kind != "LORA":
        merges = kind in _MERGEABLE_TUNING or not _UNMERGEABLE.fullmatch(kind)
        raise ConfigError(f"a {kind} adapter: only LoRA is supported", MERGE if merges else _TRAIN_LORA, file=folder)
    _written(values, file)
    init = str(values.get("init_lora_weights", True)).lower()
    if init not in _EXACT_INITS:
        problem = (
            f"the adapter was trained on a base that its initialisation {init} had changed, or with its own forward"
        )
        raise ConfigError(problem, MERGE if init in _REPEATABLE_INITS else _CONVERT, file=folder)
    if values.get("task_type") not in (None, "CAUSAL_LM"):
        problem = f"the adapter was trained for {values['task_type']}, not for a causal LM (task_type)"
        raise ConfigError(problem, "use an adapter of a causal LM", file=folder)
    free = set(_FREE.split())
    for name, value in values.items():
        if name not in free and value not in (None, False, [], {}, "none"):
            problem, fix = _REFUSED.get(name, ("has an option that is not supported ({name})", MERGE))
            raise ConfigError(f"the adapter {problem.format(name=name, value=value)}", fix, file=folder)
    known = {name: value for name, value in values.items() if name in LoraConfig.__dataclass_fields__}
    try:
        config = LoraConfig(**known)
    except Exception as error:  # peft's own checks raise whatever they like
        why = one_line(error, 160)
        raise ConfigError(f"the adapter's config is not understood ({why})", "use peft's layout", file=file) from error
    config.lora_dropout = 0.0
    config.init_lora_weights = True  # the weights come from the file; other values may read the base
    config.inference_mode = False
    return config


def check_layers(wrapped: PeftModel, file: str | Path = "") -> None:
    """Raise ConfigError if an adapter sits on something else than a linear layer, or oddly on the output layer."""
    config: Any = wrapped.active_peft_config
    if config.target_parameters:  # peft puts adapters of separate experts on stacked ones
        experts = ", ".join(sorted(config.target_parameters))
        raise ConfigError(f"the adapter sits on stacked experts ({experts})", MERGE, file=file, field="target_modules")
    base: Any = wrapped.get_base_model()
    untie = _UNTIE if base.config.get_text_config().tie_word_embeddings else ""
    head = base.get_output_embeddings()
    for name, module in base.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if isinstance(module.get_base_layer(), nn.Embedding):
            odd = f"{name}, an embedding and no linear layer"
        elif module is head and not is_plain(module):
            odd = f"the output layer {name}, and is not plain LoRA"
        else:
            continue
        fix = f"leave {name.rpartition('.')[2]} out of target_modules; where it is trained already, {untie}{MERGE}"
        raise ConfigError(f"the adapter sits on {odd}", fix, file=file, field="target_modules")


def base_copies(
    wrapped: PeftModel, shapes: Mapping[str, Sequence[int]], expected: Mapping[str, Tensor], file: Path
) -> dict[str, Tensor]:
    """The names in an adapter's file that are copies of base weights, each with the base's own weight.

    peft adds a copy of the embeddings and the output layer where these are adapted or the vocabulary was resized.

    Args:
        shapes: of the tensors in the file.
        expected: the adapter's own weights by their names in a file.

    Raises:
        ConfigError: another vocabulary than the base's, or weights that do not belong to the base.
    """
    base: dict[str, Tensor] = dict(wrapped.get_base_model().named_parameters(remove_duplicate=False))
    copies = {name: base[name.removeprefix(PREFIX)] for name in shapes if name.removeprefix(PREFIX) in base}
    for name, weight in copies.items():
        if list(weight.shape) != list(shapes[name]):
            where = name.removeprefix(PREFIX).replace(".base_layer", "")
            problem = f"the adapter holds {where} of shape {list(shapes[name])}, the base has {list(weight.shape)}"
            resize = f"base.resize_token_embeddings({shapes[name][0]}) as where it was trained, then {MERGE}"
            raise ConfigError(f"{problem}: its vocabulary was resized", resize, file=file)
    odd = sorted(expected.keys() ^ (shapes.keys() - copies.keys()))
    odd += [f"{name} of shape {list(shapes[name])}" for name in sorted(expected.keys() & shapes.keys())
            if list(expected[name].shape) != list(shapes[name])]  # fmt: skip
    if odd:
        problem = f"{len(odd)} adapter weights do not match the base model, first {odd[0]}"
        experts = any(".experts." in name for name in odd)
        fix = MERGE if experts else "load it on the base model that it was trained on"
        raise ConfigError(problem, fix, file=file)
    return copies


def check_copies(tensors: Mapping[str, Tensor], copies: Mapping[str, Tensor], file: Path) -> None:
    """Raise ConfigError if a base weight's copy in the adapter's file differs from the base, beyond its dtype."""
    for name, weight in copies.items():
        own, base = tensors[name], weight.detach().to("cpu")
        if not (own.to(base.dtype).equal(base) or base.to(own.dtype).equal(own)):
            where = name.removeprefix(PREFIX).replace(".base_layer", "")
            raise ConfigError(f"the adapter holds a changed copy of the base's {where}", MERGE, file=file)


def check_forward(model: nn.Module) -> None:
    """Raise ConfigError for a peft model whose adapter is not all inside the layers of its base.

    Packed rows and decoding go through the base itself: what peft's wrapper adds to its forward would be left out.
    """
    if not isinstance(model, PeftModel):
        return
    for name, config in model.peft_config.items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if config.is_prompt_learning:
            raise ConfigError(f"adapter {name!r} is {kind}: its virtual tokens are not supported", "use LoRA")
        if getattr(config, "alora_invocation_tokens", None):
            raise ConfigError(f"adapter {name!r} is an activated LoRA, which reads the padded ids", "use plain LoRA")
        own_forward = getattr(type(model.base_model), "forward", None) is not BaseTuner.forward
        if own_forward and kind != "ADALORA":  # AdaLoRA's only adds a term to the model's own loss
            raise ConfigError(f"adapter {name!r} is {kind}: its own forward is not supported", "use LoRA")
