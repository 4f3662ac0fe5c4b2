"""Generation by a tensor-parallel group that splits every layer: the tokens of one rank that holds all of it.

Gloo ranks in forked processes; what they find is compared with one process.
"""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import wave_job
from architectures import model_of
from forks import ranks
from generation_checks import (
    NAMES,
    SPARSE_IDS,
    some_prompts,
    sparse_tokenizer,
    teacher_forced,
    three_adapters,
)
from parallel_cases import SHARD, SINKS
from peft import LoraConfig, get_peft_model
from tiny import tiny

from macpo.commands.run import run
from macpo.engine.config import LoraSettings, ParallelSettings
from macpo.engine.distributed.world import World
from macpo.engine.errors import ConfigError, ResourceError
from macpo.engine.files import read_json, read_jsonl
from macpo.engine.generation import Generator, Output, SamplingParams, sampling
from macpo.engine.generation.split_model import split_policy, team_size
from macpo.engine.models.model_cache import ModelCache
from macpo.engine.models.parallelize import parallelize
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.tuning.lora import new_adapter
from macpo.engine.run.folder import folder_of
from macpo.engine.scoring import score

PROMPTS = some_prompts([3, 9, 1, 17, 5])
PARAMS = SamplingParams(temperature=1.0, max_new_tokens=12, n=2, seed=4)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def lora_of(targets: Any) -> PolicyModule:
    base = model_of("llama").requires_grad_(False)
    wrapped = new_adapter(base, LoraSettings(rank=4, target_modules=targets), seed=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=generator, std=0.3)
    return PolicyModule(wrapped.requires_grad_(False))


def plain(name: str, **changes: Any) -> PolicyModule:
    return PolicyModule(model_of(name, **changes).requires_grad_(False))


def stacked() -> PolicyModule:
    return PolicyModule(three_adapters().requires_grad_(False))


# Grouped heads, norms of heads, biases behind a sum, fused projections that are gathered, windows, sinks; tied words.
POLICIES: dict[str, Callable[[], PolicyModule]] = {
    **{name: functools.partial(plain, name) for name in ("qwen3", "gpt_neox", "phi3", "gemma3_text", "olmo2")},
    "sinks": functools.partial(plain, SINKS.architecture, **SINKS.changes),
    "qwen2, tied": functools.partial(plain, "qwen2", num_key_value_heads=2, tie_word_embeddings=True),
    "adapter": functools.partial(lora_of, "all-linear"),
    "adapter on the head": functools.partial(lora_of, ["lm_head", "o_proj", "up_proj"]),
}


def plainly(outputs: list[Output]) -> list[list[Any]]:
    return [[s.token_ids, s.raw_logps, s.logps, s.finish_reason] for output in outputs for s in output.samples]


def mixed(policy: PolicyModule) -> list[list[Any]]:
    """Three adapters in one batch, and a tokenizer with holes in its ids."""
    outputs = Generator(policy, sparse_tokenizer()).generate(PROMPTS, PARAMS, adapters=[*NAMES, None, "odd"])
    found = plainly(outputs)
    assert {token for tokens, *_ in found for token in tokens} < set(SPARSE_IDS)
    return found


