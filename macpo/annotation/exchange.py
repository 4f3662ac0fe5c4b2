"""The same items in other tools: Label Studio's `Pairwise` tasks there and back, and Argilla's records.

Sides are drawn by seed and the policies are not named there either.

Label Studio: a list of tasks `{"data": {"item", "prompt", "response1", "response2"}}`, the fields of its template
"Human Preference collection for RLHF". What comes back is its JSON export, in which an annotation's result of type
`pairwise` has `{"selected": "left"}` or `"right"` (labelstud.io/tags/pairwise, labelstud.io/guide/task_format); ties
are choices (LABELLING), and a cancelled annotation is a skip.

Argilla: one JSON object a line, `{"id", "prompt", "response1", "response2"}`, as `Dataset.records.log` takes them with
text fields of these names (docs.argilla.io, rg.Record).
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from macpo.annotation.design import Item, draw, name_of
from macpo.annotation.judgements import MAX_SECONDS, NAME, Judgement, write_imported
from macpo.annotation.study import Study
from macpo.engine.errors import DataError
from macpo.engine.files import read_json, write_json, write_jsonl

FORMATS = ("label-studio", "argilla")
LABELLING = """\
<View>
  <Text name="prompt" value="$prompt"/>
  <Pairwise name="comparison" toName="response1,response2"/>
  <Text name="response1" value="$response1"/>
  <Text name="response2" value="$response2"/>
  <Choices name="verdict" toName="prompt">
    <Choice value="tie"/>
    <Choice value="both-bad"/>
  </Choices>
</View>
"""
"""The labelling interface of a Label Studio project for the tasks of `export`."""
_SOURCE = "label-studio"


def export(study: Study, form: str, path: Path) -> int:
    """Write every item once, in the form of the tool, and return their number."""
    rows = [_fields(study, item) for item in study.items.values()]
    if form == "label-studio":
        write_json(path, [{"data": row} for row in rows])
    else:
        write_jsonl(path, ({"id": row.pop("item"), **row} for row in rows))
    return len(rows)


def import_label_studio(study: Study, path: Path) -> dict[str, int]:
    """Read Label Studio's JSON export of the exported tasks into one file a person, `label-studio-ID.jsonl`.

    Returns the number of judgements by name. A later annotation of the same task by the same person replaces an earlier
    one; an annotation without a choice is left out.

    Raises:
        DataError (3): not such an export, or none of its tasks is the study's.
        ConfigError (2): these people's judgements are here already.
    """
    tasks = read_json(path)
    if not isinstance(tasks, list):
        raise DataError("not a list of tasks", "export as JSON, not as JSON-MIN or CSV", file=path)
    found: dict[str, dict[str, Judgement]] = {}
    for number, task in enumerate(tasks, 1):
        try:
            item = study.items.get(str(task["data"].get("item")))
            for annotation in task["annotations"] if item else ():
                judgement = _judgement(study, item, annotation) if item else None
                if judgement is not None:
                    found.setdefault(_name(annotation), {})[judgement.item] = judgement
        except (KeyError, TypeError, AttributeError, ValidationError):
            fix = "export the project as JSON"
            raise DataError(f"task {number} is not as Label Studio exports it", fix, file=path) from None
    if not found:
        raise DataError("no task has a judgement of this study", "export the tasks of --export first", file=path)
    for name, judgements in sorted(found.items()):
        write_imported(study, name, _SOURCE, judgements.values())
    return {name: len(judgements) for name, judgements in sorted(found.items())}


def _swapped(study: Study, item: Item) -> bool:
    return bool(draw(study.design.seed, "export", item.id) % 2)


def _fields(study: Study, item: Item) -> dict[str, Any]:
    turns = [f"{turn.get('role', '')}: {turn.get('content') or ''}" for turn in item.prompt]
    left, right = reversed(item.answers) if _swapped(study, item) else item.answers
    return {"item": item.id, "prompt": "\n\n".join(turns), "response1": left, "response2": right}


def _name(annotation: Mapping[str, Any]) -> str:
    """A person's name here; Label Studio gives a number, or an object with one."""
    by = annotation.get("completed_by")
    name = f"{_SOURCE}-{by.get('id') if isinstance(by, dict) else by}"
    return name if NAME.fullmatch(name) else f"{_SOURCE}-{name_of(name)}"


def _judgement(study: Study, item: Item, annotation: Mapping[str, Any]) -> Judgement | None:
    verdict = "skip" if annotation.get("was_cancelled") else None
    for result in annotation["result"] if verdict is None else ():
        if result["type"] == "pairwise":
            verdict = result["value"]["selected"]
        elif result["type"] == "choices" and verdict is None:
            (verdict,) = result["value"]["choices"]
    if verdict is None:
        return None
    seconds = annotation.get("lead_time")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Judgement.model_validate(
        {
            "showing": name_of(_SOURCE, item.id),
            "item": item.id,
            "swapped": _swapped(study, item),
            "repeat": False,
            "verdict": verdict,
            "seconds": min(seconds, MAX_SECONDS) if isinstance(seconds, int | float) else None,
            "at": str(annotation.get("created_at") or now),
        }
    )
