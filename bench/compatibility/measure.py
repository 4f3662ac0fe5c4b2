"""What the engine does with one family: each result compared with plain transformers in eager attention, float32.

Gradients of real weights are compared with float64: at gemma-3-270m eager float32 is 2e-4 off it, the engine 9e-6.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from bench.compatibility.families import VOCAB, Family, config_of, model_of
from macpo.engine.config import PreferenceSettings
from macpo.engine.data.chat import Chat
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.pack import pack
from macpo.engine.errors import ConfigError
from macpo.engine.generation import Generator, SamplingParams
from macpo.engine.models.loading import load_causal_lm, quiet_transformers
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.saving import publish
from macpo.engine.models.support import refuse_unsupported
from macpo.engine.scoring import score
from macpo.engine.training.objectives import preference
from macpo.engine.training.reference import reference_logps
from macpo.engine.training.trainer import train

TOLERANCE = 2e-4
"""Largest error of log-probs (nats) and logits, and of a gradient relative to its norm: some thousand roundings."""
GROUPS = [
    PrefixGroup([3, 9, 27, 17, 51, 25, 11, 33, 35, 41, 59], [[49, 19, 57], [43, 1, 3, 9, 27, 17, 51, 25, 11]]),
    PrefixGroup([33], [[35], [41, 59, 49, 19, 57, 43]]),
    PrefixGroup([5, 7, 21, 63, 61, 55, 37], [[47, 13, 39, 53, 31], [29, 23]]),
]
"""Preference pairs: prompts longer and shorter than the sliding window of 6."""
TEXTS = (
    ("The largest planet of the solar system, as every child learns at school, is", "Jupiter.", "Mars, the red one."),
    ("Hello", "there!", "hello hello hello, hello and hello"),
    ("Give me a word for a small house.", "Cottage, or cabin.", "Palace."),
)
"""The same with real weights: prompt, chosen, rejected."""
COLUMNS = ("scores", "trains", "generates", "exports")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    family: str
    model: str
    results: tuple[str, ...] = ()
    """By COLUMNS, "yes" or what is wrong; empty if the family is refused."""
    refusal: str = ""
    early: bool = True
    """Whether the configuration alone was enough to refuse."""


def measure(family: Family, folder: Path) -> Row:
    """Run a family's tiny model through the engine; `folder` is filled and left."""
    config = config_of(family)
    try:
        refuse_unsupported(config)
    except ConfigError as error:
        return Row(family.name, _text(error).partition(" ")[0], refusal=_text(error))
    with quiet_transformers():
        model_of(config).save_pretrained(folder / "model")
    words = Tokenizer(models.WordLevel({f"w{k}": k for k in range(VOCAB)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2")
    return _run(family.name, Case(folder / "model", folder, GROUPS, Chat(tokenizer, "vicuna")))


def measure_real(model: Path, folder: Path) -> Row:
    """The same with a model's real weights, in float32, on text; `folder` is filled and left."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    groups = [
        PrefixGroup(tokenizer(prompt)["input_ids"], [tokenizer(f" {text}")["input_ids"] for text in responses])
        for prompt, *responses in TEXTS
    ]
    return _run(model.name, Case(model, folder, groups, Chat(tokenizer), exact=True))


@dataclass(frozen=True)
class Case:
    """A model folder, where its runs may write, and what they are made with."""

    model: Path
    folder: Path
    groups: list[PrefixGroup]
    chat: Chat
    exact: bool = False
    """Whether gradients are judged against float64, because eager ones in float32 may be further off than ours."""


def _run(name: str, case: Case) -> Row:
    base = load_causal_lm(case.model).requires_grad_(True)
    plain = AutoModelForCausalLM.from_pretrained(case.model, attn_implementation="eager", dtype=torch.float32).eval()
    try:
        policy = PolicyModule(base)
    except ConfigError as error:
        return Row(name, type(base).__name__, refusal=_text(error), early=False)
    results = []
    for step in (_scores, _trains, _generates, _exports):
        try:
            results.append(step(policy, plain, case))
        except ConfigError as error:
            results.append(f"refused: {_text(error)}")
        except Exception as error:  # a family that breaks is a finding, which the page shows
            results.append(f"{type(error).__name__}: {' '.join(str(error).split())[:80]}")
    return Row(name, type(base).__name__, tuple(results))


def _text(error: ConfigError) -> str:
    """The refusal without the figure that rounding decides."""
    return re.sub(r" by [\d.e+-]+ of the largest logit", "", error.problems[0].message)


def _logps(model: PreTrainedModel, groups: list[PrefixGroup]) -> list[list[Tensor]]:
    """Token log-probs by group and response from one plain forward of each whole sequence."""
    found: list[list[Tensor]] = []
    for group in groups:
        found.append([])
        for response in group.responses:
            ids = torch.tensor([group.prompt_ids + response])
            rows = model(input_ids=ids, use_cache=False).logits[0]
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32)).log_softmax(-1)
            targets = ids[0, len(group.prompt_ids) :]
            found[-1].append(rows[len(group.prompt_ids) - 1 : -1].gather(1, targets[:, None])[:, 0])
    return found


@torch.no_grad()
def _scores(policy: PolicyModule, plain: PreTrainedModel, case: Case) -> str:
    want = torch.cat([logps for pair in _logps(plain, case.groups) for logps in pair])
    got = [logp for pair in score(policy, case.groups, max_tokens=64) for r in pair for logp in r.token_logps]
    return _close((torch.tensor(got) - want).abs().max().item(), "log-probs")


def _trains(policy: PolicyModule, plain: PreTrainedModel, case: Case) -> str:
    """Every gradient of one DPO loss, then one step of the trainer."""
    groups = case.groups
    settings = PreferenceSettings(learning_rate=1e-3, beta=0.3, batch=len(groups))
    ref = reference_logps(score(policy, groups)) - torch.arange(6.0).reshape(3, 2)
    (batch,) = pack(groups, max_tokens=1000)
    objective = preference(settings, ref)
    loss, _ = objective(policy, batch, len(groups))
    loss.backward()
    if case.exact:
        with quiet_transformers():
            plain = AutoModelForCausalLM.from_pretrained(case.model, attn_implementation="eager", dtype=torch.float64)
    pairs = _logps(plain, groups)
    margins = torch.stack([chosen.sum() - rejected.sum() for chosen, rejected in pairs]) - (ref[:, 0] - ref[:, 1])
    nll = torch.stack([-chosen.mean() for chosen, _ in pairs]).mean()
    (settings.sft_weight * nll - torch.nn.functional.logsigmoid(settings.beta * margins).mean()).backward()
    want = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in policy.base.named_parameters() if p.grad is not None}
    if want.keys() != got.keys():
        return f"WRONG: gradients of {', '.join(sorted(want.keys() ^ got.keys())[:3])}"
    whole = torch.stack([gradient.norm() for gradient in want.values()]).norm()
    error = max(((got[name] - g).norm() / torch.maximum(g.norm(), 1e-2 * whole)).item() for name, g in want.items())
    policy.zero_grad()
    before = {name: p.detach().clone() for name, p in policy.trainable_parameters().items()}
    train(policy, groups, objective, settings, seed=0, workdir=case.folder / "train")
    trained = [(name, p) for name, p in policy.trainable_parameters().items() if name in want and want[name].any()]
    still = [name for name, p in trained if torch.equal(p, before[name])]
    return f"WRONG: {still[0]} does not change" if still else _close(error, "gradients")


@torch.no_grad()
def _generates(policy: PolicyModule, plain: PreTrainedModel, case: Case) -> str:
    """Eight greedy tokens after each prompt; the same weights in both."""
    plain.load_state_dict(policy.base.state_dict())
    params = SamplingParams(temperature=0.0, max_new_tokens=8, ignore_eos=True)
    prompts = [group.prompt_ids for group in case.groups[:2]]
    for prompt, output in zip(prompts, Generator(policy.base).generate(prompts, params), strict=True):
        ids = torch.tensor([prompt])
        with quiet_transformers():
            whole = plain.generate(ids, do_sample=False, max_new_tokens=8, eos_token_id=-1, use_cache=True)
        if list(output.samples[0].token_ids) != whole[0, ids.shape[1] :].tolist():
            return "WRONG: other tokens than transformers"
    return "yes"


@torch.no_grad()
def _exports(policy: PolicyModule, _: PreTrainedModel, case: Case) -> str:
    """The folder that `macpo export` writes, loaded by plain transformers, against the trained policy."""
    out = case.folder / "out"
    publish(policy, out, base=str(case.model), base_name="tiny", chat=case.chat, card="")
    with quiet_transformers():
        again = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager", dtype=torch.float32).eval()
    ids = torch.tensor([case.groups[0].prompt_ids])
    error = (again(ids, use_cache=False).logits - policy.base(ids, use_cache=False).logits).abs().max().item()
    return _close(error, "logits")


def _close(error: float, what: str) -> str:
    return "yes" if error <= TOLERANCE else f"WRONG: {what} differ by {error:.0e}"
