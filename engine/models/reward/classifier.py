"""Any Hugging Face sequence classifier as a scorer of token rows: loaded as untrusted input, one number a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from macpo.engine.distributed.failures import is_out_of_memory, make_room
from macpo.engine.distributed.world import World
from macpo.engine.errors import ConfigError, NumericsError, ResourceError, Stopped, one_line
from macpo.engine.foreign import check_model_config, header, read_json_object
from macpo.engine.model_folders import local_folder, refuse_adapter, weight_files
from macpo.engine.models.loading import as_dtype, from_folder, quiet_transformers, read_config

NO_HEAD = "name a reward model (a ...ForSequenceClassification), or train one: macpo train-reward RECIPE"
ENDING = "reward_ending"
"""Entry of config.json that reward models trained here have: they read a response up to its end token, no further."""


@dataclass(frozen=True, slots=True, eq=False)
class Classifier:
    """A loaded sequence classifier and the one of its outputs that is the score."""

    model: PreTrainedModel
    column: int
    """Index of the label whose logit is the score."""

    @property
    def pad_id(self) -> int | None:
        """The padding token that the model itself looks for; None where it knows none."""
        found = self.model.config.get_text_config().pad_token_id
        return None if found is None else int(found)

    @torch.no_grad()
    def scores(
        self, rows: Sequence[list[int]], *, batch_tokens: int, should_stop: Callable[[], bool] | None = None
    ) -> list[float | None]:
        """Score every row of token ids by the model's own forward.

        Rows of similar length share a right-padded batch, which a causal model reads as it does a single row. A model
        without a padding token gets single rows.

        Args:
            rows: token ids, each of at least one token.
            batch_tokens: bound on the tokens of a batch with its padding; a longer row has a batch of its own. A batch
                that does not fit in memory is halved.
            should_stop: called before each batch; the rows from there on are None.

        Returns:
            A float32 logit by row.

        Raises:
            NumericsError: a score that is not finite. ResourceError: one row does not fit in memory.
        """
        found: list[float | None] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
        todo: list[list[int]] = []
        for i in order:
            fits = self.pad_id is not None and todo and (len(todo[-1]) + 1) * len(rows[todo[-1][0]]) <= batch_tokens
            if fits:
                todo[-1].append(i)
            else:
                todo.append([i])
        todo.reverse()
        while todo and not (should_stop is not None and should_stop()):
            batch = todo.pop()
            scores = self._tried([rows[i] for i in batch])
            if scores is not None:
                for i, score in zip(batch, scores, strict=True):
                    found[i] = score
            elif make_room():
                todo.append(batch)
            elif len(batch) > 1:
                half = len(batch) // 2
                todo += [batch[half:], batch[:half]]
            else:
                fix = "lower the scorer's max_tokens, or use a smaller model or dtype"
                raise ResourceError(f"a row of {len(rows[batch[0]])} tokens does not fit in memory", fix)
        return found

    def shared_scores(
        self, rows: Sequence[list[int]], *, batch_tokens: int, world: World, should_stop: Callable[[], bool]
    ) -> list[float]:
        """Score rows as `scores` does, each by one of the ranks; all ranks get all scores.

        Raises:
            Stopped: `should_stop` returned True on a rank; raised on all of them.
        """
        order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
        mine = [rows[i] for i in order[world.rank :: world.size]]
        parts = world.gather(self.scores(mine, batch_tokens=batch_tokens, should_stop=should_stop))
        found: list[float | None] = [None] * len(rows)
        for rank, part in enumerate(parts):
            for i, score in zip(order[rank :: world.size], part, strict=True):
                found[i] = score
        known = [score for score in found if score is not None]
        if len(known) < len(rows):
            raise Stopped("stopped while scoring", "run the same command again")
        return known

    def _tried(self, rows: list[list[int]]) -> list[float] | None:
        """The scores; None if memory ran out."""
        try:
            scores: list[float] = self._forward(rows).tolist()
            return scores
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _forward(self, rows: list[list[int]]) -> Tensor:
        """[len(rows)] float32."""
        longest = max(map(len, rows))
        pad = self.pad_id or 0  # without one there is a single row, and no padding
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=self.model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self.model.device)
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask).logits[:, self.column].float()
        if not logits.isfinite().all():
            raise NumericsError("a score is not finite", "score in float32 (the scorer's dtype)")
        return logits


def load_classifier(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    label: str | None = None,
    trust_remote_code: bool = False,
) -> Classifier:
    """A sequence classifier from a folder or Hub id, in eval mode; a linear `score` head computes in float32.

    Args:
        path: Hugging Face layout with safetensors weights.
        dtype: of the weights, but for the head.
        label: the output to use of a model with several; None of one with a single output.
        trust_remote_code: run the model's own Python.

    Raises:
        ConfigError: not found, pickled, an adapter, no head among the weights, or no such label.
        IntegrityError: a damaged weight file.
    """
    folder = local_folder(path, trust_remote_code=trust_remote_code)
    config = check_classifier(folder, label=label, trust_remote_code=trust_remote_code)
    model = from_folder(
        AutoModelForSequenceClassification,
        folder,
        path,
        NO_HEAD,
        NO_HEAD,
        dtype=as_dtype(dtype),
        trust_remote_code=trust_remote_code,
    )
    ready: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    if isinstance(head := getattr(ready, "score", None), nn.Linear):
        head.float().register_forward_pre_hook(_in_float32)
    return Classifier(ready, _column(config if config is not None else ready.config, label, path))


def check_classifier(
    folder: Path, *, label: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig | None:
    """Check a classifier by its config and the headers of its weights alone; None where only its own code can say more.

    Raises:
        ConfigError: as `load_classifier`. IntegrityError: a damaged header.
    """
    refuse_adapter(folder)
    written = read_json_object(folder / "config.json")
    check_model_config(written, folder / "config.json")
    files = weight_files(folder)
    if "auto_map" in written and (trust_remote_code or written.get("model_type") not in CONFIG_MAPPING):
        if not trust_remote_code:
            raise ConfigError("needs code of its own", "set trust_remote_code if you trust its authors", file=folder)
        return None
    config = read_config(folder)
    try:
        with torch.device("meta"), quiet_transformers():
            made: Any = AutoModelForSequenceClassification.from_config(config)
    except Exception as error:  # no such class for the architecture, or a config that does not fit it
        why = one_line(error)
        raise ConfigError(f"no sequence classifier is known for it ({why})", NO_HEAD, file=folder) from error
    names = {name for file in files for name in header(file)}
    heads = [name for name in made.state_dict() if not name.startswith(f"{made.base_model_prefix}.")]
    if heads and not any(name in names for name in heads):
        raise ConfigError(f"it has no head: {heads[0]} is not among its weights", NO_HEAD, file=folder)
    _column(config, label, folder)
    return config


def _column(config: PretrainedConfig, label: str | None, path: str | Path) -> int:
    """Index of the label. Raises ConfigError that names the labels where none or an unknown one is asked for."""
    labels = {str(name): int(index) for index, name in (config.id2label or {}).items()}
    known = ", ".join(labels)
    if label is None:
        if len(labels) == 1:
            return 0
        raise ConfigError(f"the model has {len(labels)} outputs: {known}", "name one of them", file=path, field="label")
    if label not in labels:
        raise ConfigError(f"the model has no label {label!r}", f"use one of {known}", file=path, field="label")
    return labels[label]


def _in_float32(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].float(), *inputs[1:])
