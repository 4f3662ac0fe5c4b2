"""What the people said: `annotation/annotation.json` and the table of `macpo annotate RUN --report`.

Only first showings count for the comparison of policies and for agreement; a second showing says how consistent a
person is. Responses that are equal to the character are counted apart, and a win rate is over responses that differ.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from macpo.annotation.agreement import (
    alpha,
    alpha_interval,
    cohen_kappa,
    compared,
    counts_of,
    majority,
    mean_interval,
    share_with_interval,
)
from macpo.annotation.design import Pair, pair_name
from macpo.annotation.judgements import Judgement, all_judgements
from macpo.annotation.others import judged, scored
from macpo.annotation.study import Study
from macpo.engine.errors import DataError
from macpo.engine.files import write_json
from macpo.evaluation.uncertainty import sign_test
from macpo.report.annotated import RESULT
from macpo.report.run_reader import RunReader

Given = dict[str, dict[str, int]]
"""Outcomes by item, by person."""


def write_result(study: Study) -> tuple[Path, dict[str, Any]]:
    """Count all judgements, write `annotation.json` and return its path and content.

    Raises DataError where nobody has judged anything.
    """
    judgements = {name: found for name, found in all_judgements(study).items() if found}
    if not judgements:
        fix = "judge some with `macpo annotate RUN`, or --import them"
        raise DataError("there are no judgements", fix, file=study.folder)
    found = result(study, judgements)
    path = study.folder / RESULT
    write_json(path, found)
    return path, found


def result(study: Study, judgements: Mapping[str, Sequence[Judgement]]) -> dict[str, Any]:
    """Return the content of `annotation.json`.

    Returns:
        `pairs`: for each pair of policies the items that were judged, wins, ties and losses by majority, the win rate
        (mean over items of the mean over people, a tie as half) with interval, and the sign test of wins and losses;
        `agreement`: Krippendorff's alpha over all pairs' items with interval, and Cohen's kappa of every two people;
        `people`: each one's counts, seconds, repeats, share of left, and gold checks;
        `judges` and `scorers`: how their outcomes agree with the majority of people;
        `changed`: policies whose responses the run no longer has; `sources`: SHA-256 of the responses that people saw.
    """
    seed = study.design.seed
    given: Given = {name: _outcomes(study, found) for name, found in judgements.items()}
    by_item: dict[str, list[int]] = {}
    for outcomes in given.values():
        for item, outcome in outcomes.items():
            by_item.setdefault(item, []).append(outcome)
    both_bad = {j.item for found in judgements.values() for j in found if j.verdict == "both-bad"}
    counts = counts_of(list(by_item.values()))
    reader, changed = RunReader(study.folder.parent), study.changed()
    pairs = [_pair(study, pair, by_item, both_bad) for pair in study.design.pairs]
    return {
        "pairs": pairs,
        "agreement": {
            "items": len(counts),
            "alpha": alpha(counts),
            "interval": alpha_interval(counts, seed),
            "kappa": [_kappa(given, a, b) for a, b in combinations(sorted(given), 2)],
        },
        "people": {name: _person(study, found) for name, found in sorted(judgements.items())},
        "judges": _compare(study, by_item, lambda pair: judged(reader.path, pair)),
        "scorers": [] if changed else _compare(study, by_item, lambda pair: scored(reader, pair)),
        "changed": changed,
        "sources": study.content.sources,
        "design": study.design.model_dump(mode="json"),
    }


def _outcomes(study: Study, judgements: Iterable[Judgement]) -> dict[str, int]:
    """One person's outcomes of the items shown first, without gold checks and skipped ones."""
    return {
        judgement.item: judgement.outcome
        for judgement in judgements
        if not judgement.repeat and judgement.outcome is not None and study.items[judgement.item].kind == "pair"
    }


def _pair(study: Study, pair: Pair, by_item: Mapping[str, list[int]], both_bad: set[str]) -> dict[str, Any]:
    items = [item for item in study.items.values() if item.kind == "pair" and item.policies == pair]
    asked = {item.id: by_item[item.id] for item in items if item.id in by_item}
    votes = [majority(outcomes) for outcomes in asked.values()]
    rates = [(sum(outcomes) / len(outcomes) + 1) / 2 for outcomes in asked.values()]
    wins, losses = votes.count(1), votes.count(-1)
    interval = mean_interval(rates, study.design.seed)
    return {
        "first": pair[0],
        "second": pair[1],
        "items": len(asked),
        "unjudged": len(items) - len(asked),
        "equal": len(study.equal[pair_name(pair)]),
        "judgements": sum(map(len, asked.values())),
        "both_bad": len(both_bad & asked.keys()),
        "win": wins,
        "tie": votes.count(0),
        "lose": losses,
        "win_rate": sum(rates) / len(rates) if rates else None,
        "interval": interval,
        "sign_test": sign_test(wins, losses) if wins + losses else None,
        "verdict": _verdict(interval),
    }


