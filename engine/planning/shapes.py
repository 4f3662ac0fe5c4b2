"""Published shapes of models by name, so that a plan needs no download.

Each line comes from the config.json on the model's Hub page; `tests/macpo/test_planning.py` compares the parameter
counts with those that the pages state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import AutoConfig, PretrainedConfig

from macpo.engine.errors import ConfigError
from macpo.engine.model_folders import local_folder
from macpo.engine.models.loading import read_config
from macpo.engine.paths import expanded


class _Shape(NamedTuple):
    kind: str
    page: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool = False
    head_dim: int | None = None
    max_position_embeddings: int = 8192


_SHAPES = {
    "llama-2-7b": _Shape("llama", "meta-llama/Llama-2-7b-hf", 4096, 32, 32, 32, 11008, 32000, False, None, 4096),
    "llama-3-8b": _Shape("llama", "meta-llama/Meta-Llama-3-8B", 4096, 32, 32, 8, 14336, 128256),
    "llama-3-70b": _Shape("llama", "meta-llama/Meta-Llama-3-70B", 8192, 80, 64, 8, 28672, 128256),
    "llama-3.2-1b": _Shape("llama", "meta-llama/Llama-3.2-1B", 2048, 16, 32, 8, 8192, 128256, True, 64),
    "llama-3.2-3b": _Shape("llama", "meta-llama/Llama-3.2-3B", 3072, 28, 24, 8, 8192, 128256, True, 128),
    "mistral-7b": _Shape("mistral", "mistralai/Mistral-7B-v0.3", 4096, 32, 32, 8, 14336, 32768),
    "qwen-2.5-0.5b": _Shape("qwen2", "Qwen/Qwen2.5-0.5B", 896, 24, 14, 2, 4864, 151936, True),
    "qwen-2.5-7b": _Shape("qwen2", "Qwen/Qwen2.5-7B", 3584, 28, 28, 4, 18944, 152064),
    "qwen-2.5-72b": _Shape("qwen2", "Qwen/Qwen2.5-72B", 8192, 80, 64, 8, 29568, 152064),
    "qwen-3-8b": _Shape("qwen3", "Qwen/Qwen3-8B", 4096, 36, 32, 8, 12288, 151936, head_dim=128),
}
NAMES = tuple(_SHAPES)


def config_of(model: str) -> PretrainedConfig:
    """The config of a named shape, of a model folder, or of a Hub id that is cached or can be downloaded.

    Raises:
        ConfigError: `model` is none of them.
    """
    shape = _SHAPES.get(model.lower())
    if shape is None:
        if not expanded(model).is_dir() and "/" not in model:
            fix = f"name a folder or one of {', '.join(NAMES)}"
            raise ConfigError(f"there is no shape and no folder {model!r}", fix)
        folder = local_folder(model)
        return read_config(folder)
    sizes: dict[str, Any] = shape._asdict()
    for name in ("kind", "page", *(["head_dim"] if shape.head_dim is None else [])):
        del sizes[name]
    if shape.kind == "mistral":
        sizes["sliding_window"] = None
    return AutoConfig.for_model(shape.kind, **sizes)
