"""DecodeStep: one decode step of a batch as pure device work on tensors at fixed addresses.

The host writes the rows' state when the batch changes (`load`), then calls `step` any number of times, eagerly or as a
replay of its CUDA graph, and reads now and then which rows are still running. A step updates in place everything that
it needs or leaves (last token, position, tokens to go, noise counter, tokens seen, log of what was drawn), without the
host. A row that has met a stop token or its budget has no tokens to go: it idles without writing.

Legend: R rows of the state, b rows of a step (a batch padded to a bucket), L blocks of a block table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from macpo.engine.distributed.world import ALONE, World
from macpo.engine.generation.batch_runner import LOG_STEPS, next_logits
from macpo.engine.generation.multilora import StackedAdapters
from macpo.engine.generation.params import SamplingParams
from macpo.engine.generation.pool.attention import PagedDecode
from macpo.engine.generation.pool.blocks import TRASH, KVPool
from macpo.engine.generation.sampling import draw, mark_seen, noise_key, penalised, sample_params
from macpo.engine.generation.sequence import ActiveSequence
from macpo.engine.generation.vocabulary import Vocabulary
from macpo.kernels import SampleParams
from macpo.kernels.transfer import copy_in, to_device

_INTS = ("token", "position", "to_go", "count", "adapter", "seed", "top_k")
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class StepShape:
    """What determines a step's tensors and kernels, besides the number of rows."""

    table_blocks: int
    """L; also bounds how far the attention kernels may split a context."""
    stop_ids: int
    """Most stop tokens of a row."""
    vocabulary: Vocabulary
    """The ids that may be drawn."""
    facts: tuple[tuple[str, Any], ...]
    """`SampleParams.facts` of all rows to come."""


def facts_of(settings: Sequence[SamplingParams]) -> tuple[tuple[str, Any], ...]:
    """Says which filters any of the settings turns on."""
    seen = torch.zeros(len(settings), 1, dtype=torch.bool) if penalised(settings) else None
    return tuple(sample_params(settings, seen, torch.device("cpu")).facts.items())


