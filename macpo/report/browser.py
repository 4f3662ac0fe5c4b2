"""The browser of responses: what it embeds in the page, its script, and the first few prompts for readers without it.

The data stand in the page once, as JSON that no text can end; the script makes text nodes of them and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from macpo.evaluation.summary import label_of, score_metric
from macpo.report.responses import GOLD, MOST_CHARS, PERPLEXITY, REWARD, Collection, Row, Source, collections
from macpo.report.run_reader import RunReader
from macpo.report.shown_text import clip, harmless

LONGEST = 6000
"""Characters of one text in the page."""
NUM_PLAIN = 3
"""Prompts of each collection that are shown without the script, and in print."""
MOVES = {0: "before training", 1: "after training"}
"""What the iterations of a recipe of one model are."""
_ESCAPES = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}


def script() -> Markup:
    """The browser's script."""
    return Markup((Path(__file__).parent / "templates" / "browser.js").read_text(encoding="utf-8"))


def script_hash() -> str:
    """What the page's security policy knows the script by, so that no other one runs."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script().encode()).digest()).decode()


def embedded(value: Any) -> Markup:
    """JSON for the inside of a script element: no text in it can end the element or begin another one."""
    return Markup(json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_ESCAPES))


def browser(run: RunReader, *, one_model: bool) -> dict[str, Any] | None:
    """What the template needs; None of a run without any response. `one_model`: of a recipe that trains one policy."""
    found = collections(run)
    if not found:
        return None
    return {
        "data": embedded({"collections": [_shown(each, one_model) for each in found]}),
        "script": script(),
        "collections": found,
        "plain": [_plain(each, one_model) for each in found],
        "kept": [_kept_worse(each) for each in found if each.judged_by],
        "unscored": any(_has_candidates(each) and not each.judged_by for each in found),
        "most": MOST_CHARS,
        "longest": LONGEST,
        "num_plain": NUM_PLAIN,
    }


def label_of_score(name: str) -> str:
    """A score's name at the head of its column."""
    return name if name in (PERPLEXITY, REWARD) else label_of(name if name == GOLD else score_metric(name))


def moment(iteration: int | None, one_model: bool) -> str:
    """What an iteration is called."""
    if iteration is None:
        return ""
    return MOVES.get(iteration, "") if one_model else f"iteration {iteration}"


def _shown(collection: Collection, one_model: bool) -> dict[str, Any]:
    sources = list(dict.fromkeys(row.source for prompt in collection.prompts for row in prompt.rows))
    place = {source: index for index, source in enumerate(sources)}
    scores = collection.scores

    def row_of(row: Row) -> list[Any]:
        numbers = [None if name not in row.scores else round(row.scores[name], 4) for name in scores]
        return [place[row.source], text(row.text), int(row.finished), numbers]

    return {
        "name": collection.name,
        "title": collection.title,
        "scores": [label_of_score(name) for name in scores],
        "judged": scores.index(collection.judged_by) if collection.judged_by else -1,
        "perplexity": scores.index(PERPLEXITY) if PERPLEXITY in scores else -1,
        "sources": [_source(source, one_model) for source in sources],
        "prompts": [
            [
                text(prompt.id),
                [[text(role), text(said)] for role, said in prompt.turns],
                [row_of(row) for row in prompt.rows],
            ]
            for prompt in collection.prompts
        ],
    }


def _source(source: Source, one_model: bool) -> dict[str, Any]:
    found = {name: text(value) if isinstance(value, str) else value for name, value in source._asdict().items()}
    return found | {"moment": moment(source.iteration, one_model)}


def text(value: str) -> str:
    """A text as the page may show it."""
    return harmless(clip(value, LONGEST))


def _plain(collection: Collection, one_model: bool) -> dict[str, Any]:
    """The first prompts as a table each."""
    scores = collection.scores
    return {
        "title": collection.title,
        "scores": [label_of_score(name) for name in scores],
        "prompts": [
            {
                "turns": [{"role": role, "content": said} for role, said in prompt.turns],
                "rows": [
                    {
                        "source": row.source,
                        "moment": moment(row.source.iteration, one_model),
                        "text": row.text,
                        "finished": row.finished,
                        "scores": [row.scores.get(name) for name in scores],
                    }
                    for row in prompt.rows
                ],
            }
            for prompt in collection.prompts[:NUM_PLAIN]
        ],
    }


def _has_candidates(collection: Collection) -> bool:
    return any(row.source.kind == "lost" for prompt in collection.prompts for row in prompt.rows)


def _kept_worse(collection: Collection) -> dict[str, Any]:
    """By group: how often a better candidate was lost, and the mean scores of the kept, of all and of the best ones."""
    name = collection.judged_by
    assert name is not None
    groups: dict[str, dict[str, Any]] = {}
    for prompt in collection.prompts:
        for group, worse in prompt.lost_better(name).items():
            given = [row for row in prompt.rows if row.source.group == group and name in row.scores]
            every = [row.scores[name] for row in given if row.source.kind in ("kept", "lost")]
            kept = [row.scores[name] for row in given if row.source.kind == "kept"]
            into = groups.setdefault(group, {"total": 0, "worse": 0, "kept": 0.0, "every": 0.0, "best": 0.0})
            into["total"] += 1
            into["worse"] += worse
            into["kept"] += sum(kept) / len(kept)
            into["every"] += sum(every) / len(every)
            into["best"] += max(every)
    for into in groups.values():
        for part in ("kept", "every", "best"):
            into[part] /= into["total"]
    return {"label": label_of_score(name), "groups": groups, "sampled": collection.sampled}
