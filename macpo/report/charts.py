"""The charts of a report: summaries, claims and training curves become `macpo.report.plots` series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from macpo.evaluation.claims import Claim
from macpo.evaluation.metrics import mean_and_se
from macpo.evaluation.summary import Agents, label_of, of_role
from macpo.report.findings import score_rows
from macpo.report.plots import INK, STUDENT, Line, bars, dots, line_panels, series_style, smooth
from macpo.report.run_reader import Curves

MOST_STAGES = 32


def of_run(
    summary: Mapping[str, Any], metric: str | None, curves: Sequence[Curves], stages: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return name -> SVG, or None for a chart without data; `training` -> kind -> [(agent, SVG)]."""
    return {
        "scores": svg(by_iteration(summary, [metric])) if metric else None,
        "final": svg(final(summary, metric)) if metric and _compared(summary) else None,
        "preference": svg(by_iteration(summary, ["preference_accuracy", "reward_margin", "logp_margin"])),
        "style": svg(by_iteration(summary, ["mean_words", "distinct_2", "distinct_3"])),
        "training": training(curves),
        "stages": svg(stage_times(stages)),
    }


def svg(chart: str) -> Markup | None:
    """Wrap a chart as markup that templates insert unescaped and narrow screens scroll; None for no chart."""
    return Markup('<div class="scroll">' + chart + "</div>") if chart else None


def _compared(summary: Mapping[str, Any]) -> bool:
    return bool(summary.get("arms") or of_role(summary["agents"], "baseline"))


def agent_lines(agents: Agents, metric: str) -> list[Line]:
    """Draw teachers and student by iteration; baselines and ceiling, which have no iterations, as level lines."""
    lines, teachers, baselines = [], 0, 0
    for name, agent in agents.items():
        rows = [row for row in agent["scores"] if row.get(metric) is not None]
        if agent["role"] == "teacher":
            colour, marker = series_style(teachers)
            teachers += 1
        if not rows:
            continue
        x, y = [row["iteration"] for row in rows], [row[metric] for row in rows]
        errors = [row.get(f"{metric}_se") for row in rows]
        error = None if None in errors else errors
        if agent["role"] == "teacher":
            lines.append(Line(name, x, y, colour, marker, error=error))
        elif agent["role"] in ("student", "policy"):
            lines.append(Line(name, x, y, STUDENT, "o", width=2.8, error=error))
        elif agent["role"] == "ceiling":
            lines.append(Line(name, x, y, INK, width=1.3, dash=":", flat=True))
        else:
            colour, _ = series_style(7 - baselines)
            baselines += 1
            lines.append(Line(name, x, y, colour, width=1.3, dash="--", flat=True))
    return lines


