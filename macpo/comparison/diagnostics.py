"""What explains a run's result: how good the selected positives are, and what the pairs teach, by iteration.

Everything is read from the files of the run's selection and training stages. Scores of training responses exist in the
demo world alone, where the gold score is exact; elsewhere what needs them is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean, median
from typing import Any

from macpo import demo_world
from macpo.engine.data.records import Example, Pair, read_records
from macpo.engine.files import read_jsonl
from macpo.engine.run.folder import RunFolder
from macpo.method.positives import Candidate
from macpo.method.responses import read_responses

Score = Callable[[Pair, str], float]


@dataclass(slots=True)
class Diagnostics:
    """One iteration of the student; None for what is not known."""

    iteration: int
    kept_own_label: float
    """Share of the kept positives that are the very label which the student was first trained on."""
    own_label_candidates: float
    """Share of all candidates that are it: what keeping at random would give."""
    same_first_word: float
    """Share of the pairs whose two sides begin with the same word."""
    chosen_words: float
    rejected_words: float
    early_accuracy: float | None
    """Implicit-reward accuracy of the training after a quarter of its steps: how easily the pairs are told apart."""
    kept: float | None = None
    """Mean score of the kept positives."""
    at_random: float | None = None
    """Mean score of all candidates."""
    best: float | None = None
    """Mean score of each prompt's best candidate."""
    own: float | None = None
    """Mean score of the student's own positive responses to the same prompts, where the run drew them."""
    separable: float | None = None
    """Chance that a candidate with a score above the median has the lower perplexity of two (area under the curve)."""
    inverted: float | None = None
    """Share of the pairs whose rejected side scores at least as high as the chosen one."""

    def to_json(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def diagnostics(run_dir: Path, student: str, *, gold: bool) -> list[Diagnostics]:
    """The diagnostics of each finished iteration of the main arm's student.

    Args:
        gold: whether the data are the demo world's, which scores any response.
    """
    folder, found = RunFolder(run_dir), []
    labels_in = folder.committed("init-weak-labels")
    labels = {} if labels_in is None else _labels(labels_in)
    t = 1
    while (select := folder.committed(f"iter{t}-{student}-select")) is not None:
        train = folder.committed(f"iter{t}-{student}-train")
        before = f"init-{student}" if t == 1 else f"iter{t - 1}-{student}"
        own = folder.committed(f"{before}-answer")
        found.append(_of_iteration(t, select, train, own, labels, _gold if gold else None))
        t += 1
    return found


def _labels(folder: Path) -> dict[str, str]:
    return {each.prompt.id: each.response for each in read_records(folder / "examples.jsonl", Example)}


def _gold(pair: Pair, response: str) -> float:
    return demo_world.gold(pair.prompt.messages, response)


def _of_iteration(
    t: int, select: Path, train: Path | None, own: Path | None, labels: dict[str, str], score: Score | None
) -> Diagnostics:
    pairs = read_records(select / "pairs.jsonl", Pair)
    rows = {row["prompt_id"]: row for _, row in read_jsonl(select / "scores.jsonl")}
    candidates = {i: [Candidate(**each) for each in row["candidates"]] for i, row in rows.items()}
    kept = [(i, candidates[i][row["kept"]].text) for i, row in rows.items()]
    every = [(i, each.text) for i, given in candidates.items() for each in given]
    result = Diagnostics(
        iteration=t,
        kept_own_label=fmean(labels.get(i) == text for i, text in kept),
        own_label_candidates=fmean(labels.get(i) == text for i, text in every),
        same_first_word=fmean(pair.chosen.split()[:1] == pair.rejected.split()[:1] for pair in pairs),
        chosen_words=fmean(len(pair.chosen.split()) for pair in pairs),
        rejected_words=fmean(len(pair.rejected.split()) for pair in pairs),
        early_accuracy=None if train is None else _early_accuracy(train),
    )
    if score is not None:
        _scored(result, pairs, rows, candidates, score)
        if own is not None:
            responses = read_responses(own)
            given = [score(pair, responses[pair.prompt.id].text) for pair in pairs if pair.prompt.id in responses]
            result.own = fmean(given) if given else None
    return result


def _scored(
    result: Diagnostics,
    pairs: Sequence[Pair],
    rows: dict[str, dict[str, Any]],
    candidates: dict[str, list[Candidate]],
    score: Score,
) -> None:
    """Add what needs a score of every candidate."""
    by_prompt = {pair.prompt.id: [score(pair, each.text) for each in candidates[pair.prompt.id]] for pair in pairs}
    result.kept = fmean(given[rows[i]["kept"]] for i, given in by_prompt.items())
    result.at_random = fmean(fmean(given) for given in by_prompt.values())
    result.best = fmean(max(given) for given in by_prompt.values())
    result.inverted = fmean(score(pair, pair.rejected) >= score(pair, pair.chosen) for pair in pairs)
    scores = [each for given in by_prompt.values() for each in given]
    perplexities = [each.perplexity for i in by_prompt for each in candidates[i]]
    result.separable = separability(scores, perplexities)


def separability(scores: Sequence[float], perplexities: Sequence[float]) -> float | None:
    """The area under the curve of low perplexity as a sign of a score above the median; None without both kinds."""
    from scipy import stats

    middle = median(scores)
    good = [p for s, p in zip(scores, perplexities, strict=True) if s > middle]
    rest = [p for s, p in zip(scores, perplexities, strict=True) if s <= middle]
    if not good or not rest:
        return None
    return float(stats.mannwhitneyu(rest, good).statistic / (len(good) * len(rest)))


def _early_accuracy(train: Path) -> float | None:
    rows = [row for _, row in read_jsonl(train / "metrics.jsonl")]
    return rows[max(0, len(rows) // 4 - 1)].get("accuracy") if rows else None