def assert_same_responses(found: list[list[Any]], wanted: list[list[Any]]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours[0] == theirs[0] and ours[3] == theirs[3]
        assert ours[1] == pytest.approx(theirs[1], abs=1e-5) and ours[2] == pytest.approx(theirs[2], abs=1e-5)


def test_two_ranks_draw_what_one_draws(tmp_path: Path) -> None:
    """Over slots and over blocks; every rank has all outputs, and half of the weights."""

    def body(world: World) -> None:
        found: dict[str, Any] = {}
        for name, make in POLICIES.items():
            policy = make()
            whole = sum(p.numel() for p in policy.parameters())
            policy = split_policy(policy, world, 2)
            own = [p.numel() for p in policy.parameters()]
            found[name] = {"share": sum(own) / whole}
            for cache in ("slots", "pool"):
                found[name][cache] = plainly(Generator(policy, cache=cache).generate(PROMPTS, PARAMS))  # type: ignore[arg-type]
        found["stacked"] = mixed(split_policy(stacked(), world, 2))
        (tmp_path / f"{world.rank}.json").write_text(json.dumps(found))

    assert ranks(2, body, timeout_s=60.0) == [0, 0]
    first, second = (read_json(tmp_path / f"{rank}.json") for rank in (0, 1))
    assert first == second
    assert_same_responses(first.pop("stacked"), mixed(stacked()))
    for name, make in POLICIES.items():
        wanted = plainly(Generator(make()).generate(PROMPTS, PARAMS))
        assert len({tuple(row[0]) for row in wanted}) > 5, name
        assert_same_responses(first[name]["slots"], wanted)
        assert_same_responses(first[name]["pool"], wanted)
        assert first[name]["share"] < 0.56, name


def test_sixteen_bits(tmp_path: Path) -> None:
    """Raw log-probs are those of the whole model after the same tokens, but for rounding."""

    def body(world: World) -> None:
        policy = split_policy(PolicyModule(model_of("llama").bfloat16().requires_grad_(False)), world, 2)
        outputs = Generator(policy).generate(PROMPTS, PARAMS)
        (tmp_path / f"{world.rank}.json").write_text(json.dumps(plainly(outputs)))

    assert ranks(2, body) == [0, 0]
    first, second = (read_json(tmp_path / f"{rank}.json") for rank in (0, 1))
    assert first == second
    model = model_of("llama").bfloat16()
    errors = []
    for (tokens, raw, *_), prompt in zip(first, [p for p in PROMPTS for _ in range(2)], strict=True):
        logps = teacher_forced(model, prompt, tokens).log_softmax(-1)[: len(tokens)]
        errors += (logps.gather(1, torch.tensor(tokens)[:, None])[:, 0] - torch.tensor(raw)).abs().tolist()
    assert max(errors) < 0.25 and sum(errors) / len(errors) < 0.04


def test_ranks_whose_samplers_differ_go_on_alike(tmp_path: Path) -> None:
    """The first rank's draw holds: a rank of other hardware might round a tie the other way."""

    def body(world: World) -> None:
        policy = split_policy(plain("llama"), world, 2)
        inner = sampling.sample
        if world.rank == 1:
            sampling.sample = lambda logits, *rest: inner(logits.roll(1, 1), *rest)  # type: ignore[attr-defined]
        (tmp_path / f"{world.rank}.json").write_text(json.dumps(plainly(Generator(policy).generate(PROMPTS, PARAMS))))

    assert ranks(2, body) == [0, 0]
    first, second = (read_json(tmp_path / f"{rank}.json") for rank in (0, 1))
    assert first == second
    assert_same_responses(first, plainly(Generator(plain("llama")).generate(PROMPTS, PARAMS)))


# --- waves ---


def groups_of_two(folder: Path, world: World, **options: Any) -> list[dict[str, Any]]:
    return wave_job.run(folder, model=split_policy(plain("llama"), world, 2), world=world, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "waves").glob("*.jsonl"))}


def test_two_groups_share_the_waves(tmp_path: Path) -> None:
    """The rows of one process; a group that is killed and started again leaves the bytes of one that was not."""
    rows = wave_job.run(tmp_path / "one")

    def body(folder: Path, point: str, world: World) -> None:
        if world.rank == 2:  # the first of the second group
            os.environ["MACPO_KILL_AT"] = point
        found = groups_of_two(folder, world)
        (folder / f"rows-{world.rank}").write_text(json.dumps(found))

    assert ranks(4, functools.partial(body, tmp_path / "two", ""), timeout_s=60.0) == [0] * 4
    written = [read_json(tmp_path / "two" / f"rows-{rank}") for rank in range(4)]
    assert all(part == written[0] for part in written)
    for ours, theirs in zip(written[0], rows, strict=True):
        for name in ("sum_logp", "end_logp"):
            assert ours.pop(name) == pytest.approx(theirs.pop(name), abs=1e-5)
        assert ours == theirs

    codes = ranks(4, functools.partial(body, tmp_path / "killed", "file-written:1"), timeout_s=60.0)
    assert codes[2] == -signal.SIGKILL and all(code != 0 for code in codes)
    assert set(contents(tmp_path / "killed").items()) < set(contents(tmp_path / "two").items())
    assert ranks(4, functools.partial(body, tmp_path / "killed", ""), timeout_s=60.0) == [0] * 4
    assert contents(tmp_path / "killed") == contents(tmp_path / "two")


