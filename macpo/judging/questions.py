"""What a judge is asked: two responses to one prompt, in both orders, in the words of a prompt file.

A prompt file is text with {conversation}, {a} and {b}. The judge ends with [[A]] (the first response is better), [[B]]
or [[C]] (a tie); the file asks for that itself, or leaves it to {verdict}, which becomes the words that fit the judge.
The prompts that come with the project are in our own words, after the criteria of MT-Bench's pairwise judge (Zheng et
al. 2023, arXiv 2306.05685, figure 5) and, for `helpful` and `harmless`, of Bai et al. 2022 (arXiv 2204.05862).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from macpo.engine.data.messages import Message
from macpo.engine.data.records import Pair, Prompt, read_records
from macpo.engine.errors import ConfigError, DataError
from macpo.engine.files import read_bytes, read_jsonl
from macpo.judging.settings import PROMPTS

_PLACE = re.compile(r"\{(conversation|a|b|verdict)\}")
_ENDINGS = {
    "explained": "Give your reasons in one or two sentences, then end with exactly one of [[A]] (A is better), [[B]] "
    "(B is better), [[C]] (a tie).",
    "at once": "Reply with exactly one of [[A]] (A is better), [[B]] (B is better), [[C]] (a tie), and nothing else.",
}
Ending = Literal["explained", "at once"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two responses to one prompt; `ours` wins or loses against `theirs`."""

    prompt_id: str
    messages: tuple[Message, ...]
    ours: str
    theirs: str


class JudgePrompt:
    """A prompt file and how its judge ends.

    Args:
        prompt: a name in PROMPTS, or the path of a file.
        ending: what {verdict} becomes: reasons and then the verdict, or the verdict at once.

    Attributes:
        sha256: hex SHA-256 of the file's bytes.

    Raises:
        ConfigError: no such file, no UTF-8, a place that is missing, or nothing in it about a verdict.
    """

    def __init__(self, prompt: str, ending: Ending = "explained") -> None:
        self.path = Path(__file__).parent / "prompts" / f"{prompt}.txt" if prompt in PROMPTS else Path(prompt)
        raw = read_bytes(self.path)
        self.sha256 = hashlib.sha256(raw).hexdigest()
        try:
            self.text = raw.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise ConfigError(f"invalid UTF-8 at byte {error.start}", "save it as UTF-8", file=self.path) from None
        self.ending: Ending = ending
        found = set(_PLACE.findall(self.text))
        missing = [f"{{{name}}}" for name in ("conversation", "a", "b") if name not in found]
        if missing:
            raise ConfigError(f"the prompt has no {' and no '.join(missing)}", "write it where it goes", file=self.path)
        if "verdict" not in found and not ("[[A]]" in self.text and "[[B]]" in self.text):
            fix = "write {verdict}, or ask to end with one of [[A]], [[B]], [[C]]"
            raise ConfigError("the prompt does not say how the judge gives its verdict", fix, file=self.path)

    def questions(self, comparison: Comparison) -> tuple[str, str]:
        """Return the judge's questions with our response as A, and with ours as B."""
        ours, theirs = comparison.ours, comparison.theirs
        return self._filled(comparison.messages, ours, theirs), self._filled(comparison.messages, theirs, ours)

    def _filled(self, messages: Sequence[Message], a: str, b: str) -> str:
        """One pass over the file, so that braces in a response stay text."""
        parts = {"conversation": conversation(messages), "a": a, "b": b, "verdict": _ENDINGS[self.ending]}
        return _PLACE.sub(lambda place: parts[place[1]], self.text)


def conversation(messages: Iterable[Message]) -> str:
    """The dialogue as a judge reads it: every turn between marks of its role; parts beside the text as JSON."""
    turns = []
    for message in messages:
        more = {name: part for name, part in message.items() if name not in ("role", "content")}
        text = message["content"] + ("\n" + json.dumps(more, ensure_ascii=False, sort_keys=True) if more else "")
        turns.append(f"<{message['role']}>\n{text}\n</{message['role']}>")
    return "\n\n".join(turns)


def read_comparisons(ours: Path, theirs: Path, limit: int | None = None) -> list[Comparison]:
    """The test prompts that two evaluations share, with both responses, in order of prompt id.

    Args:
        ours, theirs: files `evaluation.jsonl`.
        limit: keep only so many.

    Raises:
        DataError: they share no prompt, or a row is not an evaluation's.
    """
    mine, other = _responses(ours), _responses(theirs)
    found = [
        Comparison(name, Prompt.of(row["prompt"]).messages, row["answer"], other[name]["answer"])
        for name, row in sorted(mine.items())
        if name in other
    ][:limit]
    if not found:
        raise DataError("the two evaluations share no test prompt", "judge policies of one run", file=theirs)
    return found


def _responses(path: Path) -> dict[str, dict[str, Any]]:
    rows = {}
    for line, row in read_jsonl(path):
        if not all(isinstance(row.get(name), str) for name in ("prompt_id", "answer")) or "prompt" not in row:
            raise DataError("the row is no evaluation's", "run the stage again", file=path, line=line)
        rows[row["prompt_id"]] = row
    return rows


def human_comparisons(test: Path, limit: int | None = None) -> list[Comparison]:
    """The human test pairs of a data stage's `test.jsonl`, the chosen response as ours, in order of prompt id."""
    pairs = sorted(read_records(test, Pair), key=lambda pair: (pair.prompt.id, pair.chosen, pair.rejected))
    return [Comparison(pair.prompt.id, pair.prompt.messages, pair.chosen, pair.rejected) for pair in pairs][:limit]
