"""BatchRunner: prefills and decodes a dense batch over the slot cache until every request is answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from macpo.engine.attention import AttentionContext
from macpo.engine.errors import Stopped
from macpo.engine.generation.context import DecodeAttention, PrefillAttention
from macpo.engine.generation.kv_cache import SlotCache
from macpo.engine.generation.multilora import StackedAdapters
from macpo.engine.generation.rows import Row
from macpo.engine.generation.sampling import RowSampler
from macpo.engine.generation.scheduler import Group, Scheduler

PREFILL_TOKENS = 8192
"""Prompt tokens of one packed forward."""
STOP_TEXT_STEPS = 8
"""Decode steps between two looks for stop texts."""
STOP_CHECK_STEPS = 16
"""Decode steps between two questions whether the run should stop."""

MakeRow = Callable[[Group, int], Row]


class BatchRunner:
    """One run of the scheduler's requests; the model's attention hook is on and the model in eval mode.

    Live rows are `rows[0:n]` in the slots 0 .. n-1. Between two changes of the batch the steps run on device state
    alone; a finished row idles in its slot until an eighth of the batch is done or enough slots are free for a refill.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        scheduler: Scheduler,
        cache: SlotCache,
        make_row: MakeRow,
        *,
        num_tokens: int,
        tokenizer: object,
        should_stop: Callable[[], bool],
        adapters: StackedAdapters | None = None,
    ) -> None:
        self.model = model
        self.adapters = adapters
        self.scheduler = scheduler
        self.cache = cache
        self.make_row = make_row
        self.num_tokens = num_tokens
        self.tokenizer = tokenizer
        self.should_stop = should_stop
        self.device = model.device
        self.sync_steps = 1 if self.device.type == "cpu" else 8
        self.rows: list[Row] = []
        self._columns = torch.arange(cache.slot_tokens, device=self.device)

    def run(self, on_done: Callable[[Row], None]) -> None:
        """Answers everything; `on_done` takes each row once it has ended, in a deterministic order."""
        while True:
            for row in self.rows:
                if row.done:
                    on_done(row)
            self._reorganise()
            if not self.rows:
                return
            self._decode()

    def _reorganise(self) -> None:
        """Drops done rows and fills their slots with waiting requests or the last rows."""
        slots: list[Row | None] = [None if row.done else row for row in self.rows]
        slots += [None] * (self.scheduler.num_slots - len(slots))
        free = [slot for slot, row in enumerate(slots) if row is None]
        batch: list[tuple[Group, list[int]]] = []
        for group in self.scheduler.admit(len(free)):
            own, free = free[: len(group.samples)], free[len(group.samples) :]
            batch.append((group, own))
            for slot, sample in zip(own, group.samples, strict=True):
                slots[slot] = self.make_row(group, sample)
        self._close_holes(slots, {slot for _, own in batch for slot in own})
        self.rows = [row for row in slots if row is not None]
        for part in _parts(batch):
            self._check_stop()
            self._prefill(part, slots)

    def _close_holes(self, slots: list[Row | None], new: set[int]) -> None:
        """Moves the last rows into free slots below them. New rows fill the lowest slots, so they never move."""
        moves: list[tuple[int, int]] = []
        num_columns = 0
        last = len(slots) - 1
        for hole in range(len(slots)):
            while last > hole and slots[last] is None:
                last -= 1
            row = slots[last]
            if last <= hole:
                break
            if slots[hole] is None and row is not None:
                assert last not in new
                moves.append((last, hole))
                num_columns = max(num_columns, row.position)
                slots[hole], slots[last] = row, None
        self.cache.move(moves, num_columns)

    def _prefill(self, part: Sequence[tuple[Group, list[int]]], slots: Sequence[Row | None]) -> None:
        """Packed forward of some prompts, and the first token of all their samples."""
        prompts = [group.request.prompt_ids for group, _ in part]
        if self.adapters is not None:
            self.adapters.assign([group.request.adapter for group, _ in part for _ in group.request.prompt_ids])
        context = PrefillAttention(self.cache, list(map(len, prompts)), [own for _, own in part], self.device)
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=self.device)
        logits = self._forward(ids, context.segments.positions(), context, context.last_rows)
        rows = [row for _, own in part for slot in own if (row := slots[slot]) is not None]
        counts = torch.tensor([len(own) for _, own in part], device=self.device)
        sampler = RowSampler(rows, self.num_tokens, self.device)
        tokens, raw_logps, logps = (x.tolist() for x in sampler(logits.repeat_interleave(counts, 0)))
        for i, row in enumerate(rows):
            row.extend(tokens[i : i + 1], raw_logps[i : i + 1], logps[i : i + 1])

    def _decode(self) -> None:
        """Steps until the batch is worth changing; leaves no step behind that the rows have not taken."""
        rows = self.rows
        num_done = sum(row.done for row in rows)
        if self._worth_changing(num_done):
            return
        if self.adapters is not None:
            self.adapters.assign([row.request.adapter for row in rows])
        sampler = RowSampler(rows, self.num_tokens, self.device)
        stops, offsets = _stop_table(rows, self.num_tokens, self.device)
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
            tokens, raw_logps, logps = sampler(self._forward(tokens, positions, context, None))
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
            num_done = self._take(log, has_stop_text)
            if self._worth_changing(num_done):
                return
            log = []
            limit = _steps_left(rows)
            idle = torch.tensor([row.done for row in rows], device=self.device)
            moving.masked_fill_(idle, 0)
            offsets.masked_fill_(idle, 0)
            hits.zero_()

    def _take(self, log: Sequence[tuple[Tensor, Tensor, Tensor]], look_for_text: bool) -> int:
        """Hands the rows the tokens of some steps; returns how many rows are done."""
        columns = [torch.stack(steps, 1).tolist() for steps in zip(*log, strict=True)]
        for row, tokens, raw_logps, logps in zip(self.rows, *columns, strict=True):
            row.extend(tokens, raw_logps, logps)
            if look_for_text and row.params.stop and not row.done:
                row.done = row.stopped_in_tail(self.tokenizer, len(log))
        return sum(row.done for row in self.rows)

    def _worth_changing(self, num_done: int) -> bool:
        """Whether a refill can start or an eighth of the batch idles."""
        num_live = len(self.rows) - num_done
        if num_live == 0 or self.scheduler.ready(self.scheduler.num_slots - num_live):
            return True
        return num_done > 0 and num_done * 8 >= len(self.rows)

    def _check_stop(self) -> None:
        if self.should_stop():
            raise Stopped("stopped while generating", "run the same command again")

    def _forward(self, ids: Tensor, positions: Tensor, context: AttentionContext, rows: Tensor | None) -> Tensor:
        """Logits [rows, W] of a packed row of ids [T] at positions [T]; all T rows where rows is None."""
        logits: Tensor = self.model(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            attention_context=context,
            logits_to_keep=0 if rows is None else rows,
        ).logits[0]
        # A model that does not know logits_to_keep swallows it among its keywords.
        return logits if rows is None or logits.shape[0] == rows.numel() < ids.numel() else logits[rows]


