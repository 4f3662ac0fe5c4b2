"""The load-balancing loss of mixtures of experts is trained where the configuration asks for it, in whatever parts."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import model_of, some_groups
from forks import ranks

from macpo.engine.config import ParallelSettings, PreferenceSettings
from macpo.engine.data.pack import pack
from macpo.engine.distributed.world import World
from macpo.engine.errors import ConfigError
from macpo.engine.models.parallelize import parallelize
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.router import balance, router_logits, router_of
from macpo.engine.training.balanced import balanced
from macpo.engine.training.objectives import preference, sft
from macpo.engine.training.trainer import train

MIXTURE: dict[str, Any] = {"num_key_value_heads": 2, "output_router_logits": True}
FAMILIES: dict[str, dict[str, Any]] = {  # each names its experts and its coefficient otherwise
    "mixtral": {"num_local_experts": 4, "router_aux_loss_coef": 0.5},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "router_aux_loss_coef": 0.5},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 8, "aux_loss_coef": 0.5},
}
PAIRS = some_groups(num_responses=2, count=6)


def mixture(name: str = "mixtral", **changes: Any) -> PolicyModule:
    return PolicyModule(model_of(name, **(MIXTURE | FAMILIES[name] | changes)).requires_grad_(True))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_document_is_trained_as_transformers_trains_it(name: str) -> None:
    """transformers' own loss of one sequence, labels and router together, and every gradient of it."""
    (document,) = some_groups(num_responses=1, count=1)
    policy = mixture(name)
    (batch,) = pack([document], max_tokens=100)
    loss, sums = balanced(sft(), policy, [document])(policy, batch, document.num_response_tokens)
    loss.backward()
    got = {name: p.grad.clone() for name, p in policy.base.named_parameters() if p.grad is not None}
    policy.zero_grad()
    ids = torch.tensor([document.prompt_ids + document.responses[0]])
    labels = ids.clone()
    labels[:, : len(document.prompt_ids)] = -100
    out: Any = policy.base(input_ids=ids, labels=labels, use_cache=False)
    out.loss.backward()
    torch.testing.assert_close(loss, out.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums[-1] / document.num_response_tokens, out.aux_loss.detach())
    wanted = {name: p.grad for name, p in policy.base.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys()
    for weight, gradient in wanted.items():
        torch.testing.assert_close(
            got[weight], gradient, rtol=1e-3, atol=2e-4, msg=lambda text, w=weight: f"{w}: {text}"
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_each_pair_has_the_loss_of_its_own_tokens(name: str) -> None:
    """transformers' function on the router's logits of the group: the prompt once, then both responses."""
    policy = mixture(name)
    router = router_of(policy.base)
    assert router is not None and router.coefficient == 0.5
    (batch,) = pack(PAIRS, max_tokens=1000)
    with router_logits(policy.base) as found:
        policy.hidden(batch)
    bounds = batch.segments.cu_groups
    group_of = torch.arange(len(PAIRS)).repeat_interleave(torch.tensor(bounds).diff())
    got = balance(found[0], group_of, len(PAIRS), router)
    theirs = sys.modules[type(policy.base).__module__].load_balancing_loss_func
    sizes = (router.num_experts, router.num_chosen)
    for index, (start, end) in enumerate(pairwise(bounds)):
        torch.testing.assert_close(got[index], theirs(tuple(logits[start:end] for logits in found[0]), *sizes))


def trained(
    folder: Path, tokens: int, parallel: ParallelSettings | None = None, world: World | None = None, **changes: Any
) -> dict[str, torch.Tensor]:
    policy = mixture(**changes)
    if parallel is not None and world is not None:
        policy = parallelize(policy, parallel, world)
    settings = PreferenceSettings(learning_rate=3e-5, epochs=1, batch=4, microbatch_tokens=tokens)
    objective = preference(settings, torch.full((len(PAIRS), 2), -30.0))
    folder.mkdir(exist_ok=True)
    train(policy, PAIRS, objective, settings, seed=3, workdir=folder, world=world)
    return policy.full_state()


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_rows(found: Path, wanted: Path) -> None:
    for first, second in zip(rows(found), rows(wanted), strict=True):
        assert first == pytest.approx(second, rel=1e-4, abs=1e-5)


def test_neither_micro_batches_nor_ranks_change_it(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", 1000)
    parts = trained(tmp_path / "parts", 30)

    def body(world: World) -> None:
        sharded = ParallelSettings(sharding="shard", checkpointing="full")
        state = trained(tmp_path / "ranks", 30, sharded, world)
        for name, weight in state.items():
            torch.testing.assert_close(weight, whole[name], rtol=1e-4, atol=1e-5)
        with pytest.raises(ConfigError, match=r'compute\.parallel\.tensor.* Fix: .*"output_router_logits": false'):
            policy = mixture()
            policy.data = world
            balanced(sft(), policy, PAIRS)

    assert ranks(2, body) == [0, 0]
    for name, weight in parts.items():
        torch.testing.assert_close(weight, whole[name], rtol=1e-4, atol=1e-5)
    assert_same_rows(tmp_path / "parts", tmp_path / "whole")
    assert_same_rows(tmp_path / "ranks", tmp_path / "whole")
    assert all(row["router_loss"] > 1.9 for row in rows(tmp_path / "whole"))  # of 2 experts a token: 2 or more


@pytest.mark.parametrize("changes", [{"output_router_logits": False}, {"router_aux_loss_coef": 0.0}])
def test_it_is_left_out_where_the_configuration_leaves_it_out(changes: dict[str, Any], tmp_path: Path) -> None:
    policy = mixture(**changes)
    objective = sft()
    assert balanced(objective, policy, PAIRS) is objective
    trained(tmp_path / "off", 1000, **changes)
    trained(tmp_path / "on", 1000)
    (off, _), (on, _) = rows(tmp_path / "off"), rows(tmp_path / "on")
    assert "router_loss" not in off
    assert on["loss"] == pytest.approx(off["loss"] + 0.5 * on["router_loss"], rel=1e-5)


def test_a_model_whose_router_is_silent_is_refused() -> None:
    policy = mixture()
    (batch,) = pack(PAIRS, max_tokens=1000)
    objective = balanced(sft(), policy, PAIRS)
    policy.base.config.output_router_logits = False
    with pytest.raises(ConfigError, match="does not return the logits of its router"):
        objective(policy, batch, 1)
    del policy.base.num_experts
    policy.base.config.output_router_logits = True
    with pytest.raises(ConfigError, match="a load-balancing loss that is not known here"):
        router_of(policy.base)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5}),
        ("mixtral", {"router_jitter_noise": 0.5, "attention_dropout": 0.5, "num_key_value_heads": 2}),
        ("phimoe", {"num_local_experts": 4, "input_jitter_noise": 0.5, "num_key_value_heads": 2, "sliding_window": 64}),
    ],
)
def test_what_is_random_in_training_is_off(name: str, changes: dict[str, Any]) -> None:
    """Else the first DPO step would not start from the reference's own log-probs."""
    base = model_of(name, **changes)
    policy = PolicyModule(base.train())
    policy.train()
    (batch,) = pack(PAIRS, max_tokens=1000)
    with torch.no_grad():
        first, second = policy.token_logps(batch), policy.train().token_logps(batch)
    assert torch.equal(first, second) and not any(module.training for module in base.modules())
