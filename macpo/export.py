"""`macpo export`: one policy of a run as a Hugging Face or peft folder, read back and compared before it counts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from macpo import __version__
from macpo.config import AgentSettings, Recipe
from macpo.engine.chat import load_tokenizer
from macpo.engine.compute import model_pool
from macpo.engine.config import FullSettings
from macpo.engine.errors import ConfigError, IntegrityError
from macpo.engine.files import atomic_write, explained, fsync_dir
from macpo.engine.loading import load_causal_lm
from macpo.engine.model import PolicyRef, save_policy
from macpo.engine.run_folder import folder_of
from macpo.iteration import build_plan
from macpo.steps import Plan

MAX_LOGIT_ERROR = 1e-3
"""Largest difference allowed between the exported and the original logits, in float32."""


def export(
    run_dir: Path, recipe: Recipe, out: Path, *, agent: str, iteration: int, policy: str, merge: bool, arm: str = ""
) -> Path:
    """Write the policy to `out`; it appears there only once it has been loaded again and gave the same logits.

    Raises:
        ConfigError (2): no such agent, iteration or policy, or `out` exists.
        IntegrityError (5): what was read back differs.
    """
    if out.exists():
        raise ConfigError(f"{out} exists", "name a new folder", field="--out")
    plan = build_plan(recipe)
    settings = agent_settings(recipe, agent)
    ref = policy_ref(run_dir, plan, settings, agent, iteration, policy, arm)
    tmp = out.with_name(out.name + ".tmp")
    with explained(out):
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        base_name = settings.model or f"base-{settings.name}"
        if settings.init is not None and ref.adapter is not None and not merge:
            base_name = os.path.relpath(ref.base, out.parent / "x")
        pool = model_pool(recipe.compute, recipe.trust_remote_code)
        tokenizer = load_tokenizer(ref.base, trust_remote_code=recipe.trust_remote_code)
        ids = torch.arange(3, 35).remainder(len(tokenizer))[None]
        expected = _logits(pool.policy(ref).model, ids)
        exported = pool.policy(ref, FullSettings()) if merge else pool.policy(ref)
        save_policy(exported, tmp, base_name=base_name, tokenizer=tokenizer)
        _compare(expected, tmp, ref, merge, ids)
        atomic_write(tmp / "README.md", model_card(recipe, tmp, agent, iteration, policy, base_name))
        fsync_dir(tmp)
        tmp.rename(out)
        fsync_dir(out.parent)
    return out


def agent_settings(recipe: Recipe, agent: str) -> AgentSettings:
    found = {a.name: a for a in (*recipe.teachers, recipe.student)} | {"ceiling": recipe.student}
    if agent not in found:
        raise ConfigError(f"no agent {agent!r} in this run", f"one of {sorted(found)}", field="--agent")
    return found[agent]


def policy_ref(
    run_dir: Path, plan: Plan, settings: AgentSettings, agent: str, iteration: int, policy: str, arm: str
) -> PolicyRef:
    """Where the weights of an agent's policy lie in the run's folder."""
    if policy == "negative":
        key = (arm, agent)
        if key not in plan.negatives:
            raise ConfigError(f"{agent} has no negative policy in this run", "export another", field="--policy")
        stage, ready = plan.negatives[key], settings.negative
    else:
        found = {p.iteration: p for p in plan.points if (p.arm, p.agent) == (arm, agent)}
        if iteration == -1 and found:
            iteration = max(found)
        if iteration not in found:
            raise ConfigError(
                f"{agent} has no iteration {iteration}", f"one of {sorted(found)}, or -1 (last)", field="--iteration"
            )
        stage, ready = found[iteration].policy, settings.positive
    base = settings.model or settings.positive or str(folder_of(run_dir, f"base-{settings.name}") / "model")
    folder = folder_of(run_dir, stage) / "policy" if stage is not None else Path(str(ready))
    if (folder / "adapter_config.json").exists():
        return PolicyRef(base, str(folder))
    return PolicyRef(str(folder))


@torch.no_grad()
def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    device = next(model.parameters()).device
    return model(input_ids=ids.to(device), use_cache=False).logits.float().cpu()


def _compare(expected: torch.Tensor, folder: Path, ref: PolicyRef, merge: bool, ids: torch.Tensor) -> None:
    """Load what was written with plain transformers and peft, and compare logits in the dtype it was saved in."""
    if (folder / "adapter_config.json").exists() and not merge:
        from peft import PeftModel

        got = _logits(PeftModel.from_pretrained(load_causal_lm(ref.base), str(folder)).eval(), ids)
    else:
        got = _logits(load_causal_lm(folder), ids)
    error = (got - expected).abs().max().item()
    limit = MAX_LOGIT_ERROR * max(1.0, expected.abs().max().item())
    if not error <= limit:
        raise IntegrityError(
            f"the exported model's logits differ by {error:.2e} (allowed {limit:.0e})",
            "export again in float32 (compute.dtype), or without --merge",
            file=str(folder),
        )


def model_card(recipe: Recipe, folder: Path, agent: str, iteration: int, policy: str, base_name: str) -> str:
    """The README.md of an exported folder, with the Hub's metadata."""
    role = "student" if agent == recipe.student.name else "ceiling" if agent == "ceiling" else "teacher"
    kind = "peft" if (folder / "adapter_config.json").exists() else "transformers"
    data = recipe.data.path or "the project's demo world"
    step = f"iteration {recipe.iterations if iteration < 0 else iteration} of {recipe.iterations}"
    warning = (
        "\nThis is a **negative** policy: it was trained to behave badly, to supply hard negatives. Do not deploy it.\n"
        if policy == "negative"
        else ""
    )
    return f"""---
library_name: {kind}
base_model: {base_name}
tags: [macpo, weak-to-strong, preference-optimisation]
---

# {agent}, {policy} policy, {step}

A {role} aligned by MACPO (multi-agent contrastive preference optimisation, arXiv 2410.07672), made by macpo
{__version__} with seed {recipe.seed} on {data}.
{warning}
- Base model: `{base_name}`
- Chat template: `{recipe.template}`; prompts and answers together up to {recipe.context_tokens} tokens
- Preference loss: {recipe.student_training.preference.loss}, beta {recipe.student_training.preference.beta}
"""
