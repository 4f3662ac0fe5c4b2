"""Human preferences -> pairs, and disjoint sets of their prompts.

    pairs, counts = load_preferences("hh-rlhf/harmless-base")
    sets = split(pairs, teacher=5000, student=5000, test=2000, seed=0)

Layouts of rows are in macpo/data/pair_layouts.py, prompts with a single response in macpo/data/examples.py.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from macpo.data.columns import check_read
from macpo.data.dialogues import prompt_before_response
from macpo.data.pair_layouts import COLUMNS, FORMATS, detect, reads
from macpo.data.prompts import Prompts, Repeats
from macpo.data.rows import EmptyText, Row, Source, in_words
from macpo.data.spool import Records, Spool, spooled, whole
from macpo.engine.data.messages import parts_of
from macpo.engine.data.records import Pair
from macpo.engine.errors import ConfigError, DataError, shown

log = logging.getLogger("macpo.data")

_DROPPED = ("empty_dropped", "identical_dropped", "prompt_mismatch_dropped", "malformed_dropped")
_PUBLISHED_EMPTIES = ("hh", "pku")


def load_preferences(
    source: Source | str | Path,
    *,
    format: str = "auto",
    preference: str = "better",
    empty: str = "auto",
    contradictions: str = "keep",
    margin: str | None = None,
) -> tuple[Records[Pair], dict[str, int]]:
    """Return the pairs in the order of the rows, and counts; the pairs are on disk if they are many.

    Args:
        source: which rows; a path alone reads its whole training split.
        format: layout of the rows; "auto" goes by the keys of the first row.
        preference: which PKU label decides, "better" or "safer".
        empty: a prompt or response of white space raises ("error") or drops the row ("drop"); "auto" drops in hh and
            pku, whose published files hold some.
        contradictions: pairs of one prompt that prefer the same two responses both ways stay ("keep") or all go
            ("drop").
        margin: column with the number by which `chosen` is better; None reads none.

    Counts: `rows`, `pairs`, `prompts` (distinct), `duplicate_rows`, `duplicate_prompts` (pairs beyond a prompt's
    first), `prefix_pairs` (one response begins with the other), and what was dropped: `identical_dropped`,
    `prompt_mismatch_dropped`, `malformed_dropped` (an HH dialogue without a last human turn), `empty_dropped`; where
    there are any, also `contradictory_pairs` or `contradictory_dropped`.
    Raises ConfigError for settings and paths, DataError with file, line and field for rows, or if no pair is left.
    """
    source = source if isinstance(source, Source) else Source(source)
    _check(format, source.columns, preference, empty, contradictions)
    counts: Counter[str] = Counter(dict.fromkeys(("rows", *_DROPPED, "prefix_pairs"), 0))
    spool, repeats, layout = Spool(Pair), Repeats(), format
    for number, row in enumerate(source.rows(), 1):
        if number == 1:
            layout = detect(row) if format == "auto" else format
            check_read(source.columns, layout, reads(layout, preference))
        counts["rows"] = number
        try:
            sides = FORMATS[layout](row, preference)
            dropped = "malformed_dropped" if sides is None else sides.why_dropped
            if sides is None or dropped:
                counts[dropped] += 1
                continue
            prompt = prompt_before_response(row, sides.chosen_prompt)
        except EmptyText:
            if empty == "error" or (empty == "auto" and layout not in _PUBLISHED_EMPTIES):
                raise
            counts["empty_dropped"] += 1
            continue
        counts["prefix_pairs"] += sides.has_prefix
        chosen, rejected = sides.chosen, sides.rejected
        pair = Pair(prompt, chosen["content"], rejected["content"])
        if (parts := (parts_of(chosen), parts_of(rejected))) != (None, None):
            pair = replace(pair, chosen_parts=parts[0], rejected_parts=parts[1])
        if margin is not None:
            pair = replace(pair, margin=_margin(row, margin))
        spool.add(pair)
        repeats.add(pair)
    repeated, contradicted = repeats.found()
    pairs = whole(spool)
    if contradicted.any():
        what = "contradictory_pairs" if contradictions == "keep" else "contradictory_dropped"
        counts[what] = int(contradicted.sum())
        if contradictions == "drop":
            pairs, repeated = pairs.take(np.flatnonzero(~contradicted)), repeated[~contradicted]
    if not pairs:
        what = ", ".join(f"{name}={n}" for name, n in counts.items() if n) or "it has no rows"
        raise DataError(f"no preference pair is left ({what})", "check the file and data.format", file=str(source.path))
    counts["pairs"] = len(pairs)
    counts["prompts"] = len(np.unique(pairs.ids))
    counts["duplicate_prompts"] = len(pairs) - counts["prompts"]
    counts["duplicate_rows"] = int(repeated.sum())
    reported = (*_DROPPED, "duplicate_rows", "duplicate_prompts", "contradictory_pairs", "contradictory_dropped")
    noted = {name: counts[name] for name in reported if counts[name]}
    if noted:
        name, number = Path(source.path).name, counts["rows"]
        log.warning("%s: %d pairs of %d rows; %s", name, len(pairs), number, in_words(noted))
    return pairs, dict(counts)


def _margin(row: Row, column: str) -> float:
    """Return the number in a column. Raises DataError, with file and line, for anything else."""
    if column not in row.fields:
        row.fail(column, "data.margin names it, but it is missing", "correct the row, or data.margin")
    found = row.fields[column]
    with contextlib.suppress(ValueError):
        found = float(found) if row.untyped else found
    if not isinstance(found, int | float) or isinstance(found, bool) or not math.isfinite(found):
        row.fail(column, f"must be a number, got {shown(found, 40)}", "correct the row, or data.margin")
    return float(found)


@dataclass(frozen=True, slots=True)
class Splits:
    """Disjoint sets of prompts; `teacher`, `reward` and `rest` keep every pair of a prompt, the others its first."""

    teacher: Records[Pair]
    student: Records[Pair]
    test: Records[Pair]
    dev: Records[Pair]
    reward: Records[Pair]
    rest: Records[Pair]


def split(
    pairs: Sequence[Pair],
    *,
    teacher: int,
    student: int,
    test: int,
    seed: int,
    dev: int = 0,
    reward: int = 0,
    held_out: Records[Pair] | None = None,
) -> Splits:
    """Draw this many distinct prompts into each set; the others go to `rest`.

    The draw orders prompts by a hash of seed and content, so it depends on neither the order of the rows nor other
    prompts; a larger teacher or student set never changes the test set, and the development set changes no other.
    Where pairs are `held_out`, the test set is drawn from these, and no other set has a prompt of it.
    Raises DataError, naming the numbers, if there are too few distinct prompts.
    """
    pairs = pairs if isinstance(pairs, Records) else spooled(pairs, Pair)
    start = test if held_out is None else 0
    tests = None if held_out is None else Prompts(held_out, seed).first(0, test)
    prompts = Prompts(pairs, seed, without=None if tests is None else tests.ids)
    wanted = start + student + teacher + dev + reward
    if len(prompts) < wanted or (tests is not None and len(tests) < test):
        found = f"{len(prompts)} distinct prompts (of {len(pairs)} pairs)"
        asked = f"teacher_prompts {teacher} + student_prompts {student} + test_prompts {test}"
        asked += f" + dev_prompts {dev}" if dev else ""
        asked += f" + reward_prompts {reward}" if reward else ""
        if tests is not None:
            found += f" to train on and {len(tests)} to evaluate on"
            wanted += test
        raise DataError(
            f"{found} are fewer than the {wanted} asked for: {asked}",
            "lower these numbers or add data",
            field="data",
        )
    middle, end = start + student, start + student + teacher
    last = end + dev
    return Splits(
        teacher=prompts.every(middle, end),
        student=prompts.first(start, middle),
        test=prompts.first(0, test) if tests is None else tests,
        dev=prompts.first(end, last),
        reward=prompts.every(last, last + reward),
        rest=prompts.every(last + reward),
    )


def _check(format: str, columns: Mapping[str, str], preference: str, empty: str, contradictions: str) -> None:
    known = ["auto", *FORMATS]
    for field, got, allowed in (
        ("data.format", format, known),
        ("data.preference", preference, ["better", "safer"]),
        ("data.empty", empty, ["auto", "error", "drop"]),
        ("data.contradictions", contradictions, ["keep", "drop"]),
        *(("data.columns", name, COLUMNS) for name in columns),
    ):
        if got not in allowed:
            raise ConfigError(f"got {got!r}", f"use {', '.join(allowed)}", field=field)
