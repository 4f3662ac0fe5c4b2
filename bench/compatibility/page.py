"""docs/compatibility.md: its text around the rows, and the rows read back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.compatibility.measure import COLUMNS, Row

PATH = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
PACKAGES = ("torch", "triton", "transformers", "peft", "tokenizers", "numpy")
"""Packages whose versions a row of tests names."""
_VERSION = "Measured with transformers "
_TEXT = """# Model families

Which causal-LM families of transformers work, as `python -m bench.compatibility` found by running each;
`python -m bench.compatibility --check` runs all of them again and names the rows that differ, and the tests do so for
some of each kind. {version}{number}.

A row is a tiny random model (2 layers, hidden size 32, 64 token ids, a sliding window of 6 tokens where the family has
one) in float32 on a CPU, compared with plain transformers in eager attention, a forward for each sequence:

- **scores**: every log-prob of the responses of three pairs, packed into one row.
- **trains**: every weight's gradient of the DPO loss of those pairs; then the trainer makes a step.
- **generates**: eight greedy tokens, against transformers' `generate`.
- **exports**: the folder of `macpo export`, read by plain transformers, against the trained policy.

What is refused says why, in `macpo check` already where the configuration tells (`engine/models/support.py`), else at
the model's first use, when a probe compares the engine's own paths with the model's (`engine/models/equivalence.py`):
the same probe looks at a family that is not in this table. Families that work here are not all tested with real
weights, in 16 bits, under tensor parallelism or with CUDA kernels. What a model adds to its loss in training, or draws
at random there, is in [models.md](models.md#what-a-model-adds-in-training).

{table}

## Real weights

The same on three pairs of English text with the weights of these folders, read in float32
(`python -m bench.compatibility --real FOLDER ...` adds a row for each). Gradients are compared with float64, from
which eager attention in float32 is further away than the engine:

{real}

## Versions

Tests of this repository with other versions of what it depends on, each in a fresh environment on a CPU:
`python -m bench.compatibility.versions SET` replaces a row. `oldest` takes the lower bounds of `pyproject.toml`,
`pinned` is `constraints.txt`, `newest` what the index offers (but for `--pin`). The selection is kernels under Triton's
interpreter, recipes, data, models and one loop; `--all` runs the whole suite.

{versions}
"""


def cells(*texts: str) -> str:
    """A line of a table."""
    return "| " + " | ".join(cell.replace("|", "/") for cell in texts) + " |"


def line(row: Row) -> str:
    """A row as a line of the table."""
    results = [f"refused: {row.refusal}" if row.refusal else row.results[0], *row.results[1:]]
    return cells(f"`{row.family}`", f"`{row.model}`", *results, *[""] * (len(COLUMNS) - len(results)))


def table(lines: Mapping[str, str], *head: str) -> str:
    """Lines under their headings."""
    return "\n".join([cells(*head), "|" + "---|" * len(head), *lines.values()])


@dataclass(frozen=True)
class Page:
    """What the committed page holds: lines by their first cell."""

    version: str
    """Of transformers, that it was made with."""
    families: dict[str, str]
    real: dict[str, str]
    versions: dict[str, str]


def text(page: Page) -> str:
    """The whole page."""
    return _TEXT.format(
        version=_VERSION,
        number=page.version,
        table=table(page.families, "model type", "class", *COLUMNS),
        real=table(page.real, "folder", "class", *COLUMNS),
        versions=table(page.versions, "set", "python", *PACKAGES, "tests", "result")
        if page.versions
        else "No set has been run to its end yet.",
    )


def committed() -> Page:
    """The page as it is."""
    page = PATH.read_text(encoding="utf-8")
    parts = re.split("^## ", page, flags=re.MULTILINE)
    rows = ({each.split("`")[1]: each for each in part.splitlines() if each.startswith("| `")} for part in parts)
    return Page(page.partition(_VERSION)[2].partition(".\n")[0], *rows)
