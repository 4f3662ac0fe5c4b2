"""What judges found in a run, as plain text and for the report (macpo/judging/results.py says what each number is)."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from macpo.engine.errors import MacpoError
from macpo.engine.files import sha256
from macpo.judging.folder import JUDGING, RESULTS, read_judging
from macpo.judging.results import Estimate, Judging, Result
from macpo.report.findings import columns
from macpo.report.policy_names import named
from macpo.report.run_reader import RunReader

log = logging.getLogger(__name__)

HEADINGS = (
    "policy",
    "opponent",
    "win",
    "tie",
    "lose",
    "win rate",
    "at equal length",
    "consistent",
    "A/A",
    "B/B",
    "A wins",
    "longer wins",
    "failed",
)


@dataclass(frozen=True, slots=True)
class Judged:
    """One judge's results in a run, ready for a table."""

    name: str
    title: str
    validation: str
    rows: list[list[str]]
    notes: list[str]


def table(name: str, judging: Judging) -> list[str]:
    """The lines that `macpo evaluate` prints."""
    shown = shown_of(name, judging)
    lines = [f"judge {name}: {shown.title}", shown.validation]
    if shown.rows:
        lines += ["", *columns([list(HEADINGS), *shown.rows], 2)]
    return [*lines, *shown.notes]


def judged(run: RunReader) -> list[Judged]:
    """What every judge found, by name; a file that cannot be read is left out, with a line."""
    found = []
    for path in sorted((run.path / JUDGING).glob(f"*/{RESULTS}")):
        try:
            judging = read_judging(path)
        except MacpoError as error:
            log.warning("%s is ignored: %s", path, error.problems[0].message)
            continue
        found.append(shown_of(path.parent.name, judging, [each for each in judging.results if _is_stale(run, each)]))
    return found


def shown_of(name: str, judging: Judging, stale: list[Result] | None = None) -> Judged:
    """One judge's results; `stale`: those of responses that the run no longer has."""
    notes = [f"{_who(each)}: the run's responses have changed since; judge again" for each in stale or []]
    for each in judging.results:
        if each.failed:
            one, two = each.failed_first
            notes.append(
                f"{_who(each)}: {each.failed} comparisons without a verdict; {one} questions with {each.policy} first, "
                f"{two} with {each.opponent} first; {each.unparsed} replies named no single verdict"
            )
    return Judged(name, judging.title, _validation(judging), [_row(each) for each in judging.results], notes)


def _validation(judging: Judging) -> str:
    found = judging.validation
    if found is None:
        return "not validated: nothing here says whether it agrees with people (macpo evaluate … --validate)"
    return (
        f"on {found.result.judged} human pairs: accuracy {_estimate(found.result.win_rate)}, kappa "
        f"{_estimate(found.kappa)}, consistent {_estimate(found.result.consistent)}; {found.note}"
    )


def _row(result: Result) -> list[str]:
    estimates = (result.win_rate, result.at_equal_length, result.consistent)
    counts = (result.first, result.second)
    return [
        result.policy,
        result.opponent,
        *map(str, (result.win, result.tie, result.lose)),
        *map(_estimate, estimates),
        *map(str, counts),
        *map(_estimate, (result.first_wins, result.longer_wins)),
        str(result.failed),
    ]


def _estimate(found: Estimate | None) -> str:
    return "–" if found is None else f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _who(result: Result) -> str:
    return f"{result.policy} against {result.opponent}"


def _is_stale(run: RunReader, result: Result) -> bool:
    """Whether the judged responses are no longer those of the run."""
    if result.answers is None:
        return False
    try:
        now = [sha256(named(run, who).responses) for who in (result.policy, result.opponent)]
    except MacpoError:
        return True
    return tuple(now) != result.answers
