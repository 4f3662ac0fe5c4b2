"""Checks that the engine's own paths through a model compute what the model itself computes, before it is used.

transformers has some 350 architectures; a list of those that work would be wrong tomorrow. So a model's first use
compares the logits of a few tokens, and whatever differs (recurrent layers, a head with an unknown scale, custom
attention, anything that looks at the whole row) is refused with an error that names the architecture. `verify` checks
packed rows for training and scoring; `engine/generation/equivalence.py` checks prefill and decoding through a cache
with the same probe.

16-bit rounding alone moves logits: a real model's own bfloat16 forward has been seen .47 of the largest logit off
float32 at some tokens. So a 16-bit model is compared in float32, layer by layer (`float32.py`), where a fault cannot
hide; and in 16 bits a path may be off that result by a few times what the model's own forwards are, in the median of
the rows of each part, because single rows are off by far more than others, now in one path and now in the other.

L tokens of a sequence, V vocabulary, P parts of a probe, R rows of each part.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from macpo.engine.data.groups import PrefixGroup
from macpo.engine.data.pack import PackedBatch, pack
from macpo.engine.errors import ConfigError
from macpo.engine.models.attention_hook import PackedAttention, attention_by, attention_hook
from macpo.engine.models.float32 import SIXTEEN_BITS, in_float32, is_plain
from macpo.engine.models.head import Head, head_of
from macpo.engine.models.loading import embedding_rows
from macpo.engine.models.support import FIX, refuse_unsupported
from macpo.kernels import AttentionForm, Segments

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference relative to the largest logit: a few thousand roundings in float32, a few hundred in bfloat16
(8 bits)."""
OWN_ERRORS = 4.0
"""How many times the 16-bit error of the model's own forwards a path's 16-bit error may be, beyond TOLERANCE."""
_VERIFIED = "_macpo_verified"  # an attribute of the module


AttentionKinds = frozenset[tuple[int | None, int]]
"""(sliding window, size of a query head) of a model's layers."""


class _Verified(dict[str, AttentionKinds]):
    """What its layers ask for by structure in which a model has passed; copies of it, which get adapters, share it."""

    def __deepcopy__(self, memo: object) -> _Verified:
        return self


@dataclass(frozen=True, slots=True)
class Probe:
    """A group whose positions begin at `start`: with two of them a row holds both ends of the model's positions."""

    group: PrefixGroup
    start: int

    @property
    def sequences(self) -> list[list[int]]:
        """The prompt with each response, all of one length L."""
        return [self.group.prompt_ids + response for response in self.group.responses]


@dataclass
class _Recorder:
    """Packed attention that records what the layers ask for."""

    segments: Segments
    kinds: set[tuple[int | None, int]] = field(default_factory=set)

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, form: AttentionForm) -> Tensor:
        self.kinds.add((form.window, q.shape[-1]))
        return PackedAttention(self.segments).attend(module, q, k, v, form)


@torch.no_grad()
def verify(base: PreTrainedModel) -> AttentionKinds:
    """Compare the packed path with plain forwards on two small groups; done once per model and structure.

    Returns:
        What the layers ask of the attention.

    Raises:
        ConfigError: naming the architecture and what differs.
    """
    structure, passed = f"{base.dtype} {base.device} {base}", passed_structures(base)
    if structure in passed:
        return passed[structure]
    window = expected_window(base)
    head = head_of(base)  # outside of `refusals`, because its errors have remedies of their own
    probes = probes_of(base)
    (batch,) = pack([probe.group for probe in probes], max_tokens=64, order="given")
    starts = torch.tensor([probe.start for probe in probes])
    sizes = torch.tensor([probe.group.num_tokens for probe in probes])
    batch = batch.to(base.device)
    positions = batch.position_ids + starts.repeat_interleave(sizes).to(base.device)
    recorder = _Recorder(batch.segments)

    def packed() -> Tensor:
        logits = _packed_logits(base, head, batch, positions, recorder)
        check_windows(base, {asked for asked, _ in recorder.kinds}, window)
        return logits.unflatten(0, (batch.cu_rows.numel() - 1, -1))

    def separate() -> Tensor:
        return torch.cat([separate_logits(base, probe)[:, len(probe.group.prompt_ids) - 1 : -1] for probe in probes])

    check_path(base, "packed", packed, separate)
    passed[structure] = frozenset(recorder.kinds)
    return passed[structure]


def passed_structures(base: PreTrainedModel) -> dict[str, AttentionKinds]:
    """Return the structures in which a model has passed; call it before copying the model to share them."""
    found: dict[str, AttentionKinds] = vars(base).setdefault(_VERIFIED, _Verified())
    return found


