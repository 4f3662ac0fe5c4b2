"""SlotRunner: generation over the slot cache, for CPUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from macpo.engine.generation.batch_runner import (
    LOG_STEPS,
    STOP_CHECK_STEPS,
    STOP_TEXT_STEPS,
    BatchRunner,
    Job,
    Part,
    next_logits,
)
from macpo.engine.generation.sampling import RowSampler
from macpo.engine.generation.scheduler import Scheduler
from macpo.engine.generation.sequence import ActiveSequence
from macpo.engine.generation.slots.attention import DecodeAttention, PrefillAttention
from macpo.engine.generation.slots.cache import SlotCache


class SlotRunner(BatchRunner):
    """Row i of the batch is in slot i of `cache`, which has the scheduler's number of slots."""

    def __init__(self, cache: SlotCache, scheduler: Scheduler, job: Job) -> None:
        super().__init__(scheduler, job)
        self.cache = cache
        self.sync_steps = 1 if self.device.type == "cpu" else 8
        self._columns = torch.arange(cache.slot_tokens, device=self.device)

    def _moved(self, moves: Sequence[tuple[int, int]], num_tokens: int) -> None:
        self.cache.move(moves, num_tokens)

    def _context(self, part: Part) -> PrefillAttention:
        slots = {id(row): slot for slot, row in enumerate(self.rows)}
        own = [[slots[id(row)] for row in rows] for _, rows in part]
        return PrefillAttention(self.cache, [len(group.request.prompt_ids) for group, _ in part], own, self.device)

    def _decode(self) -> None:
        rows = self.rows
        num_done = sum(row.done for row in rows)
        if self._worth_changing(num_done):
            return
        if self.job.adapters is not None:
            self.job.adapters.assign([row.request.adapter for row in rows])
        sampler = RowSampler(rows, self.job.vocabulary, self.device, self.job.team)
        stops, offsets = _stop_table(rows, self.job.vocabulary.num_tokens, self.device)
        index = torch.arange(len(rows), device=self.device)
        tokens = torch.tensor([row.tokens[-1] if row.tokens else 0 for row in rows], device=self.device)
        positions = torch.tensor([row.position for row in rows], device=self.device)
        moving = torch.tensor([int(not row.done) for row in rows], device=self.device)
        # Idle rows count too: a query whose window lies beyond the columns would leave NaN in its slot.
        num_columns = max(row.position for row in rows) + 1
        has_stop_text = any(row.params.stop for row in rows)
        hits = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        log: list[tuple[Tensor, Tensor, Tensor]] = []
        limit = _steps_left(rows)
        step = 0
        while True:
            context = DecodeAttention(self.cache, index, positions, self._columns[:num_columns])
            tokens, raw_logps, logps = sampler(next_logits(self.job.model, tokens, positions, context, None))
            log.append((tokens, raw_logps, logps))
            positions = positions + moving
            hits |= stops[offsets + tokens]
            num_columns += 1
            step += 1
            flush = len(log) == limit or (has_stop_text and step % STOP_TEXT_STEPS == 0)
            if not flush and step % self.sync_steps == 0:
                flush = self._worth_changing(num_done + int(hits.sum()))
            if step % STOP_CHECK_STEPS == 0:
                self._check_stop()
            if not flush:
                continue
            num_done = self._take([torch.stack(column, 1) for column in zip(*log, strict=True)], has_stop_text)
            if self._worth_changing(num_done):
                return
            log = []
            limit = _steps_left(rows)
            idle = torch.tensor([row.done for row in rows], device=self.device)
            moving.masked_fill_(idle, 0)
            offsets.masked_fill_(idle, 0)
            hits.zero_()


def _steps_left(rows: Sequence[ActiveSequence]) -> int:
    """Steps until a live sequence reaches its budget or the log is full."""
    return min(LOG_STEPS, min((row.budget - len(row.tokens) for row in rows if not row.done), default=0))


def _stop_table(rows: Sequence[ActiveSequence], num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(flat bool table, offsets [rows]): `table[offset + token]` says whether the token ends the sequence.

    Block 0 of the table is empty: sequences that are done point there and get no more hits.
    """
    sets = sorted({row.stop_ids for row in rows if not row.done}, key=sorted)
    table = torch.zeros(len(sets) + 1, num_tokens, dtype=torch.bool)
    for block, stop_ids in enumerate(sets, 1):
        table[block, [i for i in stop_ids if i < num_tokens]] = True
    blocks = [0 if row.done else sets.index(row.stop_ids) + 1 for row in rows]
    return table.flatten().to(device), (torch.tensor(blocks) * num_tokens).to(device)
