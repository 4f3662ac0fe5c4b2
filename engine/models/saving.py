"""Saves a policy for others to load: weights, tokenizer and model card in a folder that appears once it is verified."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from macpo.engine.data.chat import Chat
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.pack import PackedBatch, pack
from macpo.engine.distributed.agree import agreed
from macpo.engine.distributed.world import World
from macpo.engine.errors import ConfigError, IntegrityError, MacpoError
from macpo.engine.files import atomic_write, explained, fsync_dir, fsync_file, require_free, sha256
from macpo.engine.model_folders import local_folder, weight_files
from macpo.engine.models.attention_hook import attention_hook
from macpo.engine.models.equivalence import spread_ids
from macpo.engine.models.float32 import in_float32
from macpo.engine.models.head import Head, whole
from macpo.engine.models.loading import load_causal_lm, quiet_transformers
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.tuning import lora
from macpo.engine.removal import is_file, is_folder, remove, remove_leftovers

MAX_LOGIT_ERROR = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference of logits that counts as equal, by the dtype of the policy; relative above 1. In the median of the
rows, because a model's rounding can be ten times that at single tokens (`equivalence.py`)."""
NUM_TOKENS = 32


def publish(
    policy: PolicyModule,
    out: Path,
    *,
    base: str,
    base_name: str,
    chat: Chat,
    card: str,
    expected: Tensor | None = None,
) -> None:
    """Write the policy to the new folder `out`; collective.

    The folder appears only if plain transformers (and peft) load it again and compute the same logits. Nothing that is
    there already is touched: the files are made in a new folder beside `out`, named after it, which a killed export
    leaves and the next one to the same `out` makes again.

    Args:
        policy: on one rank or spread over all; an adapter is written in peft's layout, else Hugging Face's.
        base: folder or Hub id of the base on which an adapter is read back.
        base_name: what an adapter's config names as its base.
        chat: the tokenizer and template that it was trained with; written as `save_policy` does.
        card: text of README.md.
        expected: logits to compare with ([NUM_TOKENS - 1, V], `logits_of`); default the policy's own.

    Raises:
        ConfigError (2): `out` or the new folder's name exists. ResourceError (4): the disk is full.
        IntegrityError (5): the logits differ.
    """
    world, work = World.current(), _work(out)
    with agreed(world), explained(out):
        if getattr(policy.base.config, "quantization_config", None) is not None:
            raise ConfigError("a policy on a 4-bit base cannot be compared", "load it without quantization first")
        if world.is_main:
            _claim(out)
    try:
        if expected is None:
            expected = logits_of(policy, len(chat.tokenizer))
        save_policy(policy, work / _FOLDER, base_name=base_name, chat=chat)
        with agreed(world), explained(out):
            if world.is_main:
                _finish(policy, work, out, base=base, expected=expected, num_ids=len(chat.tokenizer), card=card)
    except BaseException:
        if world.is_main:
            _drop(work)
        raise


def _finish(
    policy: PolicyModule, work: Path, out: Path, *, base: str, expected: Tensor, num_ids: int, card: str
) -> None:
    """Read back what was written, compare it, add the card and give it its name."""
    compute = policy.compute_dtype
    dtypes = {compute, *(parameter.dtype for parameter in written(policy))}
    got = logits_of(reloaded(work / _FOLDER, base, compute), num_ids)
    compare(expected, got, max(dtypes & MAX_LOGIT_ERROR.keys(), key=MAX_LOGIT_ERROR.__getitem__), work / _FOLDER)
    _give_name(work, out, card)


def _give_name(work: Path, out: Path, card: str) -> None:
    folder = work / _FOLDER
    atomic_write(folder / "README.md", card)
    for path in folder.iterdir():
        fsync_file(path)
    fsync_dir(folder)
    os.rename(folder, out)
    fsync_dir(out.parent)
    _drop(work)


_WORK = "macpo-export"  # ending of the folder that an export is made in
_OURS = "made-by-macpo-export"
_FOLDER = "folder"


