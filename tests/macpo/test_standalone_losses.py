"""Every loss of `recipe: preference` against its operator on separate, unpacked forwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import model_of, some_groups
from standalone_runs import DPO
from torch import Tensor
from transformers import PreTrainedModel

from macpo.engine.config import LoraSettings, PreferenceSettings
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.pack import pack
from macpo.engine.errors import DataError
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.tuning.lora import new_adapter
from macpo.engine.scoring import score
from macpo.engine.training.objectives import preference
from macpo.engine.training.reference import reference_logps, shared_sums
from macpo.engine.training.trainer import train
from macpo.kernels import pair_loss, sequence_sums
from macpo.standalone.evaluation import pair_metrics

LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {"sft_weight": 0.2},
    "cDPO": {"label_smoothing": 0.1},
    "LD-DPO": {"ld_alpha": 0.4},
    "sigmoid_norm": {"loss": "sigmoid_norm", "beta": 2.0},
    "robust": {"loss": "robust", "label_smoothing": 0.2, "ld_alpha": 0.7},
    "ipo": {"loss": "ipo"},
    "hinge": {"loss": "hinge", "beta": 0.05},
    "simpo": {"loss": "simpo", "beta": 2.0, "gamma": 0.7},
    "orpo": {"loss": "orpo"},
}
GROUPS = some_groups(num_responses=2, count=7)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains_a_step_of_its_operator(name: str, tmp_path: Path) -> None:
    """One step of seven pairs in several packed rows, against the operator on separate, unpacked forwards."""
    settings = PreferenceSettings.model_validate(
        {"learning_rate": 1e-3, "batch": 7, "microbatch_tokens": 40, "sft_weight": 1.0 if name == "orpo" else 0.0}
        | LOSSES[name]
    )
    other = score(model_of("llama", seed=1), GROUPS) if settings.has_reference else None
    ref = None if other is None else reference_logps(other, settings.ld_alpha)
    policy = PolicyModule(model_of("llama"))
    before = {key: p.detach().clone() for key, p in policy.trainable_parameters().items()}
    result = train(policy, GROUPS, preference(settings, ref), settings, seed=0, workdir=tmp_path)

    model = model_of("llama")
    hidden, target, cu_rows = separate_hidden(model, GROUPS)
    if ref is not None:  # the engine's reference is the operator's own
        rows = torch.tensor([logp for pair in other or [] for r in pair for logp in r.token_logps])
        expected_ref = sequence_sums(rows, cu_rows, ld_alpha=settings.ld_alpha)
        torch.testing.assert_close(ref.flatten(), expected_ref, rtol=1e-6, atol=1e-5)
    options = {"loss": "sigmoid", "sft_weight": settings.sft_weight} | LOSSES[name]
    expected = pair_loss(
        hidden, model.lm_head.weight, target, cu_rows, None if ref is None else ref.flatten(), **options
    )
    assert result.last["loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    assert result.last["margin"] == pytest.approx(expected.margin.item(), rel=1e-4, abs=1e-5)
    assert result.last["accuracy"] == pytest.approx(expected.accuracy.item())
    expected.loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    assert result.last["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert all(not torch.equal(p, before[key]) for key, p in policy.trainable_parameters().items())

    # what the evaluation stage says about the same pairs
    parts = _parts(score(model_of("llama"), GROUPS))
    measured = pair_metrics(settings, parts, None if other is None else _parts(other), GROUPS)
    assert measured["loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    assert measured["reward_margin"] == pytest.approx(expected.margin.item(), rel=1e-4, abs=1e-5)
    assert measured["preference_accuracy"] == pytest.approx(expected.accuracy.item())


def separate_hidden(model: PreTrainedModel, groups: list[PrefixGroup]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that predict a response token, from one forward a response; their targets; where responses begin."""
    rows, target, bounds = [], [], [0]
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([group.prompt_ids + response])
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
            rows.append(states[len(group.prompt_ids) - 1 : -1])
            target += response
            bounds.append(len(target))
    return torch.cat(rows), torch.tensor(target), torch.tensor(bounds, dtype=torch.int32)


def _parts(scores: Any) -> Tensor:
    return torch.tensor([shared_sums([r.token_logps for r in pair]) for pair in scores], dtype=torch.float64)


def test_an_adapter_on_the_head_learns_by_every_loss() -> None:
    """Gradients of A and B on lm_head, against the operator that takes the factors apart."""
    model = model_of("llama")
    wrapped = new_adapter(model, LoraSettings(rank=3, target_modules=("lm_head", "q_proj")), seed=0)
    layer: Any = wrapped.get_base_model().lm_head
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b, std=0.1, generator=torch.Generator().manual_seed(0))
    policy = PolicyModule(wrapped)
    (batch,) = pack(GROUPS, max_tokens=10_000)
    rows = policy.hidden(batch)[batch.rows].detach()
    for case in LOSSES.values():
        settings = PreferenceSettings.model_validate(DPO.model_dump() | case)
        ref = torch.full((len(GROUPS), 2), -20.0) if settings.has_reference else None
        wrapped.zero_grad()
        loss, _ = preference(settings, ref)(policy, batch, len(GROUPS))
        loss.backward()
        got = a.grad.clone(), b.grad.clone()
        wrapped.zero_grad()
        options = {"loss": "sigmoid", "sft_weight": 0.0} | case
        lora = (a, b, layer.scaling["default"])
        flat = None if ref is None else ref.flatten()
        weight = layer.get_base_layer().weight
        out = pair_loss(rows, weight, batch.target, batch.cu_rows, flat, lora=lora, **options)
        out.loss.backward()
        assert loss.item() == pytest.approx(out.loss.item(), rel=1e-5)
        for x, y in zip(got, (a.grad, b.grad), strict=True):
            assert (x - y).norm() <= 1e-4 * y.norm()


def test_a_loss_has_its_reference_or_none() -> None:
    ref = torch.zeros(len(GROUPS), 2)
    with pytest.raises(DataError, match="the loss 'ipo' needs reference log-probs"):
        preference(PreferenceSettings(loss="ipo"), None)
    with pytest.raises(DataError, match="the loss 'orpo' takes no reference log-probs"):
        preference(PreferenceSettings(loss="orpo"), ref)
    assert PreferenceSettings(loss="orpo").sft_weight == 1.0 and PreferenceSettings().sft_weight == 0.2
    prints = {
        preference(PreferenceSettings.model_validate(case), ref).fingerprint for case in list(LOSSES.values())[:7]
    }
    assert len(prints) == 7, "a checkpoint of another loss is not resumed"
