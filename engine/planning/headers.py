"""Whether a model folder can be loaded at all, from its config and the headers of its weight files: nothing is loaded.

A folder of any size takes a second or two: the model is built without storage and compared with the headers by name,
shape and number of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from macpo.engine.errors import ConfigError, one_line
from macpo.engine.foreign import LAYERS, check_model_config, header, read_json_object
from macpo.engine.model_folders import local_folder, refuse_adapter, weight_files
from macpo.engine.models.flops import meta_model
from macpo.engine.models.loading import has_mxfp4, read_config, refuse_larger
from macpo.engine.models.support import refuse_unsupported

FIX = "use weights that belong to this config.json"


@dataclass(frozen=True, slots=True)
class Folder:
    """A model folder whose weights fit its config."""

    path: Path
    num_parameters: int
    """That the weight files hold, MXFP4 unpacked."""
    model: PreTrainedModel | None
    """On the meta device; None where the model brings its own code, which is not run here."""

    @property
    def positions(self) -> int | None:
        """Longest sequence in tokens; None where the model sets no limit."""
        config: Any = self.model.config.get_text_config() if self.model is not None else None
        found = getattr(config, "max_position_embeddings", None)
        return found if isinstance(found, int) and found > 0 else None


def inspect(path: str | Path, *, trust_remote_code: bool = False) -> Folder:
    """Look at a model's folder or Hub id as `load_causal_lm` would, without loading a weight.

    Raises:
        ConfigError: not found, an adapter, no config, weights pickled or missing, an architecture that transformers
            does not know or that cannot share prompts, or weights that do not fit the config.
        IntegrityError: a damaged weight file.
    """
    folder = local_folder(path, trust_remote_code=trust_remote_code)
    refuse_adapter(folder)
    written = read_json_object(folder / "config.json")
    check_model_config(written, folder / "config.json")
    entries: dict[str, Sequence[int]] = {}
    for file in weight_files(folder):
        entries |= {name: tensor.shape for name, tensor in header(file).items()}
    held = sum(math.prod(shape) for shape in entries.values())
    if "auto_map" in written and trust_remote_code:
        return Folder(folder, held, None)
    layers = max((written[name] for name in LAYERS if isinstance(written.get(name), int)), default=0)
    if layers > len(entries):  # before anything is built of it
        raise ConfigError(
            f"the config has {layers:,} layers, the weights are {len(entries):,} tensors", FIX, file=folder
        )
    model = _skeleton(folder)
    refuse_larger(model, held, folder)
    if "quantization_config" not in written:  # packed weights have shapes of their own
        _compare(folder, entries, model)
    elif has_mxfp4(written):
        held = sum(parameter.numel() for parameter in model.parameters())
    return Folder(folder, held, model)


def _skeleton(folder: Path) -> PreTrainedModel:
    config = read_config(folder)
    refuse_unsupported(config)
    try:
        return meta_model(config)
    except ConfigError as error:
        (problem,) = error.problems
        raise ConfigError(problem.message, problem.fix, file=folder) from error
    except Exception as error:  # sizes that do not go together fail wherever a layer is made of them
        why = one_line(error)
        raise ConfigError(f"no model can be built from the config ({why})", "get a fresh copy", file=folder) from error


def _compare(folder: Path, entries: Mapping[str, Sequence[int]], model: PreTrainedModel) -> None:
    """Raise ConfigError where a tensor has another size than the config says, or is nowhere in the files.

    Some architectures are stored under other names, or several tensors as one. So what is missing by name counts only
    where the tensors that are left over are too few to be it.
    """
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    prefix = f"{model.base_model_prefix}."
    found: dict[str, str] = {}
    for name in wanted:
        spellings = (name, name.removeprefix(prefix), prefix + name)
        stored = next((spelling for spelling in spellings if spelling in entries), None)
        if stored is not None:
            found[name] = stored
    for name, stored in found.items():
        if math.prod(entries[stored]) != math.prod(wanted[name]):
            problem = f"{stored} is {_shape(entries[stored])} in the weights, {_shape(wanted[name])} by the config"
            raise ConfigError(problem, FIX, file=folder)
    missing = [name for name in wanted if name not in found]
    used = set(found.values())
    left = sum(math.prod(shape) for stored, shape in entries.items() if stored not in used)
    if sum(math.prod(wanted[name]) for name in missing) > left:
        raise ConfigError(f"{len(missing)} weights are missing, first {missing[0]}", FIX, file=folder)


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