# --- how many ranks, and what cannot be split ---


def test_the_fewest_ranks_that_hold_a_copy() -> None:
    """Divisors of the job and of all kinds of heads: 4 and 2 of them here."""

    def size(ranks: int, enough: int) -> int:
        return team_size(plain("llama"), lambda n: n >= enough, World(0, ranks))

    assert [size(ranks, 2) for ranks in (2, 4, 6)] == [2, 2, 2]
    assert size(4, 1) == 1
    with pytest.raises(ResourceError, match=r"2 of 8 ranks split it \(4 num_attention_heads and 2 num_key_value_heads"):
        size(8, 3)
    with pytest.raises(ResourceError, match="1 of 3 ranks"):
        size(3, 2)


def test_what_cannot_be_split_is_named(tmp_path: Path) -> None:
    def body(world: World) -> None:
        with pytest.raises(ConfigError, match="GPT2LMHeadModel has no plan"):
            split_policy(PolicyModule(model_of("gpt2", n_inner=48)), world, 2)
        with pytest.raises(ConfigError, match=r"layers.0.mlp.gate_proj has width 49, which 2 ranks do not divide"):
            split_policy(plain("llama", intermediate_size=49), world, 2)
        for options, why in (
            ({"target_modules": ["q_proj"], "use_dora": True}, "a variant of LoRA"),
            ({"target_modules": ["embed_tokens"]}, "embed_tokens is a Embedding"),
        ):
            model = get_peft_model(model_of("llama"), LoraConfig(r=2, **options))  # type: ignore[arg-type]
            with pytest.raises(ConfigError, match=why):
                split_policy(PolicyModule(model.requires_grad_(False)), world, 2)
        policy = split_policy(plain("llama"), world, 2)
        with pytest.raises(ConfigError, match="split over ranks for generation"):
            score(policy, [([5, 6], [[7]])])
        with pytest.raises(ConfigError, match="1 ranks do not divide into tensor-parallel groups of 2"):
            wave_job.run(tmp_path, model=policy, world=World())
        with pytest.raises(ConfigError, match="no CUDA graphs"):
            Generator(policy, use_graphs=True, cache="pool").generate(PROMPTS, PARAMS)
        with pytest.raises(ConfigError, match="spread over ranks for training"):
            Generator(parallelize(plain("llama"), SHARD, world))

    assert ranks(2, body) == [0, 0]


# --- in a run ---


def test_a_policy_that_no_rank_can_hold(tiny_run: Path, tmp_path: Path) -> None:
    """The method where each rank may keep half a student: the losses and scores of one process without a bound."""
    made = tiny(tmp_path / "two", iterations=1)
    tight = made.compute.model_copy(update={"memory_gb": 6e-5, "parallel": ParallelSettings(sharding="shard")})
    recipe = made.model_copy(update={"compute": tight})
    assert ranks(2, lambda world: run(recipe, world=world), timeout_s=120.0) == [0, 0]
    student = folder_of(tiny_run, "base-student") / "model"
    bound = ModelCache(60_000)
    assert not bound.fits(str(student)) and bound.fits(str(student), 2)

    for stage in ("init-teacher1-positive", "iter1-student-train", "iter1-teacher0-train"):
        losses = [
            [row["loss"] for _, row in read_jsonl(folder_of(run_dir, stage) / "metrics.jsonl")]
            for run_dir in (tiny_run, tmp_path / "two")
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4), stage
    summaries = [read_json(run_dir / "summary.json") for run_dir in (tiny_run, tmp_path / "two")]
    scores = [summary["agents"]["student"]["scores"] for summary in summaries]
    assert [row["gold"] for row in scores[0]] == pytest.approx([row["gold"] for row in scores[1]], abs=1e-3)
