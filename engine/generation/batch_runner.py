"""BatchRunner: prefills and decodes a dense batch until every request has its responses.

The subclasses hold keys and values: in slots (`slots/runner.py`) or in blocks (`pool/runner.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from macpo.engine.distributed.world import ALONE, World
from macpo.engine.errors import Stopped
from macpo.engine.generation.multilora import StackedAdapters
from macpo.engine.generation.request import Request
from macpo.engine.generation.sampling import RowSampler
from macpo.engine.generation.scheduler import Group, Scheduler
from macpo.engine.generation.sequence import ActiveSequence
from macpo.engine.generation.vocabulary import Vocabulary
from macpo.engine.models.attention_hook import AttentionContext
from macpo.engine.progress import Count, uncounted
from macpo.kernels import Segments
from macpo.kernels.transfer import to_device

CPU_PREFILL_TOKENS, PREFILL_TOKENS = 2048, 8192
"""Most prompt tokens of one packed forward."""
STOP_TEXT_STEPS = 8
"""Decode steps between two searches for stop texts."""
STOP_CHECK_STEPS = 16
"""Decode steps between two checks whether the run should stop."""
LOG_STEPS = 64
"""Most decode steps before the sequences take the tokens that were drawn."""

Part = Sequence[tuple[Group, list[ActiveSequence]]]
"""Requests of one prefill with the sequences of their samples."""


class PrefillContext(AttentionContext, Protocol):
    """Says how packed prompts attend and where their keys and values go."""

    segments: Segments
    last_rows: Tensor
    """[prompts]: packed row of each prompt's last token."""


@dataclass(frozen=True, slots=True)
class Job:
    """What all batches of a generator's run have in common."""

    model: PreTrainedModel
    vocabulary: Vocabulary
    """The ids that may be drawn."""
    tokenizer: object
    make_sequence: Callable[[Request, int], ActiveSequence]
    """Starts the sequence of a request's sample."""
    should_stop: Callable[[], bool]
    count: Count = uncounted
    team: World = ALONE
    """The tensor-parallel group."""
    adapters: StackedAdapters | None = None
    """None: the model's active adapter serves every request."""


