"""Scores read back from a run: what the tables can show of `summary.json` and `evaluation.json`, or a reason why not.

Both were written by this program, but `summary.json` is not hashed, and a disk or a person may have changed either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from macpo.engine.errors import shown
from macpo.evaluation.summary import LABELS, Role, headline_metric

_MOST = 1e300  # above it, and NaN, is no measured value
_NUMBERS = {*LABELS, "iteration", "seconds"}


def is_number(value: Any) -> bool:
    """Whether a value read from JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MOST


def checked_row(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row of metrics. Raises ValueError that names an entry which no table can show."""
    for name, value in row.items():
        if value is None or is_number(value):
            continue
        if name in _NUMBERS or name.endswith("_se") or not isinstance(value, str | bool):
            raise ValueError(f"{shown(name, 40)} is not a finite number")
    return row


def _checked_score(row: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(row.get("iteration"), int) or isinstance(row["iteration"], bool):
        raise ValueError("a row of scores has no iteration")
    return dict(checked_row(row))


class _Shape(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Agent(_Shape):
    role: Role
    scores: list[Annotated[dict[str, Any], AfterValidator(_checked_score)]]


class _ArmAgent(_Agent):
    scores: list[Annotated[dict[str, Any], AfterValidator(_checked_score)]] = Field(min_length=1)


class _Stage(_Shape):
    name: str
    seconds: float | None = None


class _Scorer(_Shape):
    headline: bool
    reward_accuracy: float = 0.0
    reward_accuracy_low: float = 0.0
    reward_accuracy_high: float = 0.0
    reward_pairs: int = 0


class _Evaluated(_Shape):
    arm: str
    agent: str
    iteration: int
    stage: str


class _Summary(_Shape):
    agents: dict[str, _Agent]
    stages: list[Annotated[dict[str, Any], AfterValidator(lambda row: _Stage.model_validate(row) and checked_row(row))]]
    seed: int | None
    versions: dict[str, str]
    arms: dict[str, dict[str, _ArmAgent]] = {}
    title: str = ""
    models: dict[str, str] = {}
    counts: dict[str, float] = {}
    scorers: dict[str, _Scorer] = {}
    development: dict[str, Annotated[dict[str, Any], AfterValidator(checked_row)]] = {}
    evaluations: list[_Evaluated] = []
    warnings: list[str] = []
    descriptions: dict[str, str] = {}


def checked_summary(found: Any) -> dict[str, Any]:
    """Return the content of a `summary.json` without its gap, and with the headline metric that its scores have.

    Raises ValueError that names the first entry of another shape.
    """
    try:
        _Summary.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:40] for part in first["loc"])
        raise ValueError(f"{where}: {first['msg']}" if where else "it is no summary") from None
    summary: dict[str, Any] = {name: value for name, value in found.items() if name not in ("metric", "pgr")}
    summary["metric"] = headline_metric(summary)
    return summary