def _without_rounds(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The student of each arm that has no iterations, such as SFT on filtered labels, as a baseline of the arm's name.

    Not where it is the run's own naive student.
    """
    found = {}
    starts = [student["scores"][:1] for student in of_role(summary["agents"], "student").values()]
    for arm, members in summary.get("arms", {}).items():
        for student in of_role(members, "student").values():
            if len(student["scores"]) == 1 and student["scores"] not in starts:
                found[arm] = {"role": "baseline", "scores": student["scores"]}
    return found


def by_iteration(summary: Mapping[str, Any], metrics: Sequence[str], inline: bool = True) -> str:
    """Draw one panel per metric that some agent has; return "" when there is none."""
    panels = []
    agents = {**summary["agents"], **_without_rounds(summary)}
    for metric in metrics:
        lines = agent_lines(agents, metric)
        if lines:
            name = label_of(metric)
            panels.append(("", name, lines) if len(metrics) == 1 else (name[0].upper() + name[1:], "", lines))
    if not panels:
        return ""
    height = 4.1 if len(panels) == 1 else 3.2
    xlabel = "0: before training, 1: after" if of_role(agents, "policy") else "iteration"
    return line_panels(panels, xlabel=xlabel, height=height, inline=inline, legend_columns=6)


def final(summary: Mapping[str, Any], metric: str, inline: bool = True) -> str:
    """Draw the last score of student, baselines, ceiling and every ablation's student, with 95% intervals."""
    _, rows = score_rows(summary, metric)
    shown: list[tuple[str, float, tuple[float, float] | None, Sequence[float]]] = []
    highlight: dict[str, str] = {}
    for row in rows:
        if row["role"] == "teacher" or not row["values"]:
            continue
        last = max(row["values"])
        value, error = row["values"][last], row["errors"].get(last)
        interval = (value - 1.96 * error, value + 1.96 * error) if error else None
        if row["role"] == "student":
            first = min(row["values"])
            if first != last:
                shown.append((f"{row['name']}, naive weak-label start", row["values"][first], None, ()))
            shown.append((f"{row['name']}, last iteration", value, interval, ()))
            highlight[f"{row['name']}, last iteration"] = STUDENT
        else:
            shown.append((row["name"].removesuffix(": student"), value, interval, ()))
            if row["role"] == "ceiling":
                highlight[shown[-1][0]] = INK
    return dots(shown, xlabel=label_of(metric), highlight=highlight, inline=inline) if shown else ""


def training(curves: Sequence[Curves]) -> dict[str, list[tuple[str, Markup | None]]]:
    """Return, for `preference` and for `supervised` stages, each agent's name and the chart of its stages."""
    charts: dict[str, list[tuple[str, Markup | None]]] = {"preference": [], "supervised": []}
    kinds = (("preference", ("loss", "margin", "accuracy")), ("supervised", ("loss", "grad_norm")))
    for kind, columns in kinds:
        ours = [curve for curve in curves if curve.preference == (kind == "preference")]
        for agent in dict.fromkeys(curve.agent for curve in ours):
            stages = [curve for curve in ours if curve.agent == agent]
            panels = [(column.replace("_", " "), "", _stage_lines(stages, column)) for column in columns]
            panels = [panel for panel in panels if panel[2]]
            chart = line_panels(panels, xlabel="step", whole_x=False, height=2.9)
            charts[kind].append((agent or "other stages", svg(chart)))
    return charts


def _stage_lines(stages: Sequence[Curves], column: str) -> list[Line]:
    lines = []
    for index, stage in enumerate(stages):
        if column in stage.columns:
            place, values = smooth(stage.columns[column])
            steps = [stage.columns["step"][0] + p for p in place]
            crosses = [(spike.step, spike.loss) for spike in stage.spikes] if column == "loss" else []
            lines.append(Line(stage.folder.base, steps, values, series_style(index)[0], width=1.5, crosses=crosses))
    return lines


def stage_times(stages: Sequence[Mapping[str, Any]]) -> str:
    """Draw seconds by stage in the run's order; of many stages the longest, with the others' sum in words."""
    timed = [(str(stage["name"]), float(stage["seconds"])) for stage in stages if stage.get("seconds") is not None]
    xlabel = "seconds"
    if len(timed) > MOST_STAGES:
        longest = set(sorted(range(len(timed)), key=lambda i: -timed[i][1])[:MOST_STAGES])
        rest = sum(seconds for i, (_, seconds) in enumerate(timed) if i not in longest)
        xlabel = f"seconds (the {MOST_STAGES} longest of {len(timed)} stages; the others take {rest:.0f} s together)"
        timed = [timed[i] for i in sorted(longest)]
    return bars(timed, xlabel=xlabel) if timed else ""


def forest(found: Sequence[Claim], metric: str, inline: bool = True) -> str:
    """Draw every claim's mean paired change with its 95% interval and the single seeds."""
    rows = [(f"{c.better} vs. {c.worse}", c.mean, c.interval, c.changes) for c in found]
    return dots(rows, xlabel=f"paired change in {label_of(metric)}", zero=0.0, inline=inline) if rows else ""


def seed_scores(summaries: Sequence[Mapping[str, Any]], metric: str, inline: bool = True) -> str:
    """Draw the mean over seeds by iteration, with a band of one standard error over seeds."""
    return by_iteration(mean_summary(summaries, metric), [metric], inline)


def mean_summary(summaries: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """Return a summary whose scores are means over seeds; `{metric}_se` is the standard error over seeds."""
    agents: dict[str, Any] = {}
    for summary in summaries:
        for name, agent in {**summary["agents"], **_without_rounds(summary)}.items():
            entry = agents.setdefault(name, {"role": agent["role"], "lists": {}})
            for row in agent["scores"]:
                if row.get(metric) is not None:
                    entry["lists"].setdefault(row["iteration"], []).append(row[metric])
    for entry in agents.values():
        means = {iteration: mean_and_se(values) for iteration, values in sorted(entry.pop("lists").items())}
        entry["scores"] = [{"iteration": i, metric: mean, f"{metric}_se": se} for i, (mean, se) in means.items()]
    return {"agents": agents}
