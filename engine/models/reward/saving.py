"""Saves a trained reward model as the sequence classifier that plain transformers loads: an adapter is merged in."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from macpo.engine.config import LoraSettings, Tuning
from macpo.engine.data.chat import Chat
from macpo.engine.distributed.agree import agreed
from macpo.engine.distributed.world import World
from macpo.engine.errors import ConfigError, IntegrityError, one_line
from macpo.engine.files import explained, require_free
from macpo.engine.model_folders import PolicyRef
from macpo.engine.models.loading import load_causal_lm, quiet_transformers
from macpo.engine.models.reward.classifier import ENDING
from macpo.engine.models.reward.score_head import RewardModule
from macpo.engine.models.saving import MAX_FILE_BYTES, share_as_folder
from macpo.engine.models.tuning import lora

LABEL = "reward"
OTHER_FAMILY = "use a family such as Llama, Qwen, Mistral or Gemma"


def save_reward(module: RewardModule, out_dir: Path, *, start: PolicyRef, tuning: Tuning, chat: Chat) -> None:
    """Write the reward model as `...ForSequenceClassification` with one output, in float32, beside its tokenizer.

    Rank 0 reads the base again, puts the trained weights into it (an adapter is merged in float32) and writes; an error
    on one rank is raised on all. Collective if the policy is spread over ranks.

    Args:
        out_dir: created if absent.
        start: the weights that training started from.
        tuning: what was trained.
        chat: its tokenizer is written with the template that training used and a padding token that ends no response.

    Raises:
        ConfigError: the architecture has no sequence classifier, or no token can be padding.
        ResourceError: the disk is full.
    """
    world = World.current()
    state = module.full_state()
    with agreed(world if module.collective else None), explained(out_dir):
        if not world.is_main:
            return
        weight = state.pop("score.weight")
        model = as_classifier(_with(state, start, tuning), weight, padding_id(chat))
        require_free(out_dir, sum(p.numel() * p.element_size() for p in model.parameters()), "the model")
        out_dir.mkdir(parents=True, exist_ok=True)
        with quiet_transformers():
            model.save_pretrained(out_dir, max_shard_size=MAX_FILE_BYTES)
        tokenizer = chat.hf_tokenizer()
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding_id(chat))
        tokenizer.save_pretrained(out_dir)
        share_as_folder(out_dir)


def _with(state: Mapping[str, Tensor], start: PolicyRef, tuning: Tuning) -> PreTrainedModel:
    """The whole float32 model with trained weights `state`, by their names in the policy that was trained."""
    model: Any = load_causal_lm(start.base)
    if start.adapter is not None:
        model = lora.load_adapter(model, start.adapter)
        if not isinstance(tuning, LoraSettings):
            model = lora.merged(model, start.adapter)
    elif isinstance(tuning, LoraSettings):
        model = lora.new_adapter(model, tuning, seed=0)
    own = dict(model.named_parameters())
    if odd := sorted(state.keys() - own.keys()):
        raise IntegrityError(f"the base has no place for {odd[0]}", "put back the base that training started from")
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
    return lora.merged(model, "the trained adapter") if isinstance(tuning, LoraSettings) else model


def as_classifier(causal: PreTrainedModel, weight: Tensor, pad_id: int) -> PreTrainedModel:
    """The sequence classifier over a causal LM's layers, which it shares.

    Args:
        weight: [1, H] float32, the score head's.
        pad_id: the token that the classifier takes for padding.

    Raises:
        ConfigError: transformers has no sequence classifier for the architecture, or one of other layers.
    """
    made = _skeleton(classifier_config(causal.config, pad_id), type(causal).__name__)
    if getattr(made, made.base_model_prefix).state_dict().keys() != causal.base_model.state_dict().keys():
        raise ConfigError(f"{type(causal).__name__}: its sequence classifier has other layers", OTHER_FAMILY)
    setattr(made, made.base_model_prefix, causal.base_model)
    made.get_submodule("score").weight = nn.Parameter(weight)
    return made.eval()


def check_class(config: PretrainedConfig, name: str) -> None:
    """Raise ConfigError where a causal LM with this config cannot be saved as a sequence classifier.

    Args:
        name: what to call it.
    """
    _skeleton(classifier_config(config, 0), name)


def classifier_config(config: PretrainedConfig, pad_id: int) -> PretrainedConfig:
    """The config of the sequence classifier over a causal LM with this config."""
    made = copy.deepcopy(config)
    made.id2label, made.label2id = {0: LABEL}, {LABEL: 0}  # which also makes num_labels 1
    for each in (made, made.get_text_config()):
        each.pad_token_id = pad_id
    setattr(made, ENDING, "eos")
    return made


def _skeleton(config: PretrainedConfig, name: str) -> PreTrainedModel:
    try:
        with torch.device("meta"), quiet_transformers():
            made: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    except Exception as error:  # transformers raises whatever it likes
        why = one_line(error, 160)
        raise ConfigError(f"{name}: transformers has no sequence classifier for it ({why})", OTHER_FAMILY) from error
    heads = [key for key in made.state_dict() if not key.startswith(f"{made.base_model_prefix}.")]
    if heads != ["score.weight"]:
        raise ConfigError(f"{name}: its sequence classifier has another head ({', '.join(heads)})", OTHER_FAMILY)
    return made


def padding_id(chat: Chat) -> int:
    """A special token that never ends a response: the tokenizer's padding token if it can be, else another one.

    Plain transformers scores the rightmost token that is not padding. So a padding token that is the end token too, as
    in many chat models, would move the score to the token before it.

    Raises:
        ConfigError: the tokenizer has no special token besides those that end a response.
    """
    tokenizer: Any = chat.tokenizer
    known = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids)
    added = sorted(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    free = [each for each in (*known, *added) if each is not None and each not in chat.stop_ids]
    if not free:
        problem = "the tokenizer has no special token besides its end token, and padding needs one"
        fix = (
            "add one to a copy of the model: tokenizer.add_special_tokens({'pad_token': '<pad>'}), "
            "model.resize_token_embeddings(len(tokenizer)), save both, and name that folder"
        )
        raise ConfigError(problem, fix, field="model")
    return int(free[0])
