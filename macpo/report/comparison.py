"""The page and the plain table of `macpo compare`. No row is left out, and no mark is green that covers zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from macpo.comparison.results import METHOD, NAIVE, Results
from macpo.engine.files import atomic_write
from macpo.evaluation.summary import LABELS
from macpo.evaluation.uncertainty import Estimate
from macpo.report import charts
from macpo.report.findings import columns, signed
from macpo.report.judged import HEADINGS, Judged
from macpo.report.page import environment
from macpo.report.plots import INK, STUDENT, Line, dots, line_panels, series_style

MARKS = {"above": "good", "below": "bad", "open": "open"}
DIAGNOSTICS = {
    "kept": "score of the kept positives",
    "at_random": "score of a random candidate",
    "best": "score of the best candidate",
    "own": "score of the student's own responses",
    "kept_own_label": "kept positives that are the student's first label",
    "own_label_candidates": "candidates that are it",
    "separable": "separability by perplexity (AUC)",
    "inverted": "pairs whose rejected side scores as high",
    "same_first_word": "pairs that begin with the same word",
    "early_accuracy": "accuracy after a quarter of the training",
    "chosen_words": "words of the chosen side",
    "rejected_words": "words of the rejected side",
}


def write_comparison(
    out: Path,
    found: Results,
    explained: Mapping[int, Sequence[Mapping[str, Any]]],
    judges: Mapping[int, Sequence[Judged]],
) -> Path:
    """Write `compare.html` into a folder and return its path.

    Args:
        explained: the diagnostics of each seed.
        judges: what judges found in each seed's run.
    """
    page = (
        environment()
        .get_template("compare.html.j2")
        .render(
            title=f"MACPO compared with {len(found.of('method')) - 2} other methods",
            results=found,
            label=LABELS.get(found.metric, found.metric),
            marks=MARKS,
            lead=lead(found),
            open_rows=[row for row in found.rows if row.change is not None and row.verdict != "above"],
            scores=charts.svg(_scores(found)),
            curves=charts.svg(_curves(found)),
            teachers=charts.svg(_teachers(found)),
            forest=charts.svg(_forest(found)),
            diagnostics=DIAGNOSTICS,
            explained=explained,
            judges=judges,
            judge_headings=HEADINGS,
            links={seed: f"seed-{seed}/report.html" for seed in found.seeds},
        )
    )
    path = out / "compare.html"
    atomic_write(path, page)
    return path


def lead(found: Results) -> str:
    """The result in two sentences."""
    rows = {row.name: row for row in found.rows}
    method, naive = rows.get(METHOD), rows[NAIVE]
    label = LABELS.get(found.metric, found.metric)
    if method is None or method.change is None or method.score is None or naive.score is None:
        return f"The naive student's {label} is {_plain(naive.score)}; the method has not been run."
    said = {"above": "is above", "below": "is below", "open": "cannot be told from"}[method.verdict]
    ends = f"{_plain(method.score)} against {_plain(naive.score)} ({_bounds(method.change)})"
    first = f"The method {said} the naive student: {ends}."
    others = {row.name: row.score for row in found.of("method") if row.change and row.score and row.name != METHOD}
    higher = [name for name, score in others.items() if score.value > method.score.value]
    if not others:
        return first
    if not higher:
        return f"{first} No baseline has a higher mean."
    return f"{first} {len(higher)} of {len(others)} baselines have a higher mean: {', '.join(higher)}."


def table(found: Results) -> str:
    """The comparison as plain text, a line a row."""
    interval = "95% interval"
    heads = ["arm", "kind", "score", interval, "change", interval, "Holm p", "PGR", "words", "steps", "verdict"]
    lines = [heads]
    for row in found.rows:
        if row.left_out:
            lines.append([row.name, row.kind, "", "", "", "", "", "", "", "", "left out"])
            continue
        lines.append(
            [
                row.name,
                row.kind,
                _plain(row.score),
                _interval(row.score),
                signed(row.change.value) if row.change else "",
                _interval(row.change),
                "" if row.adjusted_p is None else f"{row.adjusted_p:.3f}",
                "" if row.kind == "bound" else _plain(row.recovered, "none"),
                "" if row.words is None else f"{row.words:.1f}",
                "" if row.ledger is None else f"{row.ledger.student_steps:,}",
                row.verdict if row.change else "",
            ]
        )
    seeds = ", ".join(map(str, found.seeds))
    what = LABELS.get(found.metric, found.metric)
    title = f"{what}, seed{'s' * (len(found.seeds) > 1)} {seeds}, {found.num_prompts} responses"
    reasons = [f"{row.name}: {row.left_out}" for row in found.rows if row.left_out]
    return "\n".join(
        [title, *columns(lines, 2), *reasons, "change: from naive-sft; of an ablation, the method's from it"]
    )


def _plain(estimate: Estimate | None, absent: str = "") -> str:
    return absent if estimate is None else f"{estimate.value:.3f}"


def _interval(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"[{estimate.low:.3f}, {estimate.high:.3f}]"


def _bounds(estimate: Estimate) -> str:
    return f"{signed(estimate.value)}, {_interval(estimate)}"


def _scores(found: Results) -> str:
    """Every method's score with its interval."""
    rows = [row for row in found.of("method", "bound") if row.score is not None]
    shown = [(row.name, row.score.value, (row.score.low, row.score.high), ()) for row in rows if row.score]
    return dots(shown, xlabel=LABELS.get(found.metric, found.metric), highlight={METHOD: STUDENT, "ceiling": INK})


def _curves(found: Results) -> str:
    """Scores by iteration of the methods that have rounds."""
    rows = [row for row in found.of("method") if len(row.by_iteration) > 1]
    lines = []
    for index, row in enumerate(rows):
        x, y = zip(*row.by_iteration, strict=True)
        colour, marker = (STUDENT, "o") if row.name == METHOD else series_style(index)
        lines.append(Line(row.name, x, y, colour, marker, width=2.8 if row.name == METHOD else 1.6))
    label = LABELS.get(found.metric, found.metric)
    return line_panels([("", label, lines)], xlabel="round", height=4.1, legend_columns=5) if lines else ""


def _teachers(found: Results) -> str:
    """The mean score by number of teachers."""
    rows = [
        (f"{count} teacher{'s' * (count > 1)} ({arms} arm{'s' * (arms > 1)})", score.value, (score.low, score.high), ())
        for count, arms, score in found.curve
    ]
    return dots(rows, xlabel=LABELS.get(found.metric, found.metric)) if rows else ""


def _forest(found: Results) -> str:
    """What each part of the method adds: the method minus the method without it."""
    changes = [(row.name, row.change) for row in found.of("ablation") if row.change]
    shown = [(name, change.value, (change.low, change.high), ()) for name, change in changes]
    label = f"the method's {LABELS.get(found.metric, found.metric)} minus the arm's"
    return dots(shown, xlabel=label, zero=0.0) if shown else ""