def _claim(out: Path) -> Path:
    """Make the folder that an export to `out` is made in, anew where a killed export left it.

    Raises:
        ConfigError: there is an `out`, or something of the new folder's name that no export made.
    """
    refuse_existing(out)
    work = _work(out)
    if os.path.lexists(work):
        raise ConfigError(f"{work} exists and is not of an export", "move it, or choose another --out")
    work.mkdir(parents=True)
    (work / _OURS).touch()
    return work


def refuse_existing(out: Path) -> None:
    """Delete what a killed export to `out` left beside it; raise ConfigError if there is an `out`."""
    work = _work(out)
    if is_folder(work) and (is_file(work / _OURS) or not any(work.iterdir())):
        _drop(work)
    if os.path.lexists(out):
        raise ConfigError(f"{out} exists", "name a new folder", field="--out")


def _drop(work: Path) -> None:
    """Delete an export's own folder, last the file that says so: after a kill in between the next one goes on."""
    with contextlib.suppress(OSError, MacpoError):
        remove(work / _FOLDER, work)
        remove_leftovers(work)
        (work / _OURS).unlink(missing_ok=True)
        work.rmdir()


def _work(out: Path) -> Path:
    return out.with_name(f".{out.name}.{_WORK}")


def written(policy: PolicyModule) -> list[nn.Parameter]:
    """The parameters that `save_policy` writes: an adapter's own, else all."""
    adapter = isinstance(policy.model, PeftModel)
    return [p for name, p in policy.model.named_parameters() if "lora_" in name or not adapter]


def cast(policy: PolicyModule, dtype: torch.dtype) -> None:
    """Round the weights that `save_policy` writes to `dtype`, in place, but for those that their class keeps in
    float32."""
    kept = set(getattr(policy.base, "_keep_in_fp32_modules_strict", None) or ())
    exempt = {id(p) for name, p in policy.model.named_parameters() if kept.intersection(name.split("."))}
    for parameter in written(policy):
        if parameter.is_floating_point() and id(parameter) not in exempt:
            parameter.data = parameter.data.to(dtype)


def publish_copy(folder: Path, out: Path, *, card: str, stem: str = "adapter_model") -> None:
    """Copy a saved adapter or model with its tokenizer to the new folder `out`, where there are no logits to compare.

    The folder appears only if every file has the SHA-256 of the one it was copied from.

    Args:
        card: text of README.md.
        stem: name of its weight files, "model" of a whole model.

    Raises:
        ConfigError (2): no weights in `folder`, or `out` exists. IntegrityError (5): a copy differs.
    """
    weight_files(folder, stem)
    with explained(out):
        work = _claim(out)
        try:
            (work / _FOLDER).mkdir()
            for path in sorted(path for path in folder.iterdir() if path.is_file()):
                copy = Path(shutil.copyfile(path, work / _FOLDER / path.name))
                if sha256(path) != sha256(copy):
                    raise IntegrityError("the copy differs from the file", "export again", file=copy)
            _give_name(work, out, card)
        except BaseException:
            _drop(work)
            raise


@torch.no_grad()
def logits_of(model: PolicyModule | torch.nn.Module, num_ids: int) -> Tensor:
    """Logits of a fixed row of NUM_TOKENS ids below `num_ids`: [NUM_TOKENS - 1, V] float32 on the CPU.

    A policy computes them by its packed forward (collective if it is spread over ranks), a plain model by its own; from
    16-bit weights in float32 (`in_float32`) unless it is spread.
    """
    ids = spread_ids(num_ids, NUM_TOKENS)
    if not isinstance(model, PolicyModule):
        with in_float32(model):
            return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float().cpu()
    (batch,) = pack([PrefixGroup(ids[:1], [ids[1:]])], max_tokens=NUM_TOKENS)
    with attention_hook(model.base), nullcontext() if model.collective else in_float32(model.base):
        logits: Tensor = model(batch, _logits)
    if model.collective:
        model.release()
    return logits.float().cpu()


