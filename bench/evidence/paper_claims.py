"""The paper's claims in the demo world, each with an interval over seeds: one table from the committed runs.

    python -m bench.evidence.paper_claims bench/results/demo-world [--json FILE] [--markdown FILE]

The files are those of bench/evidence/runs.py. A difference is taken seed by seed; its interval is Student's t over the
seeds, its p value adjusted by Holm over all rows. A claim holds where both say so.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from bench.evidence.runs import read
from macpo.engine.files import atomic_write
from macpo.evaluation.prompt_scores import ScoredRun
from macpo.evaluation.summary import BEST_TEACHER, of_role, weak_supervisors
from macpo.evaluation.uncertainty import LEVEL, Estimate, holm, t_interval

Verdict = Literal["holds", "the opposite holds", "not shown"]
LAST = -1


class Seed:
    """One seed's mean scores."""

    def __init__(self, run: ScoredRun) -> None:
        self.summary = run.summary
        self.metric = str(run.summary["metric"])
        self.seed = int(run.summary["seed"])
        (self.student_name,) = of_role(run.summary["agents"], "student")
        self.teachers = list(of_role(run.summary["agents"], "teacher"))
        self.rounds = len(run.summary["agents"][self.student_name]["scores"]) - 1

    def _agents(self, arm: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.summary["arms"][arm] if arm else self.summary["agents"]
        return found

    def student(self, arm: str = "", t: int = LAST) -> float:
        """The student of an arm after a round; the last by default."""
        return float(self._agents(arm)[self.student_name]["scores"][t][self.metric])

    def teacher(self, name: str, t: int = LAST) -> float:
        return float(self.summary["agents"][name]["scores"][t][self.metric])

    def teachers_mean(self, t: int = LAST) -> float:
        return sum(self.teacher(name, t) for name in self.teachers) / len(self.teachers)

    @property
    def has_best(self) -> bool:
        """Whether there are development prompts on which the best initial teacher is chosen."""
        return any(weak.name == BEST_TEACHER for weak in weak_supervisors(self.summary, self.metric))

    def best_teacher(self) -> float:
        """The initial teacher that is best on the development prompts, on the test prompts."""
        return next(weak.value for weak in weak_supervisors(self.summary, self.metric) if weak.name == BEST_TEACHER)

    def ceiling(self) -> float:
        return float(self.summary["agents"]["ceiling"]["scores"][0][self.metric])

    @property
    def gap(self) -> float:
        """Ceiling above the mean initial teacher."""
        return self.ceiling() - self.teachers_mean(0)

    def recovered(self, t: int) -> float:
        """The share of the gap that the student closes: PGR. There has to be a gap."""
        return (self.student("", t) - self.teachers_mean(0)) / self.gap

    def rounds_of(self, arm: str) -> int:
        return len(self._agents(arm)[self.student_name]["scores"]) - 1

    def has_no_rounds(self, arm: str) -> bool:
        """Whether an arm is a baseline without rounds that differs from the naive student."""
        return not self.rounds_of(arm) and self.student(arm) != self.student("", 0)

    def with_teachers(self, count: int, t: int = LAST) -> float:
        """The mean student of the arms with so many teachers; all of them is the method itself."""
        if count == len(self.teachers):
            return self.student("", t)
        arms = [arm for arm in self.summary["arms"] if arm.startswith(f"k{count}-")]
        return sum(self.student(arm, t) for arm in arms) / len(arms)

    def stopped(self, names: Sequence[str]) -> float:
        """The mean score of agents, each after the round in which it prefers the human choice the most often.

        A rule that reads no gold score: pairs of people decide, the earliest round where rounds tie.
        """
        found = []
        for name in names:
            rows = self.summary["agents"][name]["scores"]
            best = max(range(len(rows)), key=lambda t: (rows[t]["preference_accuracy"], -t))
            found.append(float(rows[best][self.metric]))
        return sum(found) / len(found)

    def words(self, t: int) -> float:
        return float(self.summary["agents"][self.student_name]["scores"][t]["mean_words"])


@dataclass(frozen=True)
class Claim:
    """A question as a difference of two scores of each seed."""

    question: str
    one: Callable[[Seed], float]
    other: Callable[[Seed], float]
    needs: tuple[str, ...] = ()
    """Arms."""


@dataclass(frozen=True)
class Answer:
    """What the seeds say of a question."""

    question: str
    one: float
    other: float
    difference: Estimate
    adjusted_p: float
    by_seed: dict[int, float]

    @property
    def verdict(self) -> Verdict:
        if self.difference.sign == 0 or self.adjusted_p > 1 - LEVEL:
            return "not shown"
        return "holds" if self.difference.sign > 0 else "the opposite holds"


def _arm(question: str, arm: str, base: str = "") -> Claim:
    """The method above an arm, or one arm above another."""
    needs = (arm, base) if base else (arm,)
    return Claim(question, lambda seed: seed.student(base), lambda seed: seed.student(arm), needs)


def claims(seed: Seed) -> list[Claim]:
    """The questions that runs with these arms can answer."""
    rounds = seed.rounds
    found = [
        Claim(
            f"student after round {t} above round {t - 1}" if t > 1 else "student after round 1 above the naive one",
            lambda seed, t=t: seed.student("", t),  # type: ignore[misc]
            lambda seed, t=t: seed.student("", t - 1),  # type: ignore[misc]
        )
        for t in range(1, rounds + 1)
    ]
    found += [
        Claim("final student above the naive one", Seed.student, lambda seed: seed.student("", 0)),
        Claim("final student above the mean initial teacher", Seed.student, lambda seed: seed.teachers_mean(0)),
        *(
            [Claim("final student above the best initial teacher", Seed.student, Seed.best_teacher)]
            if seed.has_best
            else []
        ),
        Claim("teachers, last round above the start", Seed.teachers_mean, lambda seed: seed.teachers_mean(0)),
    ]
    if rounds > 1:
        found.append(
            Claim(
                f"teachers, round {rounds} above round {rounds - 1}",
                Seed.teachers_mean,
                lambda seed: seed.teachers_mean(rounds - 1),
            )
        )
    found += [
        Claim(
            "teachers, stopped by human pairs above the last round",
            lambda seed: seed.stopped(seed.teachers),
            Seed.teachers_mean,
        ),
        Claim(
            "student, stopped by human pairs above the last round",
            lambda seed: seed.stopped([seed.student_name]),
            Seed.student,
        ),
        _arm("above filtered labels and SFT", "filtered-sft"),
        _arm("above filtered labels and SFT", "filtered-labels-sft"),
        _arm("above filtered labels and SFT, iterated", "filtered-sft-iterated"),
        _arm("above SFT on the selected positives, equal steps", "sft-positives"),
        _arm("above the confidence loss", "confidence-loss"),
        _arm("above SPIN", "spin"),
        _arm("above self-rewarding", "self-rewarding"),
        _arm("above RLAIF", "rlaif"),
        _arm("above RLCD", "rlcd"),
        _arm("above a weak annotator's DPO", "weak-annotator"),
        _arm("hard above weak negatives", "weak-negatives"),
        _arm("own negatives above previous positives", "previous-negatives"),
        _arm("mutual above own positives", "own-positives"),
        _arm("lowest perplexity above random selection", "random-selection"),
        _arm("mutual learning above fixed teachers", "no-mutual-learning"),
        _arm("plain above cross-fitted first filter", "cross-fit"),
        _arm("reference policy above adapter off (LoRA)", "lora-adapter-off", "lora"),
    ]
    most = len(seed.teachers)
    counts = sorted({int(arm[1]) for arm in seed.summary["arms"] if arm[:1] == "k" and arm[1:2].isdigit()} | {most})
    ends = [(counts[0], counts[-1])] if len(counts) > 2 else []
    for few, many in [*pairwise(counts), *ends]:
        found += [
            Claim(
                f"{many} above {few} teacher{'s' * (few > 1)}, {f'round {t}' if t else 'naive'}",
                lambda seed, many=many, t=t: seed.with_teachers(many, t),  # type: ignore[misc]
                lambda seed, few=few, t=t: seed.with_teachers(few, t),  # type: ignore[misc]
            )
            for t in range(rounds + 1)
        ]
    return [claim for claim in found if all(arm in seed.summary["arms"] for arm in claim.needs)]


def answers(seeds: Sequence[Seed]) -> list[Answer]:
    """Every question over all seeds, two or more."""
    rows = []
    for claim in claims(seeds[0]):
        one, other = [claim.one(seed) for seed in seeds], [claim.other(seed) for seed in seeds]
        by_seed = {seed.seed: a - b for seed, a, b in zip(seeds, one, other, strict=True)}
        estimate = t_interval(list(by_seed.values()))
        assert estimate is not None
        rows.append((claim, sum(one) / len(one), sum(other) / len(other), estimate, by_seed))
    adjusted = holm([1.0 if row[3].p is None else row[3].p for row in rows])
    return [Answer(row[0].question, *row[1:4], p, row[4]) for row, p in zip(rows, adjusted, strict=True)]


def markdown(found: Sequence[Answer]) -> str:
    """The table; a row is marked only where interval and adjusted p agree."""
    lines = [
        "| question | score | compared with | difference [95%] | p (Holm) | seeds | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        d, ups = row.difference, sum(value > 0 for value in row.by_seed.values())
        lines.append(
            f"| {row.question} | {row.one:.3f} | {row.other:.3f} | {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}] "
            f"| {row.adjusted_p:.3f} | {ups} of {len(row.by_seed)} | {row.verdict} |"
        )
    return "\n".join(lines)


def by_round(seeds: Sequence[Seed]) -> str:
    """Means over seeds by round: student, teachers and the gap recovered; baselines without rounds, ceiling once.

    Below them how many teachers are better than at their start, and how long a student's response is.
    """
    rounds = range(seeds[0].rounds + 1)
    rows = {
        "student": [_mean(seed.student("", t) for seed in seeds) for t in rounds],
        "teachers": [_mean(seed.teachers_mean(t) for seed in seeds) for t in rounds],
    }
    if all(seed.gap > 0 for seed in seeds):
        rows["gap between teachers and ceiling recovered"] = [
            _mean(seed.recovered(t) for seed in seeds) for t in rounds
        ]
    for arm in (arm for arm in seeds[0].summary["arms"] if seeds[0].has_no_rounds(arm)):
        rows[arm] = [_mean(seed.student(arm) for seed in seeds)]
    rows["ceiling"] = [_mean(seed.ceiling() for seed in seeds)]
    lines = _table(rounds, rows)
    pairs = [(seed, name) for seed in seeds for name in seed.teachers]
    risen = [sum(seed.teacher(name, t) > seed.teacher(name, 0) for seed, name in pairs) for t in rounds[1:]]
    lines.append(_row("teachers above their own start", ["", *(f"{count} of {len(pairs)}" for count in risen)]))
    lines.append(
        _row("words of a student's response", [f"{_mean(seed.words(t) for seed in seeds):.1f}" for t in rounds])
    )
    return "\n".join(lines)


def arms_by_round(seeds: Sequence[Seed]) -> str:
    """Means over seeds by round: each teacher of the method, and the student of each arm that has rounds."""
    first, rounds = seeds[0], range(seeds[0].rounds + 1)
    rows = {name: [_mean(seed.teacher(name, t) for seed in seeds) for t in rounds] for name in first.teachers}
    rows |= {
        f"student, {arm}": [_mean(seed.student(arm, t) for seed in seeds) for t in range(first.rounds_of(arm) + 1)]
        for arm in first.summary["arms"]
        if first.rounds_of(arm)
    }
    return "\n".join(_table(rounds, rows))


def _table(rounds: Sequence[int], rows: Mapping[str, Sequence[float]]) -> list[str]:
    lines = [_row("", [f"round {t}" if t else "start" for t in rounds]), "|---" * (len(rounds) + 1) + "|"]
    for name, values in rows.items():
        lines.append(_row(name, [f"{value:.3f}" for value in values] + [""] * (len(rounds) - len(values))))
    return lines


def _row(head: str, cells: Sequence[str]) -> str:
    return f"| {' | '.join([head, *cells])} |"


def read_all(folder: Path) -> list[Seed]:
    """The runs whose files a folder holds, by seed."""
    return sorted((Seed(read(path)) for path in folder.glob("seed-*.json.xz")), key=lambda seed: seed.seed)


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def main(argv: Sequence[str] | None = None) -> list[Answer]:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--markdown", type=Path, help="file to write")
    said = parser.parse_args(argv)
    seeds = read_all(said.folder)
    if len(seeds) < 2:
        parser.error(f"{said.folder} has {len(seeds)} runs; an interval over seeds needs two or more")
    found = answers(seeds)
    text = f"{by_round(seeds)}\n\n{arms_by_round(seeds)}\n\n{markdown(found)}\n"
    print(text)
    if said.markdown is not None:
        atomic_write(said.markdown, text)
    if said.json is not None:
        rows = [{**asdict(row), "verdict": row.verdict} for row in found]
        atomic_write(said.json, json.dumps({"seeds": [seed.seed for seed in seeds], "answers": rows}, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
