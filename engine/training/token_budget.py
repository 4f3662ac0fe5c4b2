"""The token budget of a micro-batch: halved when memory runs out, then kept, and equal on all ranks."""

from __future__ import annotations

import os
from pathlib import Path

from macpo.engine.console import notice
from macpo.engine.data.pack import PackedBatch
from macpo.engine.distributed.agree import on_main
from macpo.engine.distributed.failures import make_room
from macpo.engine.distributed.world import World
from macpo.engine.errors import Again, MacpoError, ResourceError
from macpo.engine.files import read_json, write_json


class TokenBudget:
    """How many tokens a micro-batch may hold.

    Args:
        tokens: the limit of the settings.
        folder: the stage's checkpoints, where an abandoned attempt leaves its note.
        world: all ranks of the stage.
    """

    def __init__(self, tokens: int, folder: Path, world: World) -> None:
        self.tokens = self._allowed = tokens
        self._note, self._stage = folder / "microbatch.json", str(folder.parent)
        self._world = world

    def shrink(self, where: str, batch: PackedBatch, names: str, *, collective: bool) -> bool:
        """Set this rank's budget to half of the micro-batch that did not fit, unless dropping idle models makes room.

        Returns whether the budget is smaller.

        Raises:
            ResourceError: the micro-batch was one group.
            Again: the other ranks are inside the same micro-batch and cannot be interrupted; the note is written.
        """
        what = f"{where}: a micro-batch of {batch.num_tokens} tokens does not fit in memory"
        if make_room():
            if collective:
                raise self._beside(what)
            return False
        if len(batch.groups) == 1:
            raise ResourceError(
                f"{where}: one group of {batch.num_tokens} tokens does not fit in memory: {names}",
                "turn on compute.parallel.checkpointing (full saves most), lower context_tokens for shorter responses, "
                "or spread the weights (compute.parallel.sharding: shard)",
                file=self._stage,
            )
        self.tokens = batch.num_tokens // 2
        if collective:
            self._note.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._note, {"microbatch_tokens": self.tokens})
            fix = f"run the same command again: it goes on with micro-batches of at most {self.tokens} tokens"
            raise Again(what, fix, file=self._stage)
        return True

    def no_room(self, where: str, error: BaseException) -> ResourceError:
        """The error for a step that ran out of memory outside its micro-batches."""
        what = f"{where}: no memory for gradients or optimizer states ({' '.join(str(error).split())})"
        if make_room():
            return self._beside(what)
        fix = "train with LoRA, or spread the weights (compute.parallel.sharding: shard)"
        return ResourceError(what, fix, file=self._stage)

    def _beside(self, what: str) -> Again:
        """Idle models took the memory; the next attempt loads nothing but what it trains."""
        return Again(f"{what}, beside models that were kept loaded", "run the same command again", file=self._stage)

    def agree(self, where: str) -> None:
        """Take the smallest budget of any rank on all ranks from now on; collective."""
        found = self._world.gather(self.tokens)
        self.tokens = min(found)
        self._say(f"{where}: out of memory on rank {found.index(self.tokens)}")

    def recall(self) -> None:
        """Take the budget noted by an abandoned attempt, if there is one; collective."""
        found = on_main(self._world, self._noted)
        if found and found < self.tokens:
            self.tokens = found
            self._say("an earlier attempt ran out of memory")

    def _noted(self) -> int:
        """The note's number; 0 where there is no note, or one that says nothing."""
        try:
            note = read_json(self._note) if os.path.lexists(self._note) else {}
        except MacpoError as error:
            note = error
        tokens = note.get("microbatch_tokens", 0) if isinstance(note, dict) else None
        if not isinstance(tokens, int) or tokens < 0:
            notice(f"note: {self._note} is ignored: it names no number of tokens")
            return 0
        return tokens

    def _say(self, why: str) -> None:
        if self._world.is_main:
            notice(
                f"note: {why}: micro-batches have at most {self.tokens} tokens from here on (the settings allow "
                f"{self._allowed})"
            )
