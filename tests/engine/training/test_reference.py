"""Reference log-probs: what their cache key depends on, that a hit computes nothing, and which policy they are of."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import model_of, some_groups
from forks import ranks
from safetensors.torch import load_file, save_file
from standalone_runs import make_base, recipe_of
from torch import Tensor

from macpo.commands.run import runner_of
from macpo.engine import scoring
from macpo.engine.config import LoraSettings
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.distributed.world import World
from macpo.engine.errors import ConfigError, NumericsError
from macpo.engine.model_folders import PolicyRef
from macpo.engine.models.loading import load_causal_lm
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.saving import save_policy
from macpo.engine.models.tuning.lora import new_adapter
from macpo.engine.run.folder import folder_of
from macpo.engine.scoring import score
from macpo.engine.training.reference import cached, reference_key, reference_logps, shared_sums
from macpo.kernels import sequence_sums
from macpo.recipe_kinds import plan_of
from macpo.standalone.config import Standalone

GROUPS = some_groups(count=5)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_policy(PolicyModule(model_of("llama")), tmp_path / "model", base_name="")
    return tmp_path / "model"


def key_of(base: Path, groups: list[PrefixGroup] = GROUPS, **changes: str) -> str:
    adapter = changes.pop("adapter", None)
    return reference_key(
        PolicyRef(str(base), adapter), groups, **{"tokenizer": "t", "numerics": "cpu float32"} | changes
    )


def test_the_key_changes_with_every_ingredient_and_with_nothing_else(weights: Path, tmp_path: Path) -> None:
    adapted = PolicyModule(new_adapter(load_causal_lm(weights), LoraSettings(rank=2), seed=0))
    for name in ("one", "two"):
        save_policy(adapted, tmp_path / name, base_name="base")
    tensors = load_file(tmp_path / "two" / "adapter_model.safetensors")
    save_file({key: value + 1e-7 for key, value in tensors.items()}, tmp_path / "two" / "adapter_model.safetensors")
    moved = [PrefixGroup([*GROUPS[0].prompt_ids, GROUPS[0].responses[0][0]], [[5], [6]]), *GROUPS[1:]]
    same_ids = [PrefixGroup([3, 4], [[5, 6], [7]])], [PrefixGroup([3], [[4, 5], [6, 7]])]
    keys = {
        "plain": key_of(weights),
        "tokenizer": key_of(weights, tokenizer="u"),
        "numerics": key_of(weights, numerics="cuda bfloat16"),
        "adapter": key_of(weights, adapter=str(tmp_path / "one")),
        "other adapter": key_of(weights, adapter=str(tmp_path / "two")),
        "one pair less": key_of(weights, GROUPS[:-1]),
        "other order": key_of(weights, GROUPS[::-1]),
        "other tokens": key_of(weights, moved),
        "boundary": key_of(weights, same_ids[0]),
        "boundary elsewhere": key_of(weights, same_ids[1]),
    }
    assert key_of(Path(shutil.copytree(weights, tmp_path / "copy"))) == keys["plain"], "the place does not count"

    raw = bytearray((weights / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (weights / "model.safetensors").write_bytes(raw)
    keys["one bit of the weights"] = key_of(weights)
    config = json.loads((weights / "config.json").read_text())
    (weights / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    keys["configuration"] = key_of(weights)
    assert len(set(keys.values())) == len(keys)


class Counted:
    """A scoring that counts its calls."""

    def __init__(self, groups: list[PrefixGroup] = GROUPS) -> None:
        self.calls = 0
        scores = score(PolicyModule(model_of("llama")), groups)
        parts = [part for group in scores for part in shared_sums([r.token_logps for r in group])]
        self.parts = torch.tensor(parts, dtype=torch.float64)

    def __call__(self) -> Tensor:
        self.calls += 1
        return self.parts.clone()


def damage_nothing(path: Path) -> None:
    pass


def flip_a_number(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def no_header(path: Path) -> None:
    path.write_bytes(b"not safetensors")


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def of_other_data(path: Path) -> None:
    other = Counted(GROUPS[::-1])
    cached(path.parent, "f" * 64, GROUPS[::-1], other, world=World(), log=print)
    (path.parent / f"reference-{'f' * 32}.safetensors").replace(path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_nothing, ""),
        (flip_a_number, "its content was changed"),
        (truncate, "it cannot be read"),
        (no_header, "it cannot be read"),
        (of_other_data, "it belongs to something else"),
        (fifo, "it cannot be read"),
        (folder, "it cannot be read"),
    ],
)
def test_a_hit_computes_nothing_and_a_bad_entry_is_computed_again(
    tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    compute, lines = Counted(), list[str]()

    def ask() -> Tensor:
        return cached(tmp_path / "cache", "0" * 64, GROUPS, compute, world=World(), log=lines.append)

    assert torch.equal(ask(), compute.parts) and compute.calls == 1
    (entry,) = (tmp_path / "cache").iterdir()
    damage(entry)
    for _ in range(2):  # the second time the entry is whole again
        assert torch.equal(ask(), compute.parts)
    assert compute.calls == 1 + bool(said)
    assert len(lines) == bool(said) and all(said in line and str(entry) in line for line in lines)


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    compute = Counted()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError):
        cached(tmp_path / "file" / "cache", "0" * 64, GROUPS, compute, world=World(), log=print)
    assert compute.calls == 0, "before the work, not after it"
    compute.parts[3, 0] = float("nan")
    with pytest.raises(NumericsError, match="1 reference log-probs are not finite, first that of response 3"):
        cached(tmp_path, "0" * 64, GROUPS, compute, world=World(), log=print)
    assert not list(tmp_path.glob("reference-*"))


def test_ranks_agree_on_a_hit(tmp_path: Path) -> None:
    """A rank that computed while the other read would wait for it forever."""
    expected = Counted().parts

    def body(world: World) -> None:
        compute = Counted()
        for _ in range(2):
            parts = cached(tmp_path / "cache", "0" * 64, GROUPS, compute, world=world, log=print)
            assert torch.equal(parts, expected)
        assert compute.calls == 1

    assert ranks(2, body) == [0, 0]


def test_length_desensitised_sums_are_the_operators() -> None:
    scores = score(PolicyModule(model_of("llama")), GROUPS)
    flat = torch.tensor([logp for pair in scores for response in pair for logp in response.token_logps])
    bounds = torch.tensor([0, *(r.num_tokens for pair in scores for r in pair)]).cumsum(0).to(torch.int32)
    for alpha in (None, 0.0, 0.3, 1.0):
        expected = sequence_sums(flat, bounds, ld_alpha=alpha).reshape(-1, 2)
        torch.testing.assert_close(reference_logps(scores, alpha), expected, rtol=1e-6, atol=1e-5)


# --- in a run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("model"))


def run(recipe: Standalone) -> None:
    """Every stage, without summary and report."""
    runner_of(recipe, plan_of(recipe)).run()


def train_rows(run_dir: Path) -> list[dict[str, Any]]:
    lines = (folder_of(run_dir, "train-policy") / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def reference_of(run_dir: Path, name: str = "train") -> Tensor:
    return load_file(folder_of(run_dir, "reference") / f"{name}.safetensors")["parts"]


def test_runs_share_references_and_choose_them(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache, six runs: the same reference is scored once, and each choice is the policy that it names."""
    scored: list[int] = []
    real = scoring.score

    def counting(policy: PolicyModule, groups: list[PrefixGroup], **options: Any) -> Any:
        scored.append(len(groups))
        return real(policy, groups, **options)

    monkeypatch.setattr(scoring, "score", counting)
    train_pairs, test_pairs = 32, 12

    def go(name: str, **changes: Any) -> list[int]:
        """Sizes of what was scored, evaluations before and after left out."""
        compute = {"device": "cpu", "dtype": "float32", "threads": 1, "cache": str(tmp_path / "cache")}
        scored.clear()
        run(recipe_of("preference", base, tmp_path / name, compute=compute, **changes))
        assert scored[-1] == test_pairs
        return scored[:-2]

    both = [train_pairs, test_pairs]
    assert go("first") == both
    assert train_rows(tmp_path / "first")[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    # another loss, another run folder: the reference is the same, and nothing runs for it
    assert go("hinge", training={"loss": "hinge", "learning_rate": 1e-3, "batch": 8}) == []
    assert torch.equal(reference_of(tmp_path / "hinge"), reference_of(tmp_path / "first"))
    assert go("simpo", training={"loss": "simpo", "gamma": 0.5, "learning_rate": 1e-3, "batch": 8}) == []
    with pytest.raises(Exception, match="reference"):
        folder_of(tmp_path / "simpo", "reference")

    adapter = folder_of(tmp_path / "first", "train-policy") / "policy"
    assert go("on", adapter=str(adapter)) == both
    # the first run's reference was the base without the adapter
    preference = {"learning_rate": 1e-3, "batch": 8}
    assert go("off", adapter=str(adapter), training=preference | {"reference": "adapter-off"}) == []
    assert torch.equal(reference_of(tmp_path / "off"), reference_of(tmp_path / "first"))
    assert not torch.allclose(reference_of(tmp_path / "on"), reference_of(tmp_path / "first"), atol=1e-3)
    assert train_rows(tmp_path / "on")[0]["margin"] == pytest.approx(0.0, abs=1e-5)
    assert abs(train_rows(tmp_path / "off")[0]["margin"]) > 1e-4

    # a model of its own, and one that is an adapter of the same base
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tensors = load_file(base / "model.safetensors")
    save_file({k: v * 1.01 for k, v in tensors.items()}, other / "model.safetensors", metadata={"format": "pt"})
    assert go("model", training=preference | {"reference_model": str(other)}) == both
    assert not torch.allclose(reference_of(tmp_path / "model"), reference_of(tmp_path / "first"), atol=1e-3)
    assert go("adapted", training=preference | {"reference_model": str(adapter)}) == []
    assert torch.equal(reference_of(tmp_path / "adapted"), reference_of(tmp_path / "on"))
    assert len(list((tmp_path / "cache").iterdir())) == 6


def test_a_reference_model_has_the_policys_tokenizer(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(base, other)
    words = json.loads((other / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    first, second = list(vocabulary)[20:22]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(words))
    training = {"learning_rate": 1e-3, "reference_model": str(other)}
    with pytest.raises(ConfigError, match="another vocabulary than the policy"):
        run(recipe_of("preference", base, tmp_path / "run", training=training))
