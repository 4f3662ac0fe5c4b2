"""What a run found, in plain words and as a plain-text table; made from its summary alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from macpo.evaluation.agreement import in_words
from macpo.evaluation.summary import (
    best_initial_teacher,
    first_and_last,
    gaps_recovered,
    headline_metric,
    label_of,
    of_role,
)


@dataclass(frozen=True)
class Finding:
    """One sentence; `kind`: good (supports the claim), bad (contradicts it), note."""

    kind: Literal["good", "bad", "note"]
    text: str


def headline(summary: Mapping[str, Any]) -> tuple[str, list[Finding]]:
    """Return the result in one or two sentences, and every comparison that the run allows, unwelcome ones too."""
    metric = headline_metric(summary)
    if metric is None:
        return "No metric was measured for every agent, so this run answers nothing yet.", []
    agents = {name: agent for name, agent in summary["agents"].items() if agent["scores"]}
    summary = {**summary, "agents": agents}
    label = label_of(metric)
    lead: list[str] = []
    findings: list[Finding] = []
    for name, agent in of_role(agents, "student").items():
        start, end = first_and_last(agent, metric) or (0.0, 0.0)
        last = agent["scores"][-1]["iteration"]
        if len(agent["scores"]) < 2:
            lead.append(f"The {name} stands at a {label} of {end:.3f}; no iteration has been evaluated.")
        else:
            lead.append(
                f"The {name} {_moved(start, end)} from {start:.3f} (naive weak-label SFT) to {end:.3f} "
                f"after {last} iteration{'s' * (last != 1)} ({label})."
            )
            noise = _noise(agent["scores"][0], agent["scores"][-1], metric)
            findings.append(_compare(f"the last iteration of {name}", end, "its naive weak-label start", start, noise))
            best = max(agent["scores"], key=lambda row: row[metric])
            if best["iteration"] != last:
                text = f"The {name}'s best iteration was {best['iteration']} ({best[metric]:.3f}), not the last."
                findings.append(Finding("note", text))
        findings += _against_others(summary, name, agent, metric)
    for name, agent in of_role(agents, "policy").items():
        start, end = first_and_last(agent, metric) or (0.0, 0.0)
        if metric == "reward_accuracy":  # a score head is zero before it is trained
            lead.append(in_words("The reward model", agent["scores"][-1]))
            continue
        lead.append(f"The {name}'s {label} {_moved(start, end)} from {start:.3f} (before training) to {end:.3f}.")
    recovered = gaps_recovered(summary)
    if recovered:
        share = recovered["student"][-1]["value"]
        if share is None:
            lead.append("PGR is not defined: the ceiling is not above the best initial teacher.")
        else:
            lead.append(f"It recovers {share:.0%} of the gap between the best initial teacher and the ceiling (PGR).")
    risen = {
        name: ends
        for name, agent in of_role(agents, "teacher").items()
        if len(agent["scores"]) > 1 and (ends := first_and_last(agent, metric))
    }
    if risen:
        up = [name for name, (start, end) in risen.items() if end > start]
        lead.append(f"{len(up)} of {len(risen)} teachers rose.")
        for name, (start, end) in risen.items():
            noise = _noise(agents[name]["scores"][0], agents[name]["scores"][-1], metric)
            findings.append(_compare(f"the last iteration of {name}", end, "its start", start, noise))
    for name, each in summary.get("scorers", {}).items():
        if "reward_accuracy" in each:
            findings.append(Finding("note", in_words(f"The scorer {name}", each)))
    return " ".join(lead), findings


def _against_others(summary: Mapping[str, Any], name: str, agent: Mapping[str, Any], metric: str) -> list[Finding]:
    agents, final = summary["agents"], agent["scores"][-1]
    who, end, found = f"the final {name}", final[metric], []
    weak = best_initial_teacher(agents, metric)
    if weak:
        noise = _noise(final, agents[weak[0]]["scores"][0], metric)
        found.append(_compare(who, end, f"the best initial teacher ({weak[0]})", weak[1], noise))
    for other, baseline in of_role(agents, "baseline").items():
        row = baseline["scores"][-1]
        found.append(_compare(who, end, f"the baseline {other}", row[metric], _noise(final, row, metric)))
    for arm, members in summary.get("arms", {}).items():
        row = members[name]["scores"][-1] if name in members else {}
        if row.get(metric) is not None:
            found.append(
                _compare(who, end, f"the {name} of the ablation {arm}", row[metric], _noise(final, row, metric))
            )
    for other, ceiling in of_role(agents, "ceiling").items():
        top = ceiling["scores"][-1][metric]
        found.append(Finding("note", f"The {other} (student trained on human labels) scores {top:.3f}."))
    return found


def _moved(start: float, end: float) -> str:
    start, end = round(start, 3), round(end, 3)  # judged as it is shown
    return "rose" if end > start else "fell" if end < start else "did not move"


def _noise(one: Mapping[str, Any], other: Mapping[str, Any], metric: str) -> float:
    """Return two standard errors of the difference of two measured values; 0 where none was recorded."""
    return 2 * math.hypot(one.get(f"{metric}_se") or 0.0, other.get(f"{metric}_se") or 0.0)


def _compare(who: str, value: float, whom: str, other: float, noise: float) -> Finding:
    value, other = round(value, 3), round(other, 3)  # judged as it is shown
    above = value > other
    relation = "above" if above else "below" if value < other else "equal to"
    text = f"{who[0].upper()}{who[1:]} is {relation} {whom}: {value:.3f} against {other:.3f} ({signed(value - other)})"
    if 0 < abs(value - other) <= noise:
        return Finding("good" if above else "bad", f"{text}, inside the test set's noise of ±{noise:.3f}.")
    return Finding("good" if above else "bad", f"{text}.")


def score_rows(summary: Mapping[str, Any], metric: str) -> tuple[list[int], list[dict[str, Any]]]:
    """Return (iterations, rows of {"name", "role", "values": {iteration: value}, "errors", "change"}), arms last."""
    everyone: list[tuple[str, str, Mapping[str, Any]]] = [
        (name, agent["role"], agent) for name, agent in summary["agents"].items()
    ]
    order = ("teacher", "student", "policy", "baseline", "ceiling")
    everyone.sort(key=lambda item: order.index(item[1]))
    for arm, members in summary.get("arms", {}).items():
        everyone += [(f"{arm}: {name}", "ablation", agent) for name, agent in of_role(members, "student").items()]
    rows, iterations = [], set()
    for name, role, agent in everyone:
        values = {row["iteration"]: row[metric] for row in agent["scores"] if row.get(metric) is not None}
        errors = {row["iteration"]: row.get(f"{metric}_se") for row in agent["scores"]}
        iterations |= set(values)
        ends = first_and_last(agent, metric)
        change = ends[1] - ends[0] if ends and len(values) > 1 else None
        rows.append({"name": name, "role": role, "values": values, "errors": errors, "change": change})
    return sorted(iterations), rows


def table(summary: Mapping[str, Any]) -> str:
    """Format every agent's score by iteration as plain text; `change` is last minus first. No final newline."""
    metric = headline_metric(summary)
    if metric is None:
        return "no metric was measured for every agent"
    iterations, rows = score_rows(summary, metric)
    lines = [["agent", "role", *(f"it{i}" for i in iterations), "change"]]
    for row in rows:
        values = [_number(row["values"].get(i)) for i in iterations]
        change = "" if row["change"] is None else signed(row["change"])
        lines.append([row["name"], row["role"], *values, change])
    recovered = gaps_recovered(summary)
    if recovered:
        shares = {row["iteration"]: row["value"] for row in recovered["student"]}
        lines.append(
            ["PGR", "student", *(_number(shares.get(i), "none") if i in shares else "" for i in iterations), ""]
        )
    counts = {row.get(_COUNTS.get(metric, "")) for agent in summary["agents"].values() for row in agent["scores"]}
    size = f", {counts.pop()} held-out prompts" if len(counts) == 1 and None not in counts else ""
    return "\n".join([f"{label_of(metric)} by iteration{size}, seed {summary['seed']}", *columns(lines, 2)])


_COUNTS = {"gold": "gold_answers", "preference_accuracy": "preference_pairs", "reward_accuracy": "reward_pairs"}


def signed(change: float) -> str:
    """Format a change with its sign; one that rounds to zero has none."""
    text = f"{change:+.3f}"
    return text if float(text) else "0.000"


def _number(value: float | None, absent: str = "") -> str:
    return absent if value is None else f"{value:.3f}"


def columns(lines: Sequence[Sequence[str]], num_text: int) -> list[str]:
    """Align text rows, with a rule under the first; the first `num_text` columns left, the others right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(c.ljust(w) if i < num_text else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    return [text[0].rstrip(), "-" * len(text[0]), *(line.rstrip() for line in text[1:])]