def _packed_logits(
    base: PreTrainedModel, head: Head, batch: PackedBatch, positions: Tensor, recorder: _Recorder
) -> Tensor:
    """Float32 logits [N, V] of the rows that predict the batch's response tokens."""
    with attention_hook(base):
        out = base.base_model(
            input_ids=batch.input_ids, position_ids=positions, use_cache=False, attention_context=recorder
        )
    hidden = out.last_hidden_state[0][batch.rows]
    weight, bias = (None if x is None else x.to(hidden.dtype) for x in (head.weight, head.bias))
    logits = functional.linear(hidden, weight, bias).float() * head.logit_scale  # type: ignore[arg-type]
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def probes_of(model: PreTrainedModel) -> list[Probe]:
    """The probe: prompts of 3 tokens with two responses of 3, at the model's first and at its last positions."""
    ids = spread_ids(embedding_rows(model), 18)
    first, second = (PrefixGroup(part[:3], [part[3:6], part[6:]]) for part in (ids[:9], ids[9:]))
    num_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    return [Probe(first, 0), Probe(second, max(0, num_positions - first.max_length))]


def spread_ids(num_ids: int, count: int) -> list[int]:
    """Return token ids that lie apart over the whole vocabulary, by the golden ratio, like those of a text.

    At neighbouring or repeated ids the 16-bit error of some models is largest.
    """
    return [int(num_ids * (k * 0.6180339887 % 1)) for k in range(1, count + 1)]


def separate_logits(model: PreTrainedModel, probe: Probe) -> Tensor:
    """The model's own float32 logits [2, L, V] of the prompt with each response, by a plain forward."""
    ids = torch.tensor(probe.sequences, device=model.device)
    positions = torch.arange(probe.start, probe.start + ids.shape[1], device=model.device).expand_as(ids)
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    drops_it = capped and model.config._attn_implementation == "sdpa"  # as Gemma 2 is loaded by transformers 5.17
    with attention_by("eager", model) if drops_it else nullcontext():
        logits: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return logits.float()


def check_windows(model: PreTrainedModel, windows: Collection[int | None], expected: int | None) -> None:
    """Raises ConfigError where no layer came through the hook, or none asked for the expected sliding window."""
    if not windows:
        raise ConfigError(f"{type(model).__name__} does not attend through transformers' attention interface", FIX)
    if expected is not None and expected not in windows:
        text = f"has a sliding window of {expected} but does not pass it to the attention"
        raise ConfigError(f"{type(model).__name__} {text}", FIX)


def check_path(model: PreTrainedModel, path: str, run: Callable[[], Tensor], separate: Callable[[], Tensor]) -> None:
    """Compare the logits [P, R, V] of a path with those of separate forwards.

    A 16-bit model is compared in float32, then in 16 bits: there, TOLERANCE and OWN_ERRORS times the error of its own
    separate forwards are allowed. Logits of separate forwards that are not finite pass: whoever uses them reports that.

    Raises:
        ConfigError: the logits differ; or whatever `run` and `separate` raise, as `refusals` puts it.
    """
    name, dtype = type(model).__name__, model.dtype
    if dtype not in SIXTEEN_BITS:
        with refusals(model):
            got, exact = run(), separate()
        _compare(name, path, got, exact, TOLERANCE.get(dtype, 1e-1))
        return
    with refusals(model), in_float32(model):
        got, exact = run(), separate()
    _compare(name, path, got, exact, TOLERANCE[torch.float32 if is_plain(model) else dtype])
    with refusals(model):
        got, own = run(), separate()
    error, own_error = _median_error(got, exact), _median_error(own, exact)
    if own.isfinite().all() and not error <= TOLERANCE[dtype] + OWN_ERRORS * own_error:
        kind = str(dtype).removeprefix("torch.")
        text = (
            f"in {kind} its {path} logits are {error:.1e} of the largest off float32, those of its own {own_error:.1e}"
        )
        raise ConfigError(f"{name}: {text}", "compute in float32 on this device")


def _compare(name: str, path: str, got: Tensor, exact: Tensor, tolerance: float) -> None:
    error = _row_errors(got, exact).max().item()
    if exact.isfinite().all() and not error <= tolerance:
        raise ConfigError(f"{name}: {path} and separate forwards differ by {error:.1e} of the largest logit", FIX)


def _median_error(got: Tensor, exact: Tensor) -> float:
    """The largest of the parts' median errors."""
    return _row_errors(got, exact).median(-1).values.max().item()


def _row_errors(got: Tensor, exact: Tensor) -> Tensor:
    """[P, R]: the largest difference of each row as a part of the largest logit."""
    return (got - exact).abs().amax(-1) / exact.abs().max().clamp_min(1e-6)


def expected_window(model: PreTrainedModel) -> int | None:
    """The sliding window that some layer must ask for; raises ConfigError for a model that cannot be packed.

    A window as long as the model's context hides nothing, so nobody need ask for it.
    """
    refuse_unsupported(model.config)
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None)
    slides = "sliding_attention" in layers if layers is not None else getattr(config, "use_sliding_window", True)
    window = getattr(config, "sliding_window", None) if slides else None
    context = getattr(config, "max_position_embeddings", None)
    return None if window is not None and context is not None and window >= context else window


@contextmanager
def refusals(model: PreTrainedModel) -> Iterator[None]:
    """Turns what a probe's forward raises into a ConfigError that names the architecture and says what to use."""
    name = type(model).__name__
    try:
        yield
    except (ConfigError, TypeError, ValueError) as error:
        text = error.problems[0].message if isinstance(error, ConfigError) else str(error).partition("\n")[0]
        raise ConfigError(text if name in text else f"{name}: {text}", FIX) from error
