"""The reward objective against TRL's RewardTrainer, and reward models on disk against plain transformers."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import model_of, some_groups
from datasets import Dataset
from forks import ranks
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file
from standalone_runs import make_base
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from training import rows, stop_after
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from trl import RewardConfig, RewardTrainer

from macpo.engine.config import FullSettings, LoraSettings, OptimSettings, ParallelSettings, Tuning
from macpo.engine.data.chat import Chat, load_tokenizer
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.pack import pack, unshared
from macpo.engine.distributed.world import World
from macpo.engine.errors import ConfigError, DataError, Stopped
from macpo.engine.model_folders import PolicyRef
from macpo.engine.models.model_cache import ModelCache
from macpo.engine.models.parallelize import parallelize
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.reward.classifier import ENDING, load_classifier
from macpo.engine.models.reward.saving import as_classifier, check_class, padding_id, save_reward
from macpo.engine.models.reward.score_head import RewardModule
from macpo.engine.models.tuning import lora
from macpo.engine.training.objectives import bradley_terry
from macpo.engine.training.trainer import train

PAIRS = some_groups(count=5)  # prompts of 1 to 11 tokens, responses of 1 to 9
MARGINS = torch.tensor([0.0, 0.5, 1.0, -0.25, 2.0])
LORA = LoraSettings(rank=2, alpha=4, target_modules=("q_proj", "v_proj", "down_proj"))


def head(size: int = 32) -> Tensor:
    """A head that is not zero, so that gradients reach the model."""
    return torch.randn(1, size, generator=torch.Generator().manual_seed(5)) / 4


def ours(lora_too: bool) -> RewardModule:
    model: Any = model_of("llama")
    if lora_too:
        model = lora.new_adapter(model.requires_grad_(False), LORA, seed=1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)) / 4)
    module = RewardModule(PolicyModule(model))
    with torch.no_grad():
        module.score.weight.copy_(head())
    return module


def theirs(lora_too: bool) -> PreTrainedModel:
    """The same model and head as plain transformers (and peft) have them."""
    causal = model_of("llama")
    config = copy.deepcopy(causal.config)
    config.num_labels, config.pad_token_id = 1, 0
    model: Any = AutoModelForSequenceClassification.from_config(config).float()
    model.model.load_state_dict(causal.model.state_dict())
    with torch.no_grad():
        model.score.weight.copy_(head())
    if lora_too:
        kind = LoraConfig(
            r=2, lora_alpha=4, target_modules=list(LORA.target_modules), task_type=TaskType.SEQ_CLS, lora_dropout=0.0
        )
        own = dict(ours(True).model.named_parameters())
        model = get_peft_model(model, kind)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(own[name])
    return model.eval()


def oracle(
    model: PreTrainedModel, groups: list[PrefixGroup], margins: Tensor | None, centring: float | None, out: Path
) -> Tensor:
    """TRL's own loss of all pairs in one batch."""
    rows: list[dict[str, Any]] = []
    for index, group in enumerate(groups):
        chosen, rejected = (group.prompt_ids + response for response in group.responses)
        rows.append({"chosen_ids": chosen, "rejected_ids": rejected})
        if margins is not None:
            rows[-1]["margin"] = float(margins[index])
    words = {f"w{i}": i for i in range(61)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w3")), pad_token="w0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = RewardTrainer(
            model,
            RewardConfig(
                str(out),
                use_cpu=True,
                bf16=False,
                report_to=[],
                center_rewards_coefficient=centring,
                gradient_checkpointing=False,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize(("margins", "centring"), [(None, 0.0), (MARGINS, 0.01), (None, 0.3)])
def test_loss_and_gradients_are_trls(tuning: str, margins: Tensor | None, centring: float, tmp_path: Path) -> None:
    """In micro-batches of one or two pairs, against all of them padded in one batch."""
    module, model = ours(tuning == "lora"), theirs(tuning == "lora")
    objective = bradley_terry(centring, margins)
    objective.check(PAIRS)
    total, sums = torch.zeros(()), torch.zeros(4)
    for batch in pack(PAIRS, max_tokens=30):
        loss, part = objective(module, batch, len(PAIRS))
        loss.backward()
        total, sums = total + loss.detach(), sums + part
    expected = oracle(model, PAIRS, margins, centring or None, tmp_path)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)

    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    seen = set()
    for name, parameter in module.trainable_parameters().items():
        key = name if name in grads else next(k for k in grads if "score" in k)
        seen.add(key)
        torch.testing.assert_close(parameter.grad, grads[key], rtol=1e-4, atol=1e-5)
    assert seen == set(grads) and any("lora_A" in key for key in seen) == (tuning == "lora")

    with torch.no_grad():
        rewards = torch.cat([module(batch).view(-1, 2) for batch in pack(PAIRS, max_tokens=10_000, order="given")])
    difference = rewards[:, 0] - rewards[:, 1]
    assert sums[2].item() == pytest.approx(difference.sum().item(), rel=1e-5)
    assert sums[3].item() == (difference > 0).sum().item()


def test_pairs_and_margins_must_fit() -> None:
    with pytest.raises(DataError, match="5 pairs but 4 margins"):
        bradley_terry(margins=MARGINS[:4]).check(PAIRS)
    with pytest.raises(DataError, match="pair 0 has 3 responses"):
        bradley_terry().check(some_groups(num_responses=3))
    assert bradley_terry(0.1).fingerprint != bradley_terry(0.2).fingerprint != bradley_terry(0.2, MARGINS).fingerprint


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox"])
def test_packed_rewards_are_those_of_plain_transformers(name: str) -> None:
    """Windows, softcaps and families; gemma2's softcap of logits is not one of rewards."""
    causal = model_of(name)
    plain = as_classifier(model_of(name), head(), pad_id=0)
    module = RewardModule(PolicyModule(causal))
    module.score.weight.copy_(head())
    for batch in pack(PAIRS, max_tokens=40):
        expected = [
            plain_reward(plain, PAIRS[g].prompt_ids + response) for g in batch.groups for response in PAIRS[g].responses
        ]
        torch.testing.assert_close(module(batch), torch.tensor(expected), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(module(unshared(batch, 14)), torch.tensor(expected), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def plain_reward(model: PreTrainedModel, ids: list[int]) -> float:
    return model(input_ids=torch.tensor([ids])).logits[0, 0].item()


OPTIM = OptimSettings(learning_rate=3e-3, batch=2, save_every_steps=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("tuning", [FullSettings(), LORA], ids=["full", "lora"])
def test_a_trained_model_is_a_plain_sequence_classifier(tuning: Tuning, base: Path, tmp_path: Path) -> None:
    """Trained, stopped and resumed bit-exactly, saved, and read back by transformers alone and by us."""
    chat = Chat(load_tokenizer(base), "vicuna")
    words = [i for i in range(len(chat.tokenizer)) if i not in chat.tokenizer.all_special_ids]
    groups = [
        PrefixGroup([words[i % 40] for i in g.prompt_ids], [[words[i] for i in r] + [chat.eos_id] for r in g.responses])
        for g in PAIRS
    ]

    def trained(workdir: Path, steps: int = 0) -> RewardModule:
        module = RewardModule(ModelCache().policy(PolicyRef(str(base)), tuning, seed=4))
        stop = stop_after(steps) if steps else None
        train(module, groups, bradley_terry(), OPTIM, seed=1, workdir=workdir, should_stop=stop)
        return module

    module = trained(tmp_path / "whole")
    with pytest.raises(Stopped):
        trained(tmp_path / "parts", steps=2)
    again = trained(tmp_path / "parts")
    for name, parameter in module.trainable_parameters().items():
        assert torch.equal(parameter, again.trainable_parameters()[name]), name
    found = rows(tmp_path / "whole")
    assert found == rows(tmp_path / "parts") and {"margin", "accuracy", "chosen_rewards"} <= set(found[0])
    assert found[0]["loss"] == pytest.approx(0.693147, abs=1e-5)  # the head begins at zero

    save_reward(module, tmp_path / "policy", start=PolicyRef(str(base)), tuning=tuning, chat=chat)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    assert model.config.num_labels == 1 and model.config.architectures == ["LlamaForSequenceClassification"]
    assert model.score.weight.abs().sum() > 0 and getattr(model.config, ENDING) == "eos"
    assert tokenizer.pad_token_id == model.config.pad_token_id == padding_id(chat) != chat.eos_id
    with torch.no_grad():
        rewards = [r for batch in pack(groups, max_tokens=10_000, order="given") for r in module(batch).tolist()]
    sequences = [g.prompt_ids + response for g in groups for response in g.responses]
    assert [plain_reward(model, ids) for ids in sequences] == pytest.approx(rewards, abs=1e-5)
    assert len({round(reward, 6) for reward in rewards}) > 5

    classifier = load_classifier(tmp_path / "policy")
    for budget in (1, 40, 10_000):  # single rows, several batches, one batch
        assert classifier.scores(sequences, batch_tokens=budget) == pytest.approx(rewards, abs=1e-5)
    assert classifier.scores(sequences, batch_tokens=1, should_stop=lambda: True) == [None] * len(sequences)


@pytest.mark.parametrize("tuning", [FullSettings(), LORA], ids=["full", "lora"])
def test_two_sharded_ranks_save_what_one_process_does(tuning: Tuning, base: Path, tmp_path: Path) -> None:
    """FSDP2 leaves the score head whole: its gradients are summed as those of other replicated weights."""
    chat = Chat(load_tokenizer(base), "vicuna")
    groups = [PrefixGroup([5, 6 + i], [[7 + i, chat.eos_id], [9, 8 + i, 20, chat.eos_id]]) for i in range(6)]
    settings = OptimSettings(learning_rate=1e-4, batch=3)

    def go(world: World, out: Path) -> None:
        cache = ModelCache()
        policy = cache.policy(PolicyRef(str(base)), tuning, seed=4, spread=world.size > 1)
        module = RewardModule(policy)
        with torch.no_grad():
            module.score.weight.copy_(head(16))
        if world.size > 1:
            parallelize(module, ParallelSettings(sharding="shard"), world)
        train(module, groups, bradley_terry(), settings, seed=1, workdir=out, world=world)
        save_reward(module, out / "policy", start=PolicyRef(str(base)), tuning=tuning, chat=chat)

    assert ranks(2, lambda world: go(world, tmp_path / "two"), timeout_s=60) == [0, 0]
    (tmp_path / "one").mkdir()
    go(World(), tmp_path / "one")
    one, two = (load_file(tmp_path / name / "policy" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and not torch.equal(one["score.weight"], head(16))
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name], rtol=1e-5, atol=1e-6)
    assert [row["loss"] for row in rows(tmp_path / "two")] == pytest.approx(
        [row["loss"] for row in rows(tmp_path / "one")], rel=1e-5
    )


def test_what_cannot_score_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it has no head: score.weight .* Fix: name a reward model"):
        load_classifier(base)
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=3, id2label={0: "a", 1: "b", 2: "c"}
    )
    model.save_pretrained(tmp_path / "three")
    for label, said in ((None, "3 outputs: a, b, c"), ("safe", "no label 'safe'.*use one of a, b, c")):
        with pytest.raises(ConfigError, match=said):
            load_classifier(tmp_path / "three", label=label)
    assert load_classifier(tmp_path / "three", label="b").column == 1
    with pytest.raises(ConfigError, match="GraniteForCausalLM: transformers has no sequence classifier for it"):
        check_class(AutoConfig.for_model("granite"), "GraniteForCausalLM")