def _verdict(interval: tuple[float, float] | None) -> str:
    if interval is None:
        return "not enough judgements"
    return "better" if interval[0] > 0.5 else "worse" if interval[1] < 0.5 else "no difference shown"


def _kappa(given: Given, a: str, b: str) -> dict[str, Any]:
    shared = sorted(given[a].keys() & given[b].keys())
    kappa = cohen_kappa([given[a][item] for item in shared], [given[b][item] for item in shared])
    return {"people": [a, b], "items": len(shared), "kappa": kappa}


def _person(study: Study, judgements: Sequence[Judgement]) -> dict[str, Any]:
    seconds = [j.seconds for j in judgements if j.seconds is not None and j.verdict != "skip"]
    first = {j.item: j.outcome for j in judgements if not j.repeat}
    twice = [(first[j.item], j.outcome) for j in judgements if j.repeat and first.get(j.item) is not None]
    twice = [(a, b) for a, b in twice if b is not None]
    sides = [j.verdict for j in judgements if j.verdict in ("left", "right")]
    gold = [j.outcome for j in judgements if study.items[j.item].kind == "gold" and j.outcome is not None]
    return {
        "judgements": len(judgements),
        "skipped": sum(j.verdict == "skip" for j in judgements),
        "comments": sum(bool(j.comment.strip()) for j in judgements),
        "median_seconds": statistics.median(seconds) if seconds else None,
        "repeats_same": share_with_interval(sum(a == b for a, b in twice), len(twice)),
        "left": share_with_interval(sides.count("left"), len(sides)),
        "gold_right": share_with_interval(gold.count(1), len(gold)),
        "gold_tied": gold.count(0),
    }


def _compare(study: Study, by_item: Mapping[str, list[int]], outcomes_of: Any) -> list[dict[str, Any]]:
    """Compare the majority of people with each judge's or scorer's outcomes, one row for each and pair."""
    rows = []
    for pair in study.design.pairs:
        people = {
            item.prompt_id: majority(by_item[item.id])
            for item in study.items.values()
            if item.kind == "pair" and item.policies == pair and item.id in by_item
        }
        for name, outcomes in outcomes_of(pair).items():
            rows.append({"name": name, "first": pair[0], "second": pair[1], **compared(people, outcomes)})
    return rows


def table(found: Mapping[str, Any]) -> str:
    """Return the result as text for a terminal."""
    lines = [
        _line("first", "second", "items", "win", "tie", "lose", "win rate", "95% interval", "sign test", "verdict"),
        *(
            _line(
                *(row["first"], row["second"], row["items"], row["win"], row["tie"], row["lose"]),
                *(_number(row["win_rate"]), _range(row["interval"]), _p(row["sign_test"]), row["verdict"]),
            )
            for row in found["pairs"]
        ),
    ]
    for row in found["pairs"]:
        notes = [f"{row[key]} {text}" for key, text in _NOTES.items() if row[key]]
        if notes:
            lines.append(f"{row['first']} : {row['second']}: {', '.join(notes)}")
    agreement = found["agreement"]
    lines += ["", f"Krippendorff's alpha {_number(agreement['alpha'])} {_range(agreement['interval'])}".rstrip()]
    lines[-1] += f" over {agreement['items']} items that two people or more judged"
    for row in agreement["kappa"]:
        lines.append(f"Cohen's kappa {_number(row['kappa'])}: {' and '.join(row['people'])}, {row['items']} items")
    lines += ["", _line("person", "", "judged", "skip", "", "", "median s", "repeats same", "left", "gold right")]
    for name, person in found["people"].items():
        shares = (_share(person[key]) for key in ("repeats_same", "left", "gold_right"))
        counts = (person["judgements"], person["skipped"], "", "", _number(person["median_seconds"], 1))
        lines.append(_line(name, "", *counts, *shares))
    for kind in ("judges", "scorers"):
        for row in found[kind]:
            what = f"{kind[:-1]} {row['name']}, {row['first']} : {row['second']}: the same winner in "
            lines.append(f"{what}{_share(row['decided'])} that both decide; kappa {_number(row['kappa'])}")
    for policy in found["changed"]:
        lines.append(f"the run no longer has the responses of {policy} that people saw; scorers are left out")
    return "\n".join(lines)


_NOTES = {
    "equal": "with equal responses",
    "unjudged": "not judged yet",
    "both_bad": "called both bad by somebody",
}
_WIDTHS = (24, 20, 6, 5, 5, 5, 9, 16, 16, 0)


def _line(*cells: object) -> str:
    return " ".join(f"{cell!s:{width}}" for cell, width in zip(cells, _WIDTHS, strict=True)).rstrip()


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _p(value: float | None) -> str:
    return "–" if value is None else f"p {value:.2g}"


def _range(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"[{interval[0]:.3f}, {interval[1]:.3f}]"


def _share(found: Mapping[str, Any]) -> str:
    return f"{found['count']} of {found['of']}" if found["of"] else "–"
