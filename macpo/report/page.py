"""Writes `report.html` of a run or of several seeds: one file that opens offline; nothing is loaded from elsewhere.

    macpo report RUN

Every text in it may come from a language model or from data, so the templates escape all of it and a content
security policy forbids whatever would slip through, every script but the browser's own among it. Charts, that script
and its data (macpo/report/browser.py) are the only markup that is inserted as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from macpo.engine.errors import ConfigError
from macpo.engine.files import atomic_write, read_jsonl, write_json
from macpo.engine.run.manifest import unchanged
from macpo.evaluation.claims import Claim, claims, claims_json, claims_table, shared_metric
from macpo.evaluation.gap import gaps_recovered
from macpo.evaluation.prompt_scores import ScoredRun
from macpo.evaluation.summary import LABELS, headline_metric, label_of
from macpo.report import charts
from macpo.report.annotated import HEADINGS, annotated
from macpo.report.browser import browser, moment, script_hash
from macpo.report.findings import headline, score_rows, signed
from macpo.report.judged import HEADINGS as JUDGE_HEADINGS
from macpo.report.judged import judged
from macpo.report.provenance import duration, flop_words, moment_words, provenance
from macpo.report.run_reader import RunReader
from macpo.report.shown_text import clip, harmless
from macpo.report.titles import SUBTITLES, TITLES, title_of

SPEEDS = {
    "tokens_per_s": "tokens/s",
    "pairs_per_s": "pairs/s",
    "sequences_per_s": "sequences/s",
    "mfu": "MFU",
    "peak_memory_bytes": "peak memory",
}


def write_report(run_dir: Path, *, planned: Sequence[str] = (), out: Path | None = None) -> Path:
    """Write `report.html` into a run's folder, or the file `out`, from the files there, and return its path.

    `planned`: names of all stages of the run, where the caller knows them; those that are not committed are listed.
    A run without `summary.json` is reported as unfinished. The same folder gives the same bytes.

    Raises DataError for a folder that does not exist or a file in it that cannot be read, ConfigError for one that
    cannot be written.
    """
    run = RunReader(run_dir)
    page = environment().get_template("report.html.j2").render(_context(run, planned))
    try:
        return _write(out or run.path / "report.html", page)
    except ConfigError as error:
        (problem,) = error.problems
        raise ConfigError(
            f"the report cannot be written: {problem.message}", "name another file with --out", file=problem.file
        ) from error


def write_seeds_report(out_dir: Path, runs: Sequence[ScoredRun], found: Sequence[Claim]) -> Path:
    """Write `report.html`, `claims.json` and `claims.txt` of several seeds to `out_dir`; return the report's path.

    `found`: `macpo.evaluation.claims.claims(runs)`. Every claim is shown, also those that do not hold.
    """
    summaries = [run.summary for run in runs]
    metric = shared_metric(summaries)
    verdicts = Counter(claim.verdict for claim in found)
    iterations, rows = _mean_rows(summaries, metric)
    page = (
        environment()
        .get_template("seeds.html.j2")
        .render(
            title=f"{summaries[0].get('title', 'MACPO')}: {len(summaries)} seeds",
            seeds=[summary["seed"] for summary in summaries],
            versions=summaries[0].get("versions", {}),
            label=label_of(metric),
            claims=found,
            verdicts=verdicts,
            gaps=gaps_recovered(runs),
            iterations=iterations,
            rows=rows,
            per_seed=[(summary["seed"], *score_rows(summary, metric)) for summary in summaries],
            forest=charts.svg(charts.forest(found, metric)),
            scores=charts.svg(charts.seed_scores(summaries, metric)),
            links={seed: f"seed-{seed}/report.html" for seed in (s["seed"] for s in summaries)},
            has_link={s["seed"]: (Path(out_dir) / f"seed-{s['seed']}" / "report.html").exists() for s in summaries},
        )
    )
    write_json(Path(out_dir) / "claims.json", claims_json(found, summaries))
    atomic_write(Path(out_dir) / "claims.txt", claims_table(found, metric) + "\n")
    return _write(Path(out_dir) / "report.html", page)


def environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["clip"] = clip
    environment.filters["num"] = number
    environment.filters["signed"] = signed
    environment.filters["bounds"] = bounds
    environment.filters["speed"] = speed
    environment.filters["duration"] = duration
    environment.filters["flop"] = flop_words
    environment.filters["moment"] = moment_words
    environment.globals["moment_of"] = moment
    environment.globals["speed_names"] = SPEEDS
    environment.globals["speeds_of"] = _speeds_of
    environment.globals["label"] = label_of
    return environment


def _write(path: Path, page: str) -> Path:
    """Replace control and direction characters by U+FFFD; all text passes here."""
    atomic_write(path, harmless(page).encode("utf-8", errors="replace"))
    return path


def number(value: Any, name: str = "") -> str:
    """Format a number for tables; a dash for None."""
    if value is None:
        return "–"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if name == "perplexity" or abs(value) >= 100:
        return f"{value:,.1f}"
    return f"{value:.1f}" if name == "mean_words" else f"{value:.3f}"


def bounds(ends: Sequence[float] | None) -> str:
    """Format the ends of an interval; a dash where there is none."""
    return "–" if ends is None else f"{ends[0]:+.3f} … {ends[1]:+.3f}"


def speed(value: float | None, name: str) -> str:
    """Format one entry of SPEEDS for the stage table; empty for a stage that trains nothing."""
    if value is None:
        return ""
    if name == "mfu":
        return f"{value:.1%}"
    if name == "peak_memory_bytes":
        return f"{value / 1e9:.2f} GB"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _context(run: RunReader, planned: Sequence[str]) -> dict[str, Any]:
    summary = run.summary
    metric = headline_metric(summary)
    found = claims([run.scored]) if metric else []
    lead, findings = headline(summary, found)
    iterations, rows = score_rows(summary, metric) if metric else ([], [])
    done = {stage.name for stage in run.stages}
    curves = run.curves(summary["agents"])
    noted = {stage.name: run.timing(stage) for stage in run.stages}
    speeds = {stage.name: run.speed(stage) for stage in run.stages}
    stages = [
        {**noted.get(stage["name"], {}), **stage, "speed": speeds.get(stage["name"], {})} for stage in summary["stages"]
    ]
    shown = browser(run, one_model=run.kind in TITLES)
    return {
        "title": summary.get("title") or title_of(run.kind, run.path.resolve().name),
        "subtitle": SUBTITLES.get(run.kind, SUBTITLES["macpo"]),
        "one_model": run.kind in TITLES,
        "summary": summary,
        "finished": run.finished,
        "running": run.running,
        "missing": [name for name in planned if name not in done and name not in run.running],
        "committed": len(run.stages),
        "lead": lead,
        "findings": findings,
        "claims": found,
        "metric": metric,
        "iterations": iterations,
        "rows": rows,
        "spikes": [(curve.folder.base, spike) for curve in curves for spike in curve.spikes],
        "charts": charts.of_run(summary, metric, curves, stages),
        "metric_names": _metric_names(summary),
        "judges": judged(run),
        "judge_headings": JUDGE_HEADINGS,
        "people": annotated(run),
        "people_headings": HEADINGS,
        "browser": shown,
        "script_hash": script_hash() if shown else "",
        "selections": _selections(run),
        "made": provenance(run, stages),
        "stages": stages,
        "stage_counts": _stage_counts(stages),
        "speeds": _speeds_of(stages),
        "counts": {**run.counts(), **summary.get("counts", {})},
        "recipe": run.recipe,
    }


def _speeds_of(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the entries of SPEEDS that some of the stages have."""
    return [name for name in SPEEDS if any(name in stage["speed"] for stage in stages)]


