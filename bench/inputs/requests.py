"""The requests of the generation benchmarks: prompt and answer lengths in a committed file.

    python -m bench.inputs.requests     writes bench/requests/hh-like-*.json again, the same bytes

Lengths are log-normal with the medians and spreads of HH-RLHF's harmless-base (`bench/inputs/pairs.py`); ids are drawn
when the file is read, because only lengths matter to a model with random weights.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

from bench.inputs.pairs import PROMPT, RESPONSE

FOLDER = Path(__file__).resolve().parents[1] / "requests"
SIZES = {"hh-like-8": (8, 24, 12), "hh-like-64": (64, 512, 256), "hh-like-1024": (1024, 1024, 512)}
"""File -> (requests, longest prompt, longest answer)."""
FIRST_ID = 3


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and the number of tokens in its response."""

    prompt_ids: list[int]
    new_tokens: int


def load(name: str, vocab: int) -> list[GenerationRequest]:
    """Load the requests of `requests/<name>.json`, with ids below `vocab`."""
    rows = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["requests"]
    draw = random.Random(name)
    return [GenerationRequest([draw.randrange(FIRST_ID, vocab) for _ in range(p)], n) for p, n in rows]


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, (count, longest_prompt, longest_answer) in SIZES.items():
        draw = random.Random(f"lengths of {name}")

        def length(median: float, sigma: float, longest: int, draw: random.Random = draw) -> int:
            return max(1, min(longest, round(math.exp(draw.gauss(math.log(median), sigma)))))

        rows = [[length(*PROMPT, longest_prompt), length(*RESPONSE, longest_answer)] for _ in range(count)]
        about = "[prompt tokens, answer tokens] a request; made by bench/inputs/requests.py"
        text = json.dumps({"about": about, "requests": rows})
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
