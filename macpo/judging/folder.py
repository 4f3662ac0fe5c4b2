"""Where a judge's work on a run lies: `RUN/judging/NAME`, in no stage's folder, so that no stage depends on it.

replies.jsonl        every reply, by key: what was paid for
POLICY-vs-OPPONENT.jsonl, human-pairs.jsonl   one row a question: who stood where, and the verdict
judging.json         what follows from them
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from macpo.engine.console import say
from macpo.engine.errors import DataError
from macpo.engine.files import probe_writable, read_bytes, write_json, write_jsonl
from macpo.judging.results import Judging, Result, Validation
from macpo.judging.verdicts import Judgement

JUDGING = "judging"
RESULTS = "judging.json"


class JudgingFolder:
    """The folder of one judge in one run."""

    def __init__(self, run_dir: Path, name: str) -> None:
        self.path = run_dir / JUDGING / name

    @property
    def replies(self) -> Path:
        return self.path / "replies.jsonl"

    def make(self) -> None:
        """Create the folder. Raises ConfigError or ResourceError where it cannot be written."""
        probe_writable(self.path)

    def keep(
        self, about: Mapping[str, Any], title: str, judgements: Sequence[Judgement], found: Result | Validation
    ) -> Judging:
        """Write the rows of a comparison and what follows from them, beside what the same judge found before.

        `about` and `title` say who judged. What a judge of this name found with another model, prompt or setting is
        left out, with a line.
        """
        result = found.result if isinstance(found, Validation) else found
        rows = [row for each in judgements for row in each.rows(result.policy, result.opponent)]
        file = "human-pairs" if isinstance(found, Validation) else f"{result.policy}-vs-{result.opponent}"
        write_jsonl(self.path / f"{file}.jsonl", rows)
        kept = self._kept(about)
        kept = (
            kept.model_copy(update={"validation": found}) if isinstance(found, Validation) else kept.with_result(found)
        )
        kept = kept.model_copy(update={"title": title})
        write_json(self.path / RESULTS, kept.model_dump(mode="json"))
        return kept

    def _kept(self, about: Mapping[str, Any]) -> Judging:
        path = self.path / RESULTS
        if not path.exists():
            return Judging(judge=dict(about))
        try:
            before = read_judging(path)
        except DataError as error:
            say(f"note: {path} is written anew: {error.problems[0].message}")
            return Judging(judge=dict(about))
        changed = sorted(name for name in {*before.judge, *about} if before.judge.get(name) != about.get(name))
        if changed:
            say(f"note: {path} came from a judge with another {', '.join(changed)}; its results are left out")
            return Judging(judge=dict(about))
        return before


def read_judging(path: Path) -> Judging:
    """Read a `judging.json`. Raises DataError for one of another shape."""
    try:
        return Judging.model_validate_json(read_bytes(path))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:40] for part in first["loc"])
        raise DataError(f"{where or 'it'}: {first['msg']}", "judge again", file=path) from None
