"""Reference log-probs on disk: computed once per weights, tokenizer, template and data, and shared between runs.

    key = reference_key(ref, groups, tokenizer=chat.digest, numerics="cpu torch.float32")
    parts = cached(folder, key, groups, lambda: shared_parts(policy, groups), world=world, log=print)

An entry is one safetensors file, named by its key, that contains the key and the SHA-256 of its numbers.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from macpo.engine import files
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.distributed.agree import on_main
from macpo.engine.distributed.world import World
from macpo.engine.errors import ConfigError, NumericsError, one_line
from macpo.engine.model_folders import PolicyRef, local_folder, weight_files
from macpo.engine.opening import open_regular
from macpo.engine.removal import make_way
from macpo.engine.run.keys import canonical
from macpo.engine.scoring import ResponseScore

log = logging.getLogger(__name__)

SCHEMA = 1  # version of the entries; raise it when the meaning of their numbers changes


def reference_key(ref: PolicyRef, groups: Sequence[PrefixGroup], *, tokenizer: str, numerics: str) -> str:
    """SHA-256 hex of everything that the log-probs depend on.

    Args:
        ref: the reference policy; every byte of its weight files and configurations counts, their location does not.
        groups: the prompts and responses, as token ids.
        tokenizer: identity of tokenizer and template (`Chat.digest`).
        numerics: device type and dtype of the forward.
    """
    parts = {
        "schema": SCHEMA,
        "weights": weights_digest(ref),
        "tokenizer": tokenizer,
        "numerics": numerics,
        "groups": groups_digest(groups),
    }
    return hashlib.sha256(canonical(parts).encode()).hexdigest()


def weights_digest(ref: PolicyRef) -> str:
    """SHA-256 hex of the content of a policy's weight files and configurations, base and adapter."""
    base = local_folder(ref.base)
    found = [base / "config.json", *weight_files(base)]
    if ref.adapter is not None:
        adapter = local_folder(ref.adapter, kind="adapter")
        found += [adapter / "adapter_config.json", *weight_files(adapter, "adapter_model")]
    digest = hashlib.sha256()
    for file in found:
        info = file.stat()
        digest.update(f"{file.name}\0{_sha256(file, info.st_size, info.st_mtime_ns, info.st_ino)}\n".encode())
    return digest.hexdigest()


@lru_cache(maxsize=1024)
def _sha256(file: Path, size: int, mtime_ns: int, inode: int) -> str:
    """SHA-256 of a file, read once per process; the arguments after the path identify its version."""
    return files.sha256(file)


def groups_digest(groups: Sequence[PrefixGroup]) -> str:
    """SHA-256 hex of the token ids and the lengths of prompts and responses."""
    digest = hashlib.sha256()
    for group in groups:
        digest.update(array("q", [len(group.responses), len(group.prompt_ids), *map(len, group.responses)]).tobytes())
        for ids in (group.prompt_ids, *group.responses):
            digest.update(array("q", ids).tobytes())
    return digest.hexdigest()


def cached(
    folder: Path,
    key: str,
    groups: Sequence[PrefixGroup],
    compute: Callable[[], Tensor],
    *,
    world: World,
    log: Callable[[str], None],
) -> Tensor:
    """The entry's numbers, computed and written if no entry verifies: [R, 2] float64 on every rank.

    Args:
        folder: created if absent; runs and processes may share it.
        key: `reference_key` of the same groups.
        groups: prompts with R responses in all.
        compute: called by every rank or by none; returns the same [R, 2] float64 on each (see `shared_sums`).
        log: gets one line about an entry that is damaged or belongs to something else.

    Raises:
        NumericsError: a log-prob is not finite. ConfigError, ResourceError: the folder cannot be written.
    """
    path = folder / f"reference-{key[:32]}.safetensors"
    shape = [sum(len(group.responses) for group in groups), 2]
    rows = on_main(world, lambda: _read(path, key, shape, log))
    if rows is not None:
        return torch.tensor(rows, dtype=torch.float64).reshape(shape)
    parts = compute()
    if not parts.isfinite().all():
        bad = sorted({index // 2 for index in (~parts.isfinite()).flatten().nonzero().flatten().tolist()})
        fix = "look at that response and at the reference model's weights"
        raise NumericsError(f"{len(bad)} reference log-probs are not finite, first that of response {bad[0]}", fix)
    on_main(world, lambda: _write(path, key, parts))
    return parts


def _read(path: Path, key: str, shape: list[int], log: Callable[[str], None]) -> list[list[float]] | None:
    """The numbers of a valid entry; if there is none, check that the folder is writable."""
    if os.path.lexists(path):
        why = ""
        try:
            open_regular(path).close()  # safe_open would wait for a FIFO
            with safe_open(path, "pt") as file:
                about, names = file.metadata() or {}, list(file.keys())
                parts = file.get_tensor("parts") if names == ["parts"] else torch.empty(0)
        except (SafetensorError, OSError, ConfigError) as error:
            why = f"it cannot be read ({one_line(error, 120)})"
        else:
            whose, _, digest = about.get("entry", "").partition(":")
            if whose != key:
                why = "it belongs to something else"
            elif list(parts.shape) != shape or parts.dtype != torch.float64 or digest != _digest(parts):
                why = "its content was changed"
        if not why:
            rows: list[list[float]] = parts.tolist()
            return rows
        log(f"reference log-probs in {path} are not used, {why}: computed again")
    files.probe_writable(path.parent)
    return None


def _write(path: Path, key: str, parts: Tensor) -> None:
    make_way(path, path.parent, log.warning)
    parts = parts.to("cpu", torch.float64).contiguous()
    # one metadata value, because safetensors writes several in an order that differs between processes
    files.atomic_write(path, save({"parts": parts}, metadata={"entry": f"{key}:{_digest(parts)}"}))


def _digest(parts: Tensor) -> str:
    return hashlib.sha256(parts.numpy().tobytes()).hexdigest()


def reference_logps(scores: Sequence[Sequence[ResponseScore]], ld_alpha: float | None = None) -> Tensor:
    """[num_groups, 2] float32 from `score(policy, groups)` of (chosen, rejected) groups."""
    parts = torch.tensor([shared_sums([r.token_logps for r in pair]) for pair in scores], dtype=torch.float64)
    return weighted(parts.reshape(-1, 2, 2), ld_alpha).float()


def shared_sums(token_logps: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """For each response of one prompt: summed log-probs up to the shortest response's length, and beyond it."""
    shared = min(map(len, token_logps))
    return [(math.fsum(logps[:shared]), math.fsum(logps[shared:])) for logps in token_logps]


def weighted(parts: Tensor, ld_alpha: float | None) -> Tensor:
    """[..., 2] of `shared_sums` -> [...]: sequence log-probs, tokens beyond the shared length counted ld_alpha times.

    LD-DPO, section 3 of arXiv 2409.06411; None counts every token once.
    """
    return parts[..., 0] + (1.0 if ld_alpha is None else ld_alpha) * parts[..., 1]
