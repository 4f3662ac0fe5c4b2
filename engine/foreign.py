"""Files of other programs, parsed at one place each into what the rest may rely on: JSON, and safetensors headers.

Whatever stands in such a file, the errors are ours and name it: ConfigError for what describes a model, IntegrityError
for weights, ResourceError for a size that no machine has, found by arithmetic before anything is made of it.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from macpo.engine.errors import ConfigError, IntegrityError, ResourceError, shown

MAX_HEADER_BYTES = 100 * 1024 * 1024  # the limit of the safetensors library itself
MAX_JSON_BYTES = 64 * 1024 * 1024
MAX_LAYERS = 10_000
"""Layers of a model; the largest published ones have some hundred."""
MAX_SIZE = 1 << 31
"""A single size of a model: a width, a vocabulary, a number of positions or heads."""
MAX_PARAMETERS = 10**14
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
_SIZES = (
    *LAYERS,
    *_WIDTHS,
    *("vocab_size", "intermediate_size", "n_inner", "ffn_dim", "head_dim", "rotary_dim", "max_position_embeddings"),
    *("num_attention_heads", "num_key_value_heads", "n_head", "n_positions", "n_ctx", "sliding_window", "q_lora_rank"),
    *("num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
)
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
_COPY = "get a fresh copy"


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a small JSON object from an untrusted folder.

    Raises:
        ConfigError: missing, not a regular file, too large, or not a JSON object.
    """
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_JSON_BYTES:
            raise ConfigError("not a regular file of reasonable size", _COPY, file=path)
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("the file is missing", "name a complete Hugging Face folder", file=path) from None
    except (OSError, ValueError, RecursionError) as error:  # no JSON, no UTF-8, numbers of thousands of digits, …
        raise ConfigError(f"cannot be read as JSON ({error})", _COPY, file=path) from error
    if not isinstance(value, dict):
        raise ConfigError("is not a JSON object", _COPY, file=path)
    return value


class StoredTensor(NamedTuple):
    """What a header says of a tensor: `dtype` in safetensors' words, and its bytes in the data after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name; together they are all of its data, without gap or overlap.

    Raises:
        IntegrityError: truncated or damaged.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise IntegrityError(
                f"header of {length} bytes in a file of {size} bytes", f"{_COPY} of the file", file=file
            )
        try:
            written = json.loads(stream.read(length))
            if not isinstance(written, dict):
                raise ValueError("it is no JSON object")
            found = {name: _tensor(name, entry) for name, entry in written.items() if name != "__metadata__"}
        except (ValueError, RecursionError) as error:
            raise IntegrityError(f"damaged header ({error})", f"{_COPY} of the file", file=file) from error
    end = 0
    for name, tensor in sorted(found.items(), key=lambda item: item[1][2:]):
        if tensor.begin != end:
            problem = f"damaged header ({name} begins at byte {tensor.begin} of the data instead of {end})"
            raise IntegrityError(problem, f"{_COPY} of the file", file=file)
        end = tensor.end
    if end != size - 8 - length:
        problem = f"the file should have {end + 8 + length} bytes but has {size}"
        raise IntegrityError(problem, f"{_COPY} of the file", file=file)
    return found


def _tensor(name: str, entry: Any) -> StoredTensor:
    """Raises ValueError for an entry of another form."""
    parts: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = parts.get("dtype"), parts.get("shape"), parts.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{name} has the dtype {shown(dtype)}, which is none")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has no shape and place of whole numbers")
    tensor = StoredTensor(dtype, tuple(shape), *offsets)
    if tensor.numel * _BITS[dtype] != 8 * (tensor.end - tensor.begin):
        raise ValueError(f"{name} of shape {shown(shape, 80)} and dtype {dtype} has {tensor.end - tensor.begin} bytes")
    return tensor


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) <= 64 and all(type(each) is int and each >= 0 for each in value)


def check_model_config(values: Mapping[str, Any], file: Path) -> None:
    """Check the sizes that a config.json names, before anything is made of them.

    Raises:
        ConfigError: a size that is no whole number, or a part of another type.
        ResourceError: more layers, wider ones or more parameters than fit anywhere.
    """
    for part in chain([values], _parts(values, file)):
        for name in ("model_type", "torch_dtype", "dtype", "transformers_version"):
            kinds = (str, dict) if "dtype" in name else (str,)  # a dtype may be given for each part
            if not isinstance(part.get(name), (*kinds, type(None))):
                raise _odd(part[name], "it is text", file, name)
        sizes = {name: part[name] for name in _SIZES if part.get(name) is not None}
        for name, value in sizes.items():
            each = value if isinstance(value, list) else [value]  # some families give a list, a number for each layer
            if not all(type(size) is int and size >= -1 for size in each):
                raise _odd(value, "it is a whole number", file, name)
            if max(each, default=0) > (MAX_LAYERS if name in LAYERS else MAX_SIZE):
                raise _too_large(f"{name} is {max(each):,}", file, name)
        width = _most(sizes, _WIDTHS)
        total = width * (_most(sizes, ("vocab_size",)) + _most(sizes, LAYERS) * width)
        if total > MAX_PARAMETERS:
            raise _too_large(f"the sizes make at least {total:,} parameters", file, "")


def largest_size(values: Mapping[str, Any]) -> int:
    """The largest size that a checked config.json names."""
    return max((_most(part, _SIZES) for part in (values, *_parts(values, Path()))), default=0)


def _parts(values: Mapping[str, Any], file: Path) -> Iterator[dict[str, Any]]:
    """The configs inside a config, such as the text model's."""
    for name, part in values.items():
        if name.endswith("_config") and part is not None:
            if not isinstance(part, dict):
                raise _odd(part, "it is an object", file, name)
            yield part


def _most(sizes: Mapping[str, Any], names: tuple[str, ...]) -> int:
    found = (sizes.get(name) for name in names)
    return max((size for value in found for size in (value if isinstance(value, list) else [value or 0])), default=0)


def _odd(value: Any, fix: str, file: Path, field: str) -> ConfigError:
    problem = f"the config is not one of a model that can be built (got {shown(value)})"
    return ConfigError(problem, fix, file=file, field=field)


def _too_large(problem: str, file: Path, field: str) -> ResourceError:
    return ResourceError(f"{problem}: no machine holds such a model", _COPY, file=file, field=field)
