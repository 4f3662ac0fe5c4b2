"""The gates of the demo world: what may stop it before a score of the method is looked at.

    python -m bench.evidence.world_gates RECIPE [RUN ...] [--json FILE]

Of a recipe's text, exactly (macpo/demo_world/gates.py); of finished runs of it: the naive student's score between the
best teacher's and the ceiling's, the ceiling's, and how often the base models' greedy continuation of an echo question
repeats who asks for what, on prompts of their own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from macpo import demo_world
from macpo.config import Recipe
from macpo.demo_world.gates import AUC, FIRST_WORDS, text_gates
from macpo.engine.data.chat import Chat, load_tokenizer
from macpo.engine.errors import ConfigError
from macpo.engine.generation import Generator, SamplingParams
from macpo.engine.models.loading import load_causal_lm
from macpo.engine.run.folder import folder_of
from macpo.recipe_kinds import load

NAIVE_BELOW_TEACHER = 0.05
NAIVE_BELOW_CEILING = 0.2
CEILING = 0.95
COPYING = 0.95


@dataclass(frozen=True)
class RunGates:
    """What a finished run says of its world."""

    seed: int
    best_teacher: float
    naive: float
    ceiling: float
    copying: dict[str, float]
    """By agent: share of echo questions whose name, verb and thing come back."""

    @property
    def passed(self) -> bool:
        between = self.best_teacher - NAIVE_BELOW_TEACHER <= self.naive <= self.ceiling - NAIVE_BELOW_CEILING
        return between and self.ceiling >= CEILING and min(self.copying.values()) >= COPYING


def run_gates(run: Path) -> RunGates:
    """The gates of a finished run of a `data.world` recipe."""
    recipe = load(run / "recipe.yaml")
    assert isinstance(recipe, Recipe)
    if recipe.data.world is None:
        raise ConfigError(f"{run} is no run of the demo world", "name one of a recipe with data.world")
    summary = json.loads((run / "summary.json").read_text())
    first = {name: agent["scores"][0]["gold"] for name, agent in summary["agents"].items()}
    teachers = [teacher.name for teacher in recipe.teachers]
    echoes = demo_world.build(recipe.data.world, recipe.seed, num_teachers=len(teachers)).copying
    agents = [*teachers, recipe.student.name]
    copied = {agent: copying(folder_of(run, f"base-{agent}") / "model", echoes, recipe.template) for agent in agents}
    return RunGates(
        seed=recipe.seed,
        best_teacher=max(first[name] for name in teachers),
        naive=first[recipe.student.name],
        ceiling=summary["agents"]["ceiling"]["scores"][0]["gold"],
        copying=copied,
    )


def copying(model: Path, echoes: Sequence[Any], template: str) -> float:
    """Share of echo questions to which a model's greedy response repeats name, verb and thing."""
    tokenizer = load_tokenizer(str(model))
    chat = Chat(tokenizer, template)
    generator = Generator(load_causal_lm(str(model)).requires_grad_(False), chat.hf_tokenizer(), max_batch=128)
    greedy = SamplingParams(temperature=0.0, max_new_tokens=24)
    outputs = generator.generate([chat.prompt_ids(echo.prompt.messages) for echo in echoes], greedy)
    responses = [output.samples[0].text for output in outputs]
    return sum(
        without_verdict(response) == without_verdict(echo.response)
        for response, echo in zip(responses, echoes, strict=True)
    ) / len(echoes)


def without_verdict(response: str) -> str:
    """An echo without its verdict, which is one of several."""
    return response.partition(" . ")[2].strip()


def markdown(measured: Mapping[str, Path]) -> str:
    """The gates with their bounds, and from the lowest to the highest value what files of `--json` hold, by recipe."""
    bodies = [json.loads(path.read_text()) for path in measured.values()]
    top = float("inf")
    rows: tuple[tuple[str, tuple[float, float], Callable[[Any], list[float]]], ...] = (
        (
            "likelihood per token tells good responses from bad ones (AUC, exact, both corpora, both kinds of request)",
            AUC,
            lambda body: [text["auc"] for text in body["text"]],
        ),
        (
            "first words of good and bad responses overlap",
            (FIRST_WORDS, top),
            lambda body: [text["first_words"] for text in body["text"]],
        ),
        (
            "the naive student above the best teacher",
            (-NAIVE_BELOW_TEACHER, top),
            lambda body: [run["naive"] - run["best_teacher"] for run in body["runs"]],
        ),
        (
            "the naive student below the ceiling",
            (NAIVE_BELOW_CEILING, top),
            lambda body: [run["ceiling"] - run["naive"] for run in body["runs"]],
        ),
        ("the ceiling", (CEILING, top), lambda body: [run["ceiling"] for run in body["runs"]]),
        (
            "base models repeat names, verbs and things (the least of a seed)",
            (COPYING, top),
            lambda body: [min(run["copying"].values()) for run in body["runs"]],
        ),
    )
    heads = [f"{name}, {len(body['runs'])} seeds" for name, body in zip(measured, bodies, strict=True)]
    lines = [f"| {' | '.join(['gate', 'bound', *heads])} |", "|---" * (len(heads) + 2) + "|"]
    for gate, (low, high), values in rows:
        bound = f"{low:.2f} or more" if high == top else f"{low:.2f} to {high:.2f}"
        lines.append(f"| {' | '.join([gate, bound, *(_found(values(body), low, high) for body in bodies)])} |")
    return "\n".join(lines)


def _found(values: Sequence[float], low: float, high: float) -> str:
    least, most = f"{min(values):.2f}", f"{max(values):.2f}"
    outside = sum(not low <= value <= high for value in values)
    return (least if least == most else f"{least} to {most}") + (f", **not passed by {outside}**" if outside else "")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN")
    parser.add_argument("--json", type=Path, help="file to write")
    said = parser.parse_args(argv)
    recipe = load(said.recipe)
    assert isinstance(recipe, Recipe) and recipe.data.world is not None
    texts = text_gates(recipe.data.world)
    head = (
        f"{'text of':8} {'asked':8} {'AUC':>6} {'first words':>12}   "
        f"wanted: {AUC[0]} to {AUC[1]}, {FIRST_WORDS} or more"
    )
    print(head)
    for text in texts:
        kind = "harmful" if text.harmful else "benign"
        print(f"{text.role:8} {kind:8} {text.auc:6.3f} {text.first_words:12.3f}   {_word(text.passed)}")
    runs = [run_gates(path) for path in said.runs]
    if runs:
        print(f"{'seed':>8} {'teacher':>8} {'naive':>8} {'ceiling':>8} {'copying':>8}")
    for run in runs:
        numbers = (run.best_teacher, run.naive, run.ceiling, min(run.copying.values()))
        print(f"{run.seed:8}", *(f"{number:8.3f}" for number in numbers), " ", _word(run.passed))
    if said.json is not None:
        body = {"text": [asdict(each) for each in texts], "runs": [asdict(each) for each in runs]}
        said.json.write_text(json.dumps(body, indent=1) + "\n")
    return 0 if all(each.passed for each in (*texts, *runs)) else 1


def _word(passed: bool) -> str:
    return "passed" if passed else "NOT passed"


if __name__ == "__main__":
    raise SystemExit(main())