def _parts(batch: Sequence[tuple[Group, list[int]]]) -> Iterator[list[tuple[Group, list[int]]]]:
    """Consecutive groups whose prompts together stay within PREFILL_TOKENS (one longer prompt goes alone)."""
    part: list[tuple[Group, list[int]]] = []
    num_tokens = 0
    for item in batch:
        length = len(item[0].request.prompt_ids)
        if part and num_tokens + length > PREFILL_TOKENS:
            yield part
            part, num_tokens = [], 0
        part.append(item)
        num_tokens += length
    if part:
        yield part


def _steps_left(rows: Sequence[Row]) -> int:
    """Steps until a live row reaches its budget."""
    return min((row.budget - len(row.tokens) for row in rows if not row.done), default=0)


def _stop_table(rows: Sequence[Row], num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(flat bool table, offsets [rows]): `table[offset + token]` says whether the token ends the row.

    Block 0 of the table is empty: rows that are done point there and raise no more hits.
    """
    sets = sorted({row.stop_ids for row in rows if not row.done}, key=sorted)
    table = torch.zeros(len(sets) + 1, num_tokens, dtype=torch.bool)
    for block, stop_ids in enumerate(sets, 1):
        table[block, [i for i in stop_ids if i < num_tokens]] = True
    blocks = [0 if row.done else sets.index(row.stop_ids) + 1 for row in rows]
    return table.flatten().to(device), (torch.tensor(blocks) * num_tokens).to(device)
