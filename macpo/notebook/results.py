"""A run's folder as an object: its data as DataFrames, its policies. Looking at results needs no torch."""

from __future__ import annotations

import html
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from macpo.engine.paths import expanded
from macpo.evaluation.summary import headline_metric, label_of
from macpo.notebook import frames
from macpo.report.run_reader import RunReader

if TYPE_CHECKING:
    from macpo.commands.policies.policy import Policy


class Run:
    """The folder of a run, finished or in progress: its data as DataFrames, and its policies.

    Files are read when they are asked for. docs/python.md lists the columns of the frames.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Raises DataError where there is no such folder."""
        self.folder = expanded(Path(folder)).absolute()
        self._reader()

    @property
    def finished(self) -> bool:
        """Whether every stage is done and the summary is written."""
        return self._reader().finished

    @property
    def report(self) -> Path:
        """The page that `macpo report` writes, which a finished run has."""
        return self.folder / "report.html"

    @property
    def summary(self) -> dict[str, Any]:
        """The content of `summary.json`; of a run in progress, as far as it has come."""
        return self._reader().summary

    def scores(self) -> pd.DataFrame:
        """Every agent's metrics on the test prompts, a row for each iteration."""
        return frames.scores(self._reader())

    def responses(self) -> pd.DataFrame:
        """Every evaluated policy's response to every test prompt, with its scores."""
        return frames.responses(self._reader())

    def pairs(self) -> pd.DataFrame:
        """Every contrastive pair that a policy learns from."""
        return frames.pairs(self._reader())

    def candidates(self) -> pd.DataFrame:
        """The responses among which the perplexity filter chose, with their perplexities."""
        return frames.candidates(self._reader())

    def steps(self) -> pd.DataFrame:
        """The metrics of every optimiser step."""
        return frames.steps(self._reader())

    def stages(self) -> pd.DataFrame:
        """What every committed stage took."""
        return frames.stages(self._reader())

    def policy(self, agent: str = "", iteration: int | None = None, **choice: Any) -> Policy:
        """A policy of this run, opened to write and to score; `load_policy` lists what can be chosen."""
        from macpo.commands.policies.opening import load_policy

        return load_policy(self.folder, agent, iteration, **choice)

    def __repr__(self) -> str:
        reader = self._reader()
        return f"Run({str(self.folder)!r}): {len(reader.stages)} stages{'' if reader.finished else ', not finished'}"

    def _repr_html_(self) -> str:
        """The headline metric by agent and iteration."""
        said, found = f"<p>{html.escape(repr(self))}</p>", self.scores()
        metric = headline_metric(self.summary)
        if metric is None:
            return said
        table = found.pivot_table(index=["arm", "agent"], columns="iteration", values=metric, sort=False)
        return f"{said}<p>{html.escape(label_of(metric))}</p>{table.to_html(float_format='{:.3f}'.format, na_rep='')}"

    def _reader(self) -> RunReader:
        return RunReader(self.folder)
