"""docs/compatibility.md: its text around the rows, and the rows read back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import transformers

from bench.compatibility.measure import COLUMNS, Row

PATH = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
_VERSION = "Measured with transformers "
_TEXT = """# Model families

Which causal-LM families of transformers work, as `python -m bench.compatibility` found by running each; a test runs
each again and compares its row. {version}{number}.

A row is a tiny random model (2 layers, hidden size 32, 64 token ids, a sliding window of 6 tokens where the family has
one) in float32 on a CPU, compared with plain transformers in eager attention, a forward for each sequence:

- **scores**: every log-prob of the responses of three pairs, packed into one row.
- **trains**: every weight's gradient of the DPO loss of those pairs; then the trainer makes a step.
- **generates**: eight greedy tokens, against transformers' `generate`.
- **exports**: the folder of `macpo export`, read by plain transformers, against the trained policy.

What is refused says why, in `macpo check` already where the configuration tells (`engine/models/support.py`), else at
the model's first use, when a probe compares the engine's own paths with the model's (`engine/models/equivalence.py`):
the same probe looks at a family that is not in this table. Families that work here are not all tested with real
weights, in 16 bits, under tensor parallelism or with CUDA kernels.

{table}

Mixtures of experts whose `config.json` has `output_router_logits: true` train with their load-balancing loss; dropout
and router jitter are off in training. Both are explained in [training.md](training.md#what-a-model-adds-in-training).
"""


def line(row: Row) -> str:
    """A row as a line of the table."""
    results = [f"refused: {row.refusal}" if row.refusal else row.results[0], *row.results[1:]]
    cells = [f"`{row.family}`", f"`{row.model}`", *results, *[""] * (len(COLUMNS) - len(results))]
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def text(rows: Sequence[Row]) -> str:
    """The whole page."""
    head = ["model type", "class", *COLUMNS]
    table = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *map(line, rows)]
    return _TEXT.format(version=_VERSION, number=transformers.__version__, table="\n".join(table))


def committed() -> tuple[str, dict[str, str]]:
    """The version of transformers that the page was made with, and its lines by family."""
    page = PATH.read_text(encoding="utf-8")
    version = page.partition(_VERSION)[2].partition(".\n")[0]
    lines = [each for each in page.splitlines() if each.startswith("| `")]
    return version, {each.split("`")[1]: each for each in lines}
