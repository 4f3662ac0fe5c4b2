"""`macpo evaluate RUN --judge NAME`: a language model compares the responses that a run's policies gave.

    macpo evaluate runs/mine --judge gpt --plan         # what it will ask, and what that costs
    macpo evaluate runs/mine --judge gpt --validate     # against the human test pairs
    macpo evaluate runs/mine --judge gpt                # the student against its start, the teachers and the ceiling

Results go to `RUN/judging/NAME` (macpo/judging/folder.py) and into the report. No stage of the run is touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from macpo.commands import judges
from macpo.config import Recipe
from macpo.engine.console import run_cli, say
from macpo.engine.distributed import watchdog
from macpo.engine.distributed.launcher import PARENT, launch, leave_error
from macpo.engine.distributed.world import World, finish, init_from_env
from macpo.engine.errors import ConfigError, MacpoError
from macpo.engine.files import sha256
from macpo.engine.processes import StopFlag, die_with
from macpo.engine.progress import counted
from macpo.engine.run.folder import folder_of
from macpo.engine.run.lock import RunLock
from macpo.engine.run.manifest import unchanged
from macpo.judging.folder import JudgingFolder
from macpo.judging.logprob import LogprobJudge
from macpo.judging.questions import Comparison, human_comparisons, read_comparisons
from macpo.judging.replies import Replies
from macpo.judging.results import Judging, Result, Validation, result_of, validation_of
from macpo.judging.settings import ServerJudge
from macpo.judging.verdicts import Judgement
from macpo.recipe_kinds import AnyRecipe, load, plan_of
from macpo.report.judged import table
from macpo.report.page import write_report
from macpo.report.policy_names import last_student, named, policy_name, usual_opponents
from macpo.report.run_reader import Evaluation, RunReader

TIMEOUT_S = 1800
"""How long a process waits for another."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """The words of the command line."""

    run: str
    judge: str
    judges: str | None = None
    """A file of judges, instead of the recipe's."""
    policy: str | None = None
    """Whose responses are judged; default the student's last."""
    opponents: tuple[str, ...] = ()
    limit: int | None = None
    validate: bool = False
    plan: bool = False
    price_in: float | None = None
    price_out: float | None = None
    ranks: int = 1
    debug: bool = False
    """Whether processes that are started show tracebacks."""


@dataclass(frozen=True, slots=True)
class Match:
    """Comparisons of one policy with one opponent, or the human pairs, which have no policies."""

    comparisons: list[Comparison]
    policy: str = ""
    opponent: str = ""
    answers: tuple[str, str] | None = None

    @property
    def label(self) -> str:
        return f"{self.policy} against {self.opponent}" if self.policy else "human pairs"

    def found(self, judgements: list[Judgement]) -> Result | Validation:
        if not self.policy:
            return validation_of(judgements)
        return result_of(judgements, self.policy, self.opponent).model_copy(update={"answers": self.answers})


def evaluate(wishes: Wishes, world: World | None = None) -> None:
    """Judge, and print what was found; each of several ranks calls it.

    Raises:
        ConfigError (2): no such judge or policy, a prompt or model that cannot be used, a refused key.
        JudgeError (7): too many comparisons failed.
        Stopped (75): on request; the same command asks only what is left.
    """
    recipe = load(Path(wishes.run))
    settings = judges.chosen(recipe, wishes.judge, Path(wishes.judges) if wishes.judges else None)
    if wishes.ranks > 1 and isinstance(settings, ServerJudge):
        raise ConfigError(f"{settings.name} is a server's", "raise its `workers` instead", field="--ranks")
    if wishes.ranks > 1 and world is None:
        launch([sys.executable, "-m", __name__, json.dumps(asdict(wishes))], wishes.ranks)
        return
    world = world or World()
    prices = judges.prices(settings, wishes.price_in, wishes.price_out)
    run = RunReader(Path(wishes.run))
    limit = wishes.limit or settings.limit
    matches = [_human_pairs(run, limit)] if wishes.validate else _matches(run, recipe, wishes, limit)
    folder = JudgingFolder(run.path, settings.name)
    kept: Judging | None = None
    with (
        _replies(folder, world, only_read=wishes.plan) as replies,
        judges.opened(settings, recipe, replies, world) as judge,
    ):
        if world.is_main:
            say(f"judge {settings.name} ({judges.title(settings)}): {', '.join(match.label for match in matches)}")
            cost = judges.cost(judge, settings, [each for match in matches for each in match.comparisons])
            for line in cost.lines(prices):
                say(line, error=not wishes.plan)
        for match in [] if wishes.plan else matches:
            with _counting(judge, f"{settings.name}, {match.label}", match, world):
                judgements = judge.compare(match.comparisons)
            if world.is_main:
                kept = folder.keep(judge.about, judges.title(settings), judgements, match.found(judgements))
    if kept is not None:
        print("\n".join(table(settings.name, kept)))
        planned = [stage.name for stage in plan_of(recipe, must_exist=False).graph.stages]
        print(f"\nreport: {write_report(run.path, planned=planned)}")