def _logits(rows: Tensor, head: Head, _: PackedBatch) -> Tensor:
    """rows [N, H] -> [N, V], the whole vocabulary even if it is split over ranks."""
    dtype = torch.promote_types(rows.dtype, head.weight.dtype)
    bias = None if head.bias is None else head.bias.to(dtype)
    logits = F.linear(rows.to(dtype), head.weight.to(dtype), bias) * head.logit_scale
    if head.shard is not None:
        first, count = head.shard.first, head.shard.count
        logits = head.shard.total(F.pad(logits, (first, head.shard.vocab - first - count)))
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def reloaded(folder: Path, base: str, dtype: torch.dtype) -> torch.nn.Module:
    """The folder's model as plain transformers and peft load it, on the CPU."""
    if (folder / "adapter_config.json").exists():
        model = load_causal_lm(local_folder(base), dtype=dtype)
        return PeftModel.from_pretrained(model, str(folder)).eval()
    return load_causal_lm(folder, dtype=dtype)


def compare(expected: Tensor, got: Tensor, dtype: torch.dtype, folder: Path) -> None:
    """Raise IntegrityError if the logits [N, V] differ by more than rounding in `dtype`."""
    error = (got - expected).abs().amax(-1).median().item()
    limit = MAX_LOGIT_ERROR[dtype] * max(1.0, expected.abs().max().item())
    if not error <= limit:
        problem = f"the exported model's logits differ by {error:.2e} (allowed {limit:.0e} in {dtype})"
        fix = "export again; in float32 (compute.dtype) or without --merge rounding is least"
        raise IntegrityError(problem, fix, file=folder)


MAX_FILE_BYTES = 5_000_000_000  # limit for one file of saved weights


def save_policy(
    policy: PolicyModule,
    out_dir: Path,
    *,
    base_name: str,
    chat: Chat | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write the policy: peft's layout for an adapter, else the Hugging Face layout with safetensors.

    Rank 0 writes. Collective if the policy is spread over ranks: an error on one rank is raised on all.

    Args:
        out_dir: created if absent.
        base_name: what an adapter's config names as its base.
        chat: its tokenizer is written beside the weights with the template that training used, and the tokens that end
            a response as `eos_token_id` of generation_config.json, that of training first.
        max_file_bytes: a larger model is split into several files with an index.

    Raises:
        ResourceError: the disk is full.
    """
    world = World.current()
    state = _whole_state(policy) if policy.collective else None
    needed = sum(p.numel() * p.element_size() for p in written(policy))
    with agreed(world if policy.collective else None), explained(out_dir, needed):
        if not world.is_main:
            return
        require_free(out_dir, needed, "the model")
        out_dir.mkdir(parents=True, exist_ok=True)
        if isinstance(policy.model, PeftModel):
            lora.save_adapter(policy.model, out_dir, base_name=base_name, state=state)
        else:
            with quiet_transformers():
                policy.model.save_pretrained(out_dir, state_dict=state, max_shard_size=max_file_bytes)
        if chat is not None:
            chat.hf_tokenizer().save_pretrained(out_dir)
            settings = policy.base.generation_config
            ending = {"eos_token_id": list(chat.stop_ids)}
            kept = {k: v for k, v in (settings.to_diff_dict() if settings else {}).items() if not k.startswith("_")}
            text = json.dumps(kept | ending, indent=2)
            (out_dir / "generation_config.json").write_text(text + "\n", encoding="utf-8")
        share_as_folder(out_dir)


def share_as_folder(folder: Path) -> None:
    """Give every file in a folder that was made here the permissions that the umask left to the folder.

    safetensors makes its files readable by their owner only.
    """
    mode = folder.stat().st_mode & 0o666
    for path in folder.iterdir():
        if stat.S_ISREG(path.lstat().st_mode) and stat.S_IMODE(path.lstat().st_mode) != mode:
            path.chmod(mode)


def _whole_state(policy: PolicyModule) -> dict[str, Tensor]:
    """The whole weights to write of a policy that is spread over ranks, on rank 0's CPU; empty on the others."""
    state = policy.full_state()
    if isinstance(policy.model, PeftModel):
        return state
    named = dict(policy.model.named_parameters(remove_duplicate=False))
    done = {id(parameter) for parameter in policy.trainable_parameters().values()}
    for name, tensor in policy.model.state_dict().items():  # frozen weights and buffers; a tied weight only once
        if name not in named or id(named[name]) not in done:
            done.add(id(named.get(name)))
            tensor = whole(tensor)
            if World.current().is_main:
                state[name] = tensor.cpu()
    return state
