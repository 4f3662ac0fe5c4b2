"""What judges and scorers said of the same pairs, from the files that they leave in the run's folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from macpo.annotation.design import Pair
from macpo.engine.files import read_jsonl
from macpo.engine.removal import is_folder
from macpo.evaluation.written import is_number
from macpo.report.policy_names import named
from macpo.report.run_reader import RunReader

JUDGING = "judging"
_VERDICTS = {"A": 1, "C": 0, "B": -1}
_SCORED = re.compile(r"score-(?P<rest>.+-iter\d+)")


def judged(run_dir: Path, pair: Pair) -> dict[str, dict[str, int]]:
    """Return each judge's outcomes of a pair of policies by prompt, from the first policy's view.

    A judge's rows are those of `judging/NAME/*.jsonl` with `prompt_id`, the policies `first` and `second` in the order
    in which their responses were shown, and a `verdict`: A, B, or C for a tie. A policy wins where it does so in both
    orders; a prompt that lacks a verdict in one order is left out.
    """
    found: dict[str, dict[str, int]] = {}
    folder = Path(run_dir) / JUDGING
    for judge in sorted(folder.iterdir()) if is_folder(folder) else ():
        orders: dict[str, dict[bool, int]] = {}
        for path in sorted(judge.glob("*.jsonl")) if is_folder(judge) else ():
            for _, row in read_jsonl(path):
                shown, verdict = (row.get("first"), row.get("second")), _VERDICTS.get(str(row.get("verdict")))
                if verdict is not None and shown in (pair, pair[::-1]):
                    as_first = shown == pair
                    orders.setdefault(str(row.get("prompt_id")), {})[as_first] = verdict if as_first else -verdict
        whole = {prompt: both for prompt, both in orders.items() if len(both) == 2}
        if whole:
            found[judge.name] = {
                prompt: both[True] if both[True] == both[False] else 0 for prompt, both in whole.items()
            }
    return found


def scored(reader: RunReader, pair: Pair) -> dict[str, dict[str, int]]:
    """Return which policy of a pair each scorer gives more, by prompt: 1 the first, 0 both the same, -1 the second.

    Scorers are the demo world's gold score, which stands in `evaluation.jsonl`, and the stages `score-SCORER-…` with
    their `scores.jsonl`.
    """
    first, second = (_scores(reader, policy) for policy in pair)
    return {
        scorer: {
            prompt: (first[scorer][prompt] > second[scorer][prompt]) - (first[scorer][prompt] < second[scorer][prompt])
            for prompt in first[scorer].keys() & second[scorer].keys()
        }
        for scorer in first
        if scorer in second
    }


def _scores(reader: RunReader, policy: str) -> dict[str, dict[str, float]]:
    """One policy's scores by scorer and prompt."""
    evaluation = named(reader, policy)
    found = {"gold": _column(evaluation.rows(), "gold")}
    end = f"-{evaluation.agent}-iter{evaluation.iteration}"
    for stage in reader.stages:
        match = _SCORED.fullmatch(stage.base)
        path = stage.path / "scores.jsonl"
        if match and stage.arm == evaluation.folder.arm and match["rest"].endswith(end) and path.exists():
            found[match["rest"].removesuffix(end)] = _column((row for _, row in read_jsonl(path)), "score")
    return {scorer: scores for scorer, scores in found.items() if scores}


def _column(rows: Iterable[Mapping[str, object]], name: str) -> dict[str, float]:
    return {str(row["prompt_id"]): float(row[name]) for row in rows if is_number(row.get(name))}  # type: ignore[arg-type]
