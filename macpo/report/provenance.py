"""Where a run's numbers come from: when and by which command, on what, from which data, at what cost by stage.

Everything is read from what the run noted: attempts, manifests and timings. What an older run did not note is None.
"""

from __future__ import annotations

import calendar
import time
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from macpo.engine.errors import MacpoError
from macpo.engine.run.attempts import Attempt, read_attempts
from macpo.engine.run.manifest import Manifest
from macpo.report.run_reader import RunReader

KINDS = {
    "split_prompts": "data",
    "split_records": "data",
    "human_answers": "data",
    "pretrain_base": "pretraining of base models",
    "imitate": "supervised fine-tuning",
    "imitate_confidently": "supervised fine-tuning",
    "train_reward": "reward model training",
    "prefer": "preference training",
    "answer": "generation",
    "write_responses": "generation for evaluation",
    "evaluate_policy": "evaluation",
    "evaluate_pairs": "evaluation",
    "evaluate_examples": "evaluation",
    "evaluate_reward": "evaluation",
    "judge_base": "evaluation",
    "score_answers": "scoring by evaluation.scorers",
    "check_scorer": "scoring by evaluation.scorers",
    "score_candidates": "scoring of candidates",
    "score_reference": "reference log-probs",
}
"""Kind of a stage's work -> how the table calls it; the others choose or rate responses."""
OTHER, UNKNOWN = "selection and pairs", "kind not recorded"
_CLOCK = "%Y-%m-%dT%H:%M:%SZ"
_SHORT = 12


def provenance(run: RunReader, stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the template shows. `stages`: rows of {"name", "seconds", "tokens", …} in the run's order."""
    manifests = _manifests(run)
    attempts = [_attempt(each, following, manifests) for each, following in _with_next(read_attempts(run.path))]
    last = attempts[-1] if attempts else None
    commits = [each.created.get("commit", "") for each in manifests.values()]
    known = [each["seconds"] for each in attempts if each["seconds"] is not None]
    flop = {name: number for each in attempts for name, number in each["flop"].items()}
    times = [stage["seconds"] for stage in stages if stage.get("seconds") is not None]
    return {
        "attempts": attempts,
        "began": attempts[0]["began"] if attempts else None,
        "ended": (last["ended"] if last else None) or (_written(manifests) if run.finished else None),
        "command": attempts[0]["command"] if attempts else None,
        "device": last["device"] if last else None,
        "processes": last["processes"] if last else None,
        "commits": list(dict.fromkeys(filter(None, commits))),
        "versions": {**run.summary.get("versions", {}), **(last["versions"] if last else {})},
        "seconds": sum(known) if known else None,
        "at_least": any(not each["exact"] for each in attempts),
        "device_seconds": sum(each["seconds"] * each["processes"] for each in attempts if each["seconds"]) or None,
        "stage_seconds": sum(times) if times else None,
        "tokens": sum(stage.get("tokens") or 0 for stage in stages),
        "flop": sum(flop.values()) if flop else None,
        "files": _files(manifests),
        "kinds": _kinds(stages, manifests, flop),
    }


def _manifests(run: RunReader) -> dict[str, Manifest]:
    found = {}
    for stage in run.stages:
        try:
            found[stage.name] = Manifest.read(stage.path)
        except MacpoError:
            continue
    return found


def _written(manifests: Mapping[str, Manifest]) -> str | None:
    """When the last stage was written."""
    return max((each.created["time"] for each in manifests.values() if "time" in each.created), default=None)


def _with_next(attempts: list[Attempt]) -> list[tuple[Attempt, Attempt | None]]:
    return list(zip(attempts, [*attempts[1:], None], strict=False))


def _attempt(this: Attempt, following: Attempt | None, manifests: Mapping[str, Manifest]) -> dict[str, Any]:
    """An attempt's fields; one without an end is counted up to the last stage that it wrote, which is at least so."""
    found = this.model_dump() | {"exact": this.seconds is not None}
    if this.seconds is None:
        until = following.began if following is not None else "9999"
        times = [each.created.get("time", "") for each in manifests.values()]
        last = max((each for each in times if this.began <= each <= until), default=None)
        found["seconds"] = None if last is None else _between(this.began, last)
    return found


def _between(began: str, ended: str) -> float | None:
    try:
        return float(calendar.timegm(time.strptime(ended, _CLOCK)) - calendar.timegm(time.strptime(began, _CLOCK)))
    except ValueError:
        return None


def _files(manifests: Mapping[str, Manifest]) -> list[dict[str, Any]]:
    """The data that was read, and what the stages of data made of it, each with its SHA-256."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for name, manifest in manifests.items():
        if KINDS.get(manifest.kind) != "data":
            continue
        read = manifest.settings.get("files")
        for path, identity in (read if isinstance(read, Mapping) else {}).items():
            row = {"what": "read", "name": PurePath(str(path)).name, "bytes": None, "sha256": str(identity)}
            found.setdefault(("read", str(path)), row)
        for path, entry in manifest.files.items():
            row = {"what": "made", "name": f"{name}/{path}", "bytes": entry["bytes"], "sha256": entry["sha256"]}
            found[name, path] = row
    return [row | {"short": row["sha256"][:_SHORT]} for row in found.values()]


def _kinds(
    stages: Sequence[Mapping[str, Any]], manifests: Mapping[str, Manifest], flop: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The stages by what they do, with sums; None where no stage of a kind noted a number."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for stage in stages:
        manifest = manifests.get(stage["name"])
        kind = UNKNOWN if manifest is None else KINDS.get(manifest.kind, OTHER)
        seconds, tokens = stage.get("seconds"), stage.get("tokens")
        speed = {"tokens_per_s": tokens / seconds} if seconds and tokens else {}
        row = {**stage, "flop": flop.get(stage["name"]), "speed": {**speed, **stage.get("speed", {})}}
        groups.setdefault(kind, []).append(row)
    return [{"kind": kind, "stages": rows, **_sums(rows)} for kind, rows in groups.items()]


def _sums(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    sums: dict[str, Any] = {}
    for name in ("seconds", "tokens", "flop"):
        have = [row[name] for row in rows if row.get(name) is not None]
        sums[name] = sum(have) if have else None
    sums["tokens_per_s"] = sums["tokens"] / sums["seconds"] if sums["tokens"] and sums["seconds"] else None
    return sums


def duration(seconds: float | None) -> str:
    """Seconds as people say them; a dash for None."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def flop_words(number: float | None) -> str:
    """FLOP with a unit; a dash for None."""
    if number is None:
        return "–"
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if number < 1000 or unit == "E":
            return f"{number:.3g} {unit}FLOP"
        number /= 1000
    raise AssertionError


def moment_words(clock: str | None) -> str:
    """A UTC time as the page shows it."""
    return "not recorded" if not clock else clock.replace("T", " ").replace("Z", " UTC")
