"""Names of a run's policies as people write them: `student@0`, `ceiling`, `teacher-best@0`, `one-teacher.student@2`."""

from __future__ import annotations

import re

from macpo.engine.errors import ConfigError
from macpo.evaluation.summary import headline_metric, weak_supervisors
from macpo.report.run_reader import Evaluation, RunReader

_NAME = re.compile(r"(?:(?P<arm>[^.@]+)\.)?(?P<agent>[^.@]+)(?:@(?P<iteration>\d+))?")
BEST = "teacher-best"


def policy_name(evaluation: Evaluation) -> str:
    """The full name of an evaluated policy."""
    arm = evaluation.folder.arm
    return f"{arm}.{evaluation.agent}@{evaluation.iteration}" if arm else f"{evaluation.agent}@{evaluation.iteration}"


def parts_of_name(name: str, *, field: str = "") -> tuple[str, str, int | None]:
    """Arm (empty for the main run), agent, and iteration (None where it is left out) of a policy's name.

    Raises ConfigError for a name of another form; `field` is where it was given.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ConfigError(f"got {name!r}", "write a policy like student@0, teacher0 or ARM.student@2", field=field)
    return match["arm"] or "", match["agent"], None if match["iteration"] is None else int(match["iteration"])


def named(run: RunReader, name: str) -> Evaluation:
    """The evaluation of a policy; without @ITERATION its agent's last.

    `teacher-best` is the teacher that was best on the development prompts before the iterations.

    Raises:
        ConfigError: no such policy was evaluated; lists those that were. `teacher-best` without development prompts.
    """
    match = _NAME.fullmatch(name)
    known = {policy_name(each): each for each in run.all_evaluations}
    arm, agent, iteration = (match["arm"] or "", match["agent"], match["iteration"]) if match else ("", "", None)
    agents = {each.agent for each in known.values()}
    if agent == BEST and BEST not in agents and not arm:
        agent = _best_teacher(run)
    found = [each for each in known.values() if (each.folder.arm, each.agent) == (arm, agent)]
    if iteration is not None:
        found = [each for each in found if each.iteration == int(iteration)]
    if not found:
        raise ConfigError(
            f"there is no evaluated policy {name!r}", f"use one of {', '.join(sorted(known)) or 'a finished run'}"
        )
    return max(found, key=lambda each: each.iteration)


def usual_opponents(run: RunReader, policy: Evaluation) -> list[Evaluation]:
    """Whom a policy is compared with by default: the student's iteration 0, every teacher's last, the ceiling."""
    agents = run.summary["agents"]
    wanted = [f"{name}@0" for name, agent in agents.items() if agent["role"] == "student"]
    wanted += [name for role in ("teacher", "ceiling") for name, agent in agents.items() if agent["role"] == role]
    evaluated = {each.agent for each in run.evaluations}
    found = [named(run, name) for name in wanted if name.partition("@")[0] in evaluated]
    return [each for each in found if policy_name(each) != policy_name(policy)]


def last_student(run: RunReader) -> Evaluation:
    """The student's last evaluated policy. Raises ConfigError where none is."""
    names = [name for name, agent in run.summary["agents"].items() if agent["role"] == "student"]
    if not names:
        raise ConfigError(
            "no student of this run was evaluated", "run the recipe further, or name a policy with --policy"
        )
    return named(run, names[0])


def _best_teacher(run: RunReader) -> str:
    """Not by the test prompts: the best one there is partly the luckiest."""
    metric = headline_metric(run.summary)
    _, *best = weak_supervisors(run.summary, metric) if metric is not None else [None]
    if not best or best[0] is None:
        fix = "set data.dev_prompts and run again, or name a teacher"
        raise ConfigError(f"{BEST} is chosen on development prompts, which this run has none of", fix)
    ((name, _),) = best[0].teachers
    return name