def _metric_names(summary: Mapping[str, Any]) -> list[str]:
    """Return the metrics that some agent has, in the order of LABELS, then unknown ones; errors go beside means."""
    have = {name for agent in summary["agents"].values() for row in agent["scores"] for name in row}
    rest = sorted(have - set(LABELS) - {"iteration"})
    return [name for name in [*LABELS, *rest] if name in have and not name.endswith("_se")]


def _selections(run: RunReader) -> list[dict[str, Any]]:
    """Return, by iteration, how often each teacher's response was kept, and its median perplexity."""
    found = []
    for iteration, stage in run.selections():
        kept: Counter[str] = Counter()
        perplexities: dict[str, list[float]] = {}
        total = 0
        for _, row in read_jsonl(unchanged(stage.path, "scores.jsonl")):
            total += 1
            for index, candidate in enumerate(row["candidates"]):
                perplexities.setdefault(candidate["by"], []).append(candidate["perplexity"])
                kept[candidate["by"]] += index == row["kept"]
        by = [
            {"name": name, "kept": kept[name], "median": sorted(values)[len(values) // 2]}
            for name, values in sorted(perplexities.items())
        ]
        found.append({"iteration": iteration, "total": total, "by": by})
    return found


def _stage_counts(stages: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of further counts that stages recorded (rows dropped, responses resampled, …)."""
    have = {name for stage in stages for name, value in stage.items() if isinstance(value, int | float) and value}
    return sorted(have - {"seconds", "tokens"})


def _mean_rows(summaries: Sequence[Mapping[str, Any]], metric: str) -> tuple[list[int], list[dict[str, Any]]]:
    """Return every agent's mean score over seeds by iteration, with the number of seeds."""
    rows: dict[str, dict[str, Any]] = {}
    for summary in summaries:
        for row in score_rows(summary, metric)[1]:
            entry = rows.setdefault(row["name"], {"name": row["name"], "role": row["role"], "lists": {}, "changes": []})
            for iteration, value in row["values"].items():
                entry["lists"].setdefault(iteration, []).append(value)
            if row["change"] is not None:
                entry["changes"].append(row["change"])
    for entry in rows.values():
        entry["values"] = {i: sum(values) / len(values) for i, values in entry["lists"].items()}
        entry["change"] = sum(entry["changes"]) / len(entry["changes"]) if entry["changes"] else None
    return sorted({i for entry in rows.values() for i in entry["values"]}), list(rows.values())