class DecodeStep:
    """State of `num_rows` rows over a pool; see the module's docstring."""

    def __init__(
        self, model: PreTrainedModel, pool: KVPool, num_rows: int, shape: StepShape, team: World = ALONE
    ) -> None:
        device = model.device
        self.team = team
        self.model = model
        self.pool = pool
        self.num_rows = num_rows
        self.shape = shape
        self.adapters: StackedAdapters | None = None
        self._facts = dict(shape.facts)
        self._columns = shape.vocabulary.on(device)
        self._ints = torch.zeros(len(_INTS), num_rows, dtype=torch.int64, device=device)
        self._floats = torch.ones(len(_FLOATS), num_rows, device=device)
        self._keys = torch.zeros(num_rows, 3, dtype=torch.int64, device=device)
        self._stop_ids = torch.full((num_rows, shape.stop_ids), -1, device=device)
        self._table = torch.full((num_rows, shape.table_blocks), TRASH, dtype=torch.int32, device=device)
        self._seen: Tensor | None = None
        if self._facts["penalised"]:
            self._seen = torch.zeros(num_rows, shape.vocabulary.num_tokens, dtype=torch.bool, device=device)
        self._cursor = torch.zeros(1, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(LOG_STEPS, num_rows, dtype=torch.int64, device=device)
        self._logps = torch.zeros(2, LOG_STEPS, num_rows, device=device)  # raw, processed
        self._to_go = self._ints[_INTS.index("to_go")]

    def load(self, rows: Sequence[ActiveSequence], tables: Sequence[Sequence[int]]) -> None:
        """Makes these sequences, with their block tables, the batch; the rows beyond them are padding."""
        n, (width, num_stops) = len(rows), (self.shape.table_blocks, self.shape.stop_ids)
        pad = [0] * (self.num_rows - n)  # padding repeats the first row's settings, so that the facts hold for it
        order = torch.tensor([*range(n), *pad])
        index = (lambda _: 0) if self.adapters is None else self.adapters.index
        ints = [
            (
                row.tokens[-1] if row.tokens else 0,
                row.position,
                0 if row.done else row.budget - len(row.tokens),
                len(row.tokens),
                index(row.request.adapter),
                row.params.seed,
                row.params.top_k,
            )
            for row in rows
        ]
        floats = [[getattr(row.params, name) for name in _FLOATS] for row in rows]
        stops = [[*sorted(row.stop_ids), *[-1] * (num_stops - len(row.stop_ids))] for row in rows]
        padded = [[*table, *[TRASH] * (width - len(table))] for table in tables] + [[TRASH] * width for _ in pad]
        copy_in(self._ints, torch.tensor(ints)[order].T)
        copy_in(self._floats, torch.tensor(floats)[order].T)
        copy_in(self._keys, torch.tensor([noise_key(row) for row in rows])[order])
        copy_in(self._stop_ids, torch.tensor(stops)[order])
        copy_in(self._table, torch.tensor(padded, dtype=torch.int32))
        self._to_go[n:] = 0
        self._cursor.zero_()
        if self._seen is not None:
            self._seen.zero_()
            mark_seen(self._seen, rows)

    def clear(self) -> None:
        """Empties every row, whatever state it is in."""
        self._ints.zero_()  # an adapter's index, too, may be one that the next stack lacks
        self._table.fill_(TRASH)
        self._cursor.zero_()

    def step(self, num_rows: int) -> None:
        """Draws one token for the first `num_rows` rows; called at most LOG_STEPS times between two `take`s."""
        b, size = num_rows, self.pool.block_tokens
        token, position, to_go, count, adapter, seed, top_k = self._ints[:, :b]
        temperature, top_p, min_p, penalty = self._floats[:, :b]
        table = self._table[:b]
        idle = to_go == 0
        block = table.gather(1, (position // size)[:, None])[:, 0].long()
        slots = (block * size + position % size).masked_fill(idle, -1)
        lens = (position + 1).masked_fill(idle, 1).int()  # an idle row reads one token
        if self.adapters is not None:
            self.adapters.select(adapter)
        logits = next_logits(self.model, token, position, PagedDecode(self.pool, table, lens, slots), None)
        seen = None if self._seen is None else self._seen[:b]
        params = SampleParams.of_checked(seed, temperature, top_p, top_k, min_p, penalty, seen, self._facts)
        drawn, raw_logps, logps = draw(logits, self._columns, params, self._keys[:b], count, self.team)
        self._tokens[:, :b].index_copy_(0, self._cursor, drawn[None])
        self._logps[:, :, :b].index_copy_(1, self._cursor, torch.stack((raw_logps, logps))[:, None])
        self._cursor += 1
        stopped = (self._stop_ids[:b] == drawn[:, None]).any(1)
        to_go.sub_(1).clamp_(min=0).masked_fill_(stopped, 0)
        running = to_go > 0
        token.copy_(torch.where(running, drawn, token))
        position.add_(running)

    def running(self, num_rows: int) -> list[bool]:
        """Which of the first `num_rows` rows are still running; waits for the device."""
        return (self._to_go[:num_rows] > 0).tolist()

    def end(self, rows: Sequence[int]) -> None:
        """Ends rows that the host has found to be done."""
        self._to_go.index_fill_(0, to_device(torch.tensor(rows, dtype=torch.int64), self._to_go.device), 0)

    def take(self, num_rows: int, num_steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, raw and processed log-probs [num_rows, num_steps] of the steps since the last call."""
        self._cursor.zero_()
        raw_logps, logps = self._logps[:, :num_steps, :num_rows].transpose(1, 2).cpu()
        return self._tokens[:num_steps, :num_rows].T.cpu(), raw_logps, logps
