"""What a run found, in plain words and as a plain-text table; made from its summary and its claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from macpo.evaluation.agreement import in_words
from macpo.evaluation.claims import CONTRADICTED, HOLDS, INCONCLUSIVE, Claim, Verdict
from macpo.evaluation.summary import first_and_last, headline_metric, label_of, of_role

Kind: TypeAlias = Literal["good", "bad", "open", "note"]
MARKS: dict[Verdict, Kind] = {HOLDS: "good", CONTRADICTED: "bad", INCONCLUSIVE: "open"}


@dataclass(frozen=True)
class Finding:
    """One sentence; `kind`: good (the claim holds), bad (it is contradicted), open (neither is shown), note."""

    kind: Kind
    text: str


def headline(summary: Mapping[str, Any], found: Sequence[Claim]) -> tuple[str, list[Finding]]:
    """Return the result in a few sentences, and every claim of the run in words, unwelcome ones too."""
    metric = headline_metric(summary)
    if metric is None:
        return "No metric was measured for every agent, so this run answers nothing yet.", []
    agents = {name: agent for name, agent in summary["agents"].items() if agent["scores"]}
    label = label_of(metric)
    lead: list[str] = []
    notes: list[Finding] = []
    for name, agent in of_role(agents, "student").items():
        who = _called(name, "student")
        start, end = first_and_last(agent, metric) or (0.0, 0.0)
        last = agent["scores"][-1]["iteration"]
        if len(agent["scores"]) < 2:
            lead.append(f"{who} stands at a {label} of {end:.3f}; no iteration has been evaluated.")
            continue
        changes = [claim.estimate for claim in found if claim.kind == "naive" and claim.better == f"final {name}"]
        noise = any(change is not None and change.sign == 0 for change in changes)
        lead.append(
            f"{who} {_moved(start, end)} from {start:.3f} (naive weak-label SFT) to {end:.3f} "
            f"after {last} iteration{'s' * (last != 1)} ({label}){', which is inside the noise' * noise}."
        )
        best = max(agent["scores"], key=lambda row: row[metric])
        if best["iteration"] != last:
            text = f"{who}'s best iteration was {best['iteration']} ({best[metric]:.3f}), not the last."
            notes.append(Finding("note", f"{text} It was found on the test prompts, so part of it is luck."))
    for name, agent in of_role(agents, "policy").items():
        start, end = first_and_last(agent, metric) or (0.0, 0.0)
        if metric == "reward_accuracy":  # a score head is zero before it is trained
            lead.append(in_words("The reward model", agent["scores"][-1]))
            continue
        whose = f"{_called(name, 'policy')}'s {label}"
        lead.append(f"{whose} {_moved(start, end)} from {start:.3f} (before training) to {end:.3f}.")
    lead += [_recovered(gap) for gap in summary.get("pgr", [])]
    rising = [claim for claim in found if claim.kind == "teacher"]
    if rising:
        held = sum(claim.verdict == HOLDS for claim in rising)
        lead.append(f"{sum(claim.mean > 0 for claim in rising)} of {len(rising)} teachers rose, {held} beyond noise.")
    for name, ceiling in of_role(agents, "ceiling").items():
        top = ceiling["scores"][-1][metric]
        notes.append(Finding("note", f"The {name} (student trained on human labels) scores {top:.3f}."))
    for name, each in summary.get("scorers", {}).items():
        if "reward_accuracy" in each:
            notes.append(Finding("note", in_words(f"The scorer {name}", each)))
    return " ".join(lead), [_finding(claim, found) for claim in found] + notes


def _called(name: str, role: str) -> str:
    return f"The {role}" if name == role else f"The {role} {name}"


def _moved(start: float, end: float) -> str:
    start, end = round(start, 3), round(end, 3)  # judged as it is shown
    return "rose" if end > start else "fell" if end < start else "did not move"


def _recovered(gap: Mapping[str, Any]) -> str:
    last, between = gap["student"][-1], f"between the {gap['weak_agent']} and the ceiling"
    if last["value"] is None and gap["gap"] is not None:
        shown = " to ".join(f"{end:+.3f}" for end in gap["gap"])
        return f"PGR is not defined: the gap {between} is not shown to be above 0 (95% interval {shown})."
    if last["value"] is None:
        return f"PGR is not defined: there is no gap {between}."
    bounds = "" if last["low"] is None else f" (95% interval {last['low']:.0%} to {last['high']:.0%})"
    return f"It recovers {last['value']:.0%}{bounds} of the gap {between} (PGR)."


def _finding(claim: Claim, table: Sequence[Claim]) -> Finding:
    value, other = (round(sum(each) / len(each), 3) for each in (claim.better_values, claim.worse_values))
    relation = "above" if value > other else "below" if value < other else "equal to"
    text = (
        f"The {claim.better} is {relation} the {claim.worse}: {value:.3f} against {other:.3f} ({signed(value - other)})"
    )
    return Finding(MARKS[claim.verdict], f"{text}{_why(claim, table)}.")


def _why(claim: Claim, table: Sequence[Claim]) -> str:
    """The interval behind a verdict, and why there is none where nothing is shown."""
    if claim.estimate is None:
        return "; inconclusive, because no interval could be measured"
    low, high = claim.estimate.low, claim.estimate.high
    shown = f", 95% interval {low:+.3f} to {high:+.3f} over {claim.over}"
    if claim.estimate.sign == 0:
        return f"{shown}, which covers 0: inconclusive"
    if claim.verdict in (HOLDS, CONTRADICTED):
        return shown
    p = claim.adjusted_p if claim.adjusted_p is not None else 1.0
    return f"{shown}: inconclusive among {len(table)} claims (p {p:.3f} by Holm)"


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
    for gap in summary.get("pgr", []):
        shares = {row["iteration"]: row["value"] for row in gap["student"]}
        values = [_number(shares[i], "none") if i in shares else "" for i in iterations]
        lines.append([f"PGR, {gap['weak_agent']}", "student", *values, ""])
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
