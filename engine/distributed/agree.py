"""Agreement between ranks: rank 0's result, or an error of any rank, reaches all of them.

Needs no torch, because errors of worker processes are passed on in the same way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from macpo.engine import errors
from macpo.engine.errors import MacpoError, Problem, Stopped

if TYPE_CHECKING:
    from macpo.engine.distributed.world import World


def stopped(where: str, world: World | None = None) -> Stopped:
    """The error for a requested stop, to be raised on every rank of `world` and reported by one."""
    return Stopped(f"stopped at {where}", "run the same command again to go on from here", relayed=not is_main(world))


def is_main(world: World | None) -> bool:
    """Whether this process is rank 0, or has no ranks beside it."""
    return world is None or world.rank == 0


def on_main(world: World | None, action: Callable[[], Any]) -> Any:
    """Rank 0's JSON-able result on every rank; an error is raised on every rank (`relayed` on the others)."""
    if world is None or world.size == 1:
        return action()
    answer: dict[str, Any] = {}
    failure: BaseException | None = None
    if world.is_main:
        try:
            answer = {"value": action()}
        except MacpoError as error:
            answer, failure = {"error": pack_error(error)}, error
    answer = world.broadcast(answer)
    if failure is not None:
        raise failure
    if "error" in answer:
        raise unpack_error(answer["error"], relayed=True)
    return answer["value"]


@contextlib.contextmanager
def agreed(world: World | None) -> Iterator[None]:
    """Context whose end raises any rank's error on every rank (`relayed` on the others); collective.

    No other collective may be called inside.
    """
    failure: MacpoError | None = None
    try:
        yield
    except MacpoError as error:
        if world is None or world.size == 1:
            raise
        failure = error
    if world is None or world.size == 1:
        return
    answers = world.gather(None if failure is None else pack_error(failure))
    for rank, answer in enumerate(answers):
        if answer is not None:
            raise failure if failure is not None and rank == world.rank else unpack_error(answer, relayed=True)


def pack_error(error: MacpoError) -> dict[str, Any]:
    """A MacpoError as JSON for another process."""
    fields = ("message", "fix", "file", "line", "field")
    problems = [{name: getattr(problem, name) for name in fields} for problem in error.problems]
    return {"kind": type(error).__name__, "problems": problems}


def unpack_error(packed: Mapping[str, Any], *, relayed: bool = False) -> MacpoError:
    """The error that `pack_error` packed; `relayed` if the process that raised it reports it to the user."""
    kind = getattr(errors, packed["kind"], MacpoError)
    error: MacpoError = kind(problems=[Problem(**problem) for problem in packed["problems"]], relayed=relayed)
    return error
