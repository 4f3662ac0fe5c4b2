"""Models that nothing uses are dropped where memory runs out, before anything is made smaller or given up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import model_of
from torch import Tensor
from training import PAIRS, Starved, bits, run_sft
from transformers import LlamaConfig, LlamaForSequenceClassification

from macpo.engine.data.pack import PackedBatch
from macpo.engine.distributed.failures import free_memory, make_room
from macpo.engine.errors import Again, ResourceError
from macpo.engine.generation.generator import Generator
from macpo.engine.generation.params import SamplingParams
from macpo.engine.model_folders import PolicyRef
from macpo.engine.models import model_cache
from macpo.engine.models.model_cache import ModelCache
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.reward.classifier import Classifier
from macpo.engine.scoring import score
from macpo.engine.training.optim import Optimizer

pytestmark = pytest.mark.usefixtures("no_idle_models")


def idle(folder: Path) -> ModelCache:
    """A cache with two bases that nothing uses."""
    cache = ModelCache()
    for name in "ab":
        model_of("llama").save_pretrained(folder / name)
        cache.policy(PolicyRef(str(folder / name)))
    assert len(cache.resident) == 2
    return cache


def test_models_that_nothing_uses_are_dropped_before_a_micro_batch_is_split(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = idle(tmp_path)
    used = cache.policy(PolicyRef(str(tmp_path / "a")))

    class Crowded(Starved):
        def __call__(self, policy: PolicyModule, batch: PackedBatch, total: int) -> tuple[Tensor, Tensor]:
            self.tokens = 0 if len(cache.resident) > 1 else 10**6
            return super().__call__(policy, batch, total)

    crowded = Crowded(0)
    policy, _ = run_sft(tmp_path / "crowded", objective=crowded)
    assert crowded.failures == 1 and "out of memory" not in capfd.readouterr().err
    assert cache.resident == (str(tmp_path / "a"),) and not used.trainable_parameters()
    plain, _ = run_sft(tmp_path / "plain")
    assert bits(policy, tmp_path / "crowded") == bits(plain, tmp_path / "plain")


def test_an_update_without_room_is_tried_again_where_idle_models_gave_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, update = idle(tmp_path), Optimizer.update

    def limited(self: Optimizer, rate: float, norm: float) -> None:
        if cache.resident or not loads:
            raise torch.OutOfMemoryError("CUDA out of memory")
        update(self, rate, norm)

    monkeypatch.setattr(Optimizer, "update", limited)
    loads = True
    with pytest.raises(Again, match=r"no memory for gradients or optimizer states .* beside models") as caught:
        run_sft(tmp_path / "run")
    assert "run the same command again" in str(caught.value)
    policy, _ = run_sft(tmp_path / "run")
    loads = False
    with pytest.raises(ResourceError, match="no memory for gradients or optimizer states") as caught:
        run_sft(tmp_path / "again")
    assert not isinstance(caught.value, Again) and "train with LoRA" in str(caught.value)
    monkeypatch.undo()
    plain, _ = run_sft(tmp_path / "plain")
    assert bits(policy, tmp_path / "run") == bits(plain, tmp_path / "plain")


def test_what_is_freed_between_stages_leaves_the_cache_as_it_is(tmp_path: Path) -> None:
    cache = idle(tmp_path)
    free_memory()
    assert len(cache.resident) == 2 and make_room() and not cache.resident and not make_room()


def test_a_model_is_loaded_where_an_idle_one_lay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = idle(tmp_path)
    model_of("llama").save_pretrained(tmp_path / "c")
    load = model_cache.load_causal_lm

    def limited(*args: Any, **kwargs: Any) -> Any:
        if cache.resident or full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return load(*args, **kwargs)

    monkeypatch.setattr(model_cache, "load_causal_lm", limited)
    full = False
    cache.policy(PolicyRef(str(tmp_path / "c")))
    assert cache.resident == (str(tmp_path / "c"),)
    full = True
    with pytest.raises(ResourceError, match=r"base model .*b' does not fit in memory"):
        cache.policy(PolicyRef(str(tmp_path / "b")))


def test_scoring_drops_idle_models_before_it_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, token_logps = idle(tmp_path), PolicyModule.token_logps
    sizes: list[int] = []

    def limited(self: PolicyModule, batch: PackedBatch) -> Tensor:
        sizes.append(batch.num_tokens)
        if cache.resident:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return token_logps(self, batch)

    policy = PolicyModule(model_of("llama"))
    whole = score(policy, PAIRS)
    monkeypatch.setattr(PolicyModule, "token_logps", limited)
    assert score(policy, PAIRS) == whole and len(sizes) == 2 and sizes[0] == sizes[1]


def test_generation_drops_idle_models_before_its_batch_is_halved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, run = idle(tmp_path), Generator._run

    def limited(self: Generator, *args: Any) -> None:
        if cache.resident:
            raise torch.OutOfMemoryError("CUDA out of memory")
        run(self, *args)

    prompts, params = [[5, 6, 7], [8, 9]], SamplingParams(max_new_tokens=4, seed=1)
    model = model_of("llama")
    plain = Generator(model, max_batch=8).generate(prompts, params)
    monkeypatch.setattr(Generator, "_run", limited)
    maker = Generator(model, max_batch=8)
    assert maker.generate(prompts, params) == plain
    assert maker.max_batch == 8 and not cache.resident


def test_a_scorer_drops_idle_models_before_its_batch_is_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, forward = idle(tmp_path), Classifier._forward
    sizes: list[int] = []

    def limited(self: Classifier, rows: list[list[int]]) -> Tensor:
        sizes.append(len(rows))
        if cache.resident or len(rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, rows)

    sizes_of = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=32, pad_token_id=0, num_labels=1, **sizes_of)
    classifier = Classifier(LlamaForSequenceClassification(config).eval(), 0)
    rows = [[5, 6, 7], [8, 9, 10, 11]]
    whole = classifier.scores(rows, batch_tokens=100)
    monkeypatch.setattr(Classifier, "_forward", limited)
    most = 2
    assert classifier.scores(rows, batch_tokens=100) == whole and sizes == [2, 2]
    most = 1
    assert classifier.scores(rows, batch_tokens=100) == pytest.approx(whole) and sizes[2:] == [2, 1, 1]
    most = 0
    with pytest.raises(ResourceError, match="a row of 4 tokens does not fit in memory"):
        classifier.scores(rows, batch_tokens=100)