class BatchRunner(ABC):
    """Runs the scheduler's requests; the model's attention hook must be on and the model in eval mode.

    `rows[i]` is the sequence in row i of the batch. Between two changes of the batch the steps run on device state
    alone; a finished sequence idles in its row until an eighth of the batch is done or a refill fits the free rows.
    """

    def __init__(self, scheduler: Scheduler, job: Job) -> None:
        self.scheduler = scheduler
        self.job = job
        self.device = job.model.device
        self.rows: list[ActiveSequence] = []

    @abstractmethod
    def _context(self, part: Part) -> PrefillContext:
        """Attention context of a part's packed prompts."""

    @abstractmethod
    def _decode(self) -> None:
        """Decodes until the batch is worth changing; the sequences have then taken every token that was drawn."""

    def _admit(self, num_free: int) -> list[Group]:
        return self.scheduler.admit(num_free)

    def _opened(self, group: Group, rows: list[ActiveSequence]) -> None:  # noqa: B027 (a cache may have nothing to do)
        """Called when a group starts as these sequences."""

    def _closed(self, row: ActiveSequence) -> None:  # noqa: B027
        """Called when a sequence has ended and leaves the batch."""

    def _moved(self, moves: Sequence[tuple[int, int]], num_tokens: int) -> None:  # noqa: B027
        """Called when sequences of at most `num_tokens` tokens move from row a to row b, for every (a, b)."""

    def run(self, on_done: Callable[[ActiveSequence], None]) -> None:
        """Runs all requests; `on_done` takes each sequence once it has ended, in a deterministic order."""
        while True:
            for row in self.rows:
                if row.done:
                    self._closed(row)
                    on_done(row)
            self._reorganise()
            if not self.rows:
                return
            self._decode()

    def _reorganise(self) -> None:
        """Drops sequences that are done and fills their rows with waiting requests or the last sequences."""
        places: list[ActiveSequence | None] = [None if row.done else row for row in self.rows]
        places += [None] * (self.scheduler.num_slots - len(places))
        free = [place for place, row in enumerate(places) if row is None]
        batch: list[tuple[Group, list[ActiveSequence]]] = []
        new: set[int] = set()
        for group in self._admit(len(free)):
            own, free = free[: len(group.samples)], free[len(group.samples) :]
            rows = [self.job.make_sequence(group.request, sample) for sample in group.samples]
            for place, row in zip(own, rows, strict=True):
                places[place] = row
            new.update(own)
            batch.append((group, rows))
            self._opened(group, rows)
        self._close_holes(places, new)
        self.rows = [row for row in places if row is not None]
        for part in _parts(batch, CPU_PREFILL_TOKENS if self.device.type == "cpu" else PREFILL_TOKENS):
            self._check_stop()
            self._prefill(part)

    def _close_holes(self, places: list[ActiveSequence | None], new: set[int]) -> None:
        """Moves the last sequences into free rows below them; new ones fill the lowest rows, so they never move."""
        moves: list[tuple[int, int]] = []
        num_tokens = 0
        last = len(places) - 1
        for hole in range(len(places)):
            while last > hole and places[last] is None:
                last -= 1
            row = places[last]
            if last <= hole:
                break
            if places[hole] is None and row is not None:
                assert last not in new
                moves.append((last, hole))
                num_tokens = max(num_tokens, row.position)
                places[hole], places[last] = row, None
        self._moved(moves, num_tokens)

    def _prefill(self, part: Part) -> None:
        """Runs one packed forward of some prompts and draws the first token of all their samples."""
        prompts = [group.request.prompt_ids for group, _ in part]
        if self.job.adapters is not None:
            self.job.adapters.assign([group.request.adapter for group, _ in part for _ in group.request.prompt_ids])
        context = self._context(part)
        ids = to_device(torch.tensor([token for prompt in prompts for token in prompt]), self.device)
        logits = next_logits(self.job.model, ids, context.segments.positions(), context, context.last_rows)
        rows = [row for _, own in part for row in own]
        counts = to_device(torch.tensor([len(own) for _, own in part]), self.device)
        sampler = RowSampler(rows, self.job.vocabulary, self.device, self.job.team)
        tokens, raw_logps, logps = (
            x.tolist() for x in sampler(logits.repeat_interleave(counts, 0, output_size=len(rows)))
        )
        new = [row.extend(tokens[i : i + 1], raw_logps[i : i + 1], logps[i : i + 1]) for i, row in enumerate(rows)]
        self.job.count(tokens=sum(new))

    def _take(self, steps: Sequence[Tensor], look_for_text: bool) -> int:
        """Gives the sequences tokens, raw and processed log-probs [n, steps]; returns how many are done."""
        columns = [x.tolist() for x in steps]
        num_new = 0
        for row, tokens, raw_logps, logps in zip(self.rows, *columns, strict=True):
            num_new += row.extend(tokens, raw_logps, logps)
            if look_for_text and row.params.stop and not row.done:
                row.done = row.has_stopped(self.job.tokenizer, len(tokens))
        self.job.count(tokens=num_new)
        return sum(row.done for row in self.rows)

    def _worth_changing(self, num_done: int, num_free_blocks: int = 0) -> bool:
        """Whether a refill can start or an eighth of the batch idles."""
        num_live = len(self.rows) - num_done
        if num_live == 0 or self.scheduler.ready(self.scheduler.num_slots - num_live, num_free_blocks):
            return True
        return num_done > 0 and num_done * 8 >= len(self.rows)

    def _check_stop(self) -> None:
        if self.job.should_stop():
            raise Stopped("stopped while generating", "run the same command again")


def next_logits(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, context: AttentionContext, rows: Tensor | None
) -> Tensor:
    """Logits [rows, W] of packed ids [T] at positions [T]; of all T tokens where rows is None."""
    logits: Tensor = model(
        input_ids=ids[None],
        position_ids=positions[None],
        use_cache=False,
        attention_context=context,
        logits_to_keep=0 if rows is None else rows,
    ).logits[0]
    # A model that does not know logits_to_keep swallows it among its keywords.
    return logits if rows is None or logits.shape[0] == rows.numel() < ids.numel() else logits[rows]


def _parts(batch: Part, most: int) -> Iterator[Part]:
    """Splits groups into runs whose prompts have at most `most` tokens together (a longer prompt goes alone)."""
    part: list[tuple[Group, list[ActiveSequence]]] = []
    num_tokens = 0
    for item in batch:
        length = len(item[0].request.prompt_ids)
        if part and num_tokens + length > most:
            yield part
            part, num_tokens = [], 0
        part.append(item)
        num_tokens += length
    if part:
        yield part
