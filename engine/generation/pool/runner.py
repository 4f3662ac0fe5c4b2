"""PoolRunner: generation over the block pool, the way of GPUs; the same on a CPU, without graphs."""

from __future__ import annotations

from typing import Any

from macpo.engine.generation.batch_runner import LOG_STEPS, STOP_CHECK_STEPS, STOP_TEXT_STEPS, BatchRunner, Part
from macpo.engine.generation.pool.attention import PagedPrefill
from macpo.engine.generation.pool.blocks import BlockAllocator
from macpo.engine.generation.pool.capacity import bucket_of
from macpo.engine.generation.pool.session import PoolSession
from macpo.engine.generation.scheduler import Group
from macpo.engine.generation.sequence import Row

SYNC_STEPS = 8
"""Decode steps between two looks at which rows have ended: a row idles for at most seven."""


class PoolRunner(BatchRunner):
    """Rows hold blocks of the session's pool while they are in the batch; `num_blocks` of them are this run's."""

    def __init__(self, session: PoolSession, num_blocks: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.session = session
        self.step = session.step
        self.blocks = BlockAllocator(num_blocks)
        self._tables: dict[Row, list[int]] = {}

    def _admit(self, num_free: int) -> list[Group]:
        return self.scheduler.admit(num_free, self.blocks.num_free)

    def _opened(self, group: Group, rows: list[Row]) -> None:
        tables = self.blocks.open(self.scheduler.need(group), len(rows))
        self._tables.update(zip(rows, tables, strict=True))

    def _closed(self, row: Row) -> None:
        self.blocks.close(self._tables.pop(row))

    def _context(self, part: Part) -> PagedPrefill:
        tables = [[self._tables[row] for row in rows] for _, rows in part]
        return PagedPrefill(
            self.session.pool, [len(group.request.prompt_ids) for group, _ in part], tables, self.device
        )

    def _decode(self) -> None:
        rows = self.rows
        if self._worth_leaving([not row.done for row in rows]):
            return
        self.step.load(rows, [self._tables[row] for row in rows])
        bucket = bucket_of(len(rows))
        has_stop_text = any(row.params.stop for row in rows)
        num_steps, logged = 0, 0
        left = max(row.budget - len(row.tokens) for row in rows if not row.done)
        while True:
            now = min(SYNC_STEPS, left)
            for _ in range(now):
                self.session.run_step(bucket)
            num_steps, logged, left = num_steps + now, logged + now, left - now
            if num_steps % STOP_CHECK_STEPS == 0:
                self._check_stop()
            flush = logged + SYNC_STEPS > LOG_STEPS or (has_stop_text and num_steps % STOP_TEXT_STEPS == 0)
            if not flush and not self._worth_leaving(self.step.going(len(rows))):
                continue
            self._take(self.step.take(len(rows), logged), has_stop_text)
            logged = 0
            if self._worth_leaving([not row.done for row in rows]):
                return
            self.step.end([i for i, row in enumerate(rows) if row.done])

    def _worth_leaving(self, going: list[bool]) -> bool:
        """Whether the batch should change, given which rows go on."""
        ended = [row for row, goes in zip(self.rows, going, strict=True) if not goes]
        freed = {block for row in ended for block in self._tables[row] if self.blocks.holders(block) == 1}
        return self._worth_changing(len(ended), self.blocks.num_free + len(freed))