def _human_pairs(run: RunReader, limit: int | None) -> Match:
    path = folder_of(run.path, "data") / "test.jsonl"
    return Match(human_comparisons(path, limit))


def _matches(run: RunReader, recipe: AnyRecipe, wishes: Wishes, limit: int | None) -> list[Match]:
    """The policy against each opponent, in the order given."""
    if not any(path.exists() for path in map(_responses, run.all_evaluations)):
        fix = "judge a run of `recipe: macpo`; --validate needs human test pairs alone"
        raise ConfigError("no policy of this run has answered the test prompts", fix, file=run.path)
    policy = named(run, wishes.policy) if wishes.policy else last_student(run)
    names = wishes.opponents or (recipe.evaluation.opponents if isinstance(recipe, Recipe) else ())
    opponents = [named(run, name) for name in names] if names else usual_opponents(run, policy)
    others = list({policy_name(each): each for each in opponents if policy_name(each) != policy_name(policy)}.values())
    if not others:
        raise ConfigError(f"{policy_name(policy)} has nobody to be compared with", "name others", field="--opponents")
    return [
        Match(
            read_comparisons(_responses(policy), _responses(other), limit),
            policy_name(policy),
            policy_name(other),
            (sha256(_responses(policy)), sha256(_responses(other))),
        )
        for other in others
    ]


def _responses(evaluation: Evaluation) -> Path:
    return unchanged(evaluation.responses.parent, evaluation.responses.name)


@contextlib.contextmanager
def _replies(folder: JudgingFolder, world: World, *, only_read: bool) -> Iterator[Replies | None]:
    """The open file of replies on rank 0; nobody else may judge with this judge meanwhile."""
    if not world.is_main or (only_read and not folder.replies.exists()):
        yield None
        return
    folder.make()
    with RunLock(folder.path, lambda line: say(line)), Replies(folder.replies) as replies:
        yield replies


@contextlib.contextmanager
def _counting(judge: judges.AnyJudge, label: str, match: Match, world: World) -> Iterator[None]:
    """Shows how far the judge is. A local one stops between two forwards; who waits for a server is interrupted."""
    asked = sum(2 for each in match.comparisons if each.ours != each.theirs)
    with (
        counted(label if world.is_main else False, asked, unit="questions") as judge.count,
        contextlib.ExitStack() as stack,
    ):
        if isinstance(judge, LogprobJudge):
            stop = stack.enter_context(StopFlag(quiet=not world.is_main))
            judge.should_stop = lambda: stop.requested
        yield


def _rank(wishes: Wishes) -> None:
    world = init_from_env(TIMEOUT_S)
    watchdog.watch(TIMEOUT_S)
    try:
        evaluate(wishes, world)
    except MacpoError as error:
        error.relayed |= not world.is_main  # every rank finds it, one says it
        raise
    finally:
        watchdog.rest()
        finish()


def main() -> None:
    """One of the ranks that `--ranks` starts."""
    die_with(int(os.environ[PARENT]))
    said = json.loads(sys.argv[1])
    wishes = Wishes(**said | {"opponents": tuple(said["opponents"])})
    sys.exit(run_cli(lambda: _rank(wishes), debug=wishes.debug, report=leave_error))


if __name__ == "__main__":
    main()
