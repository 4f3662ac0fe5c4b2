"""Finished runs as files small enough to commit: what every policy scored on every test prompt, and the summary.

    python -m bench.evidence.runs RUN [RUN ...] --out bench/results/demo-world

One file a seed, `seed-N.json.xz`; the tables are made from these alone (paper_claims.py).
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness.device import provenance
from macpo.engine.errors import DataError
from macpo.engine.files import atomic_write
from macpo.evaluation.prompt_scores import Policy, PromptScores, ScoredRun
from macpo.report.run_reader import RunReader

DIGITS = 6
SUMMARY = ("seed", "agents", "arms", "development", "metric", "pgr")


def collected(run: Path) -> dict[str, Any]:
    """A finished run's part of the tables. Raises DataError for a run without scores."""
    scored = RunReader(run).scored
    if scored.scores is None:
        raise DataError(f"{run} has no scores by prompt", "run it to its end")
    policies = list(_policies(scored.summary))
    scored.scores.read(policies)
    values, words = scored.scores.columns(policies), scored.scores.words(policies)
    return {
        "summary": {key: scored.summary[key] for key in SUMMARY if key in scored.summary},
        "metric": scored.scores.metric,
        "prompts": list(map(str, scored.scores.clusters)),
        "policies": [list(policy) for policy in policies],
        "scores": [[round(value, DIGITS) for value in column] for column in values.T.tolist()],
        "words": [[int(value) for value in column] for column in words.T.tolist()],
    }


def _policies(summary: Mapping[str, Any]) -> Iterator[Policy]:
    for arm, agents in {"": summary["agents"], **summary.get("arms", {})}.items():
        for name, agent in agents.items():
            yield from (Policy(arm, name, row["iteration"]) for row in agent["scores"])


def write(run: Path, out: Path) -> Path:
    """Write a run's file, with the commit and versions that made it."""
    body = {**collected(run), "made_by": provenance(torch.device("cpu"))}
    path = out / f"seed-{body['summary']['seed']}.json.xz"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lzma.compress(json.dumps(body, separators=(",", ":")).encode(), preset=9))
    return path


def read(path: Path) -> ScoredRun:
    """A run as the statistics take it."""
    body = json.loads(lzma.decompress(path.read_bytes()))
    metric, prompts = body["metric"], body["prompts"]
    columns = {
        Policy(*policy): (scores, words)
        for policy, scores, words in zip(body["policies"], body["scores"], body["words"], strict=True)
    }

    def rows(policy: Policy) -> Iterator[dict[str, Any]] | None:
        if policy not in columns:
            return None
        return (
            {"prompt_id": prompt, metric: score, "answer": "w " * words}
            for prompt, score, words in zip(prompts, *columns[policy], strict=True)
        )

    return ScoredRun(body["summary"], PromptScores(metric, rows))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, required=True)
    said = parser.parse_args(argv)
    for run in said.runs:
        print(write(run, said.out))


if __name__ == "__main__":
    main()
