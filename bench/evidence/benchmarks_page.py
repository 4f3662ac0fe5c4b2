"""Write docs/benchmarks.md from the committed result files.

    python -m bench.evidence.benchmarks_page

No number of that page is typed by hand. A peer that is slower, faster or inexact is shown alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from macpo.engine.files import atomic_write

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"

HEAD = """\
<!-- made by `python -m bench.evidence.benchmarks_page`; do not edit -->

# Benchmarks

These tables are made from the files in `bench/results`. Each file was measured at the commit that it names; what
changed in the code since is in `LOG.md`, with dead ends. `make bench` measures the machine at hand, and `--shapes`,
`--peers` and `--repeats` of each script choose what.

- **ms**: median time of macpo's own implementation, with the fastest and slowest round.
- **of ceiling**: its work per second as a share of what the named ceiling reaches in the same round; it can be above
  100% where the operator reads and the ceiling is a copy, which also writes.
- **peers**: their time as a multiple of macpo's in the same rounds. **Above 1, macpo is faster; below 1, the peer is.**
  A † marks a peer whose result is further from float64 than the bound for exact results of that dtype; one that is
  wrong is named without a time. Peers that were not installed or do not take the case are left out.
"""
OTHERS = """
## Other results

Not tables of peers, and therefore not repeated here: {files}.
"""


def text() -> str:
    """Return the page."""
    tables, others = [], []
    for folder in sorted(path for path in RESULTS.iterdir() if any(path.glob("*.json"))):
        files = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))]
        compared = [(path, body) for path, body in files if is_comparison(body)]
        others += [f"`{path.relative_to(ROOT)}`" for path, body in files if not is_comparison(body)]
        if compared:
            tables.append(f"\n## {compared[0][1]['device']}\n")
        tables += ["\n".join(table(path, body)) for path, body in compared]
    return HEAD + "\n".join(tables) + "\n" + OTHERS.format(files=", ".join(others))


def is_comparison(body: dict[str, Any]) -> bool:
    """Whether a result file has cases of macpo and its peers, in the format of bench/harness/measure.py."""
    results = [result for case in body.get("cases", ()) for result in case.get("results", ())]
    return bool(results) and all("peer" in result and "times_ours" in result for result in results)


def table(path: Path, body: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of one file's table."""
    versions = ", ".join(f"{name} {version}" for name, version in body["versions"].items())
    yield f"### {path.stem} on {body['device']}\n"
    yield f"`{path.relative_to(ROOT)}`, {body['date'][:10]}, commit `{body['commit'][:10]}`; {versions}.\n"
    yield "| case | ms | of ceiling | peers, × macpo's time |"
    yield "| --- | --- | --- | --- |"
    for case in body["cases"]:
        ours, *peers = case["results"]
        span = f"{ours['median_ms']:.4g} ({ours['min_ms']:.4g} to {ours['max_ms']:.4g})"
        shown = "; ".join(filter(None, map(peer, peers)))
        yield f"| {case['name']} | {span} | {ours['share_of_ceiling']:.0%} of {case['ceiling']} | {shown} |"
    yield ""


def peer(result: dict[str, Any]) -> str:
    """Return one peer's entry; empty for ceilings and for what was absent."""
    if result["status"] == "absent" or result["peer"].startswith("("):
        return ""
    if result["times_ours"] is None:
        return f"{result['peer']}: wrong"
    mark = "" if result["status"] == "exact" else "†"
    return f"{result['peer']} {result['times_ours']:.2f}{mark}"


def main() -> None:
    atomic_write(PAGE, text())


if __name__ == "__main__":
    main()
