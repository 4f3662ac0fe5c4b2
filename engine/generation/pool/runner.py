"""PoolRunner: generation over the block pool, for GPUs; it runs the same on a CPU, without graphs."""

from __future__ import annotations

from macpo.engine.generation.batch_runner import LOG_STEPS, STOP_CHECK_STEPS, STOP_TEXT_STEPS, BatchRunner, Job, Part
from macpo.engine.generation.pool.attention import PagedPrefill
from macpo.engine.generation.pool.blocks import BlockAllocator
from macpo.engine.generation.pool.capacity import bucket_of
from macpo.engine.generation.pool.session import PoolSession
from macpo.engine.generation.scheduler import Group, Scheduler
from macpo.engine.generation.sequence import ActiveSequence

SYNC_STEPS = 8
"""Decode steps between two checks which rows have ended: a row idles for at most seven."""


class PoolRunner(BatchRunner):
    """Sequences hold blocks of the session's pool while in the batch; this run may use `num_blocks` of them."""

    def __init__(self, session: PoolSession, num_blocks: int, scheduler: Scheduler, job: Job) -> None:
        super().__init__(scheduler, job)
        self.session = session
        self.step = session.step
        self.blocks = BlockAllocator(num_blocks)
        self._tables: dict[ActiveSequence, list[int]] = {}

    def _admit(self, num_free: int) -> list[Group]:
        return self.scheduler.admit(num_free, self.blocks.num_free)

    def _opened(self, group: Group, rows: list[ActiveSequence]) -> None:
        tables = self.blocks.open(self.scheduler.need(group), len(rows))
        self._tables.update(zip(rows, tables, strict=True))

    def _closed(self, row: ActiveSequence) -> None:
        self.blocks.close(self._tables.pop(row))

    def _context(self, part: Part) -> PagedPrefill:
        tables = [[self._tables[row] for row in rows] for _, rows in part]
        lengths = [len(group.request.prompt_ids) for group, _ in part]
        return PagedPrefill(self.session.pool, lengths, tables, self.device)

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
            if not flush and not self._worth_leaving(self.step.running(len(rows))):
                continue
            self._take(self.step.take(len(rows), logged), has_stop_text)
            logged = 0
            if self._worth_leaving([not row.done for row in rows]):
                return
            self.step.end([i for i, row in enumerate(rows) if row.done])

    def _worth_leaving(self, running: list[bool]) -> bool:
        """Whether the batch should change, given which rows are still running."""
        ended = [row for row, runs in zip(self.rows, running, strict=True) if not runs]
        freed = {block for row in ended for block in self._tables[row] if self.blocks.holders(block) == 1}
        return self._worth_changing(len(ended), self.blocks.num_free + len(freed))
