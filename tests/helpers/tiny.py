"""A recipe of the whole method that runs in seconds, what tests share of it, and a run folder made without a run."""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from macpo.config import Recipe
from macpo.engine.files import write_json, write_jsonl
from macpo.evaluation.metrics import gold_mean, preference_metrics, response_stats
from macpo.evaluation.summary import AgentHistory, build_summary

if TYPE_CHECKING:
    import pytest

OPTIM = {"learning_rate": 3e-3, "batch": 8, "save_every_steps": 3}


def init(hidden_size: int, tokenizer: str = "word") -> dict[str, Any]:
    return {
        "hidden_size": hidden_size,
        "num_layers": 1,
        "num_heads": 2,
        "context": 64,
        "tokenizer": tokenizer,
        "vocab_size": 400,
        "pretrain": OPTIM | {"max_documents": 60},
    }


def tiny(output: Path, **changes: Any) -> Recipe:
    """The tiny recipe; `changes` replace top-level keys."""
    tree: dict[str, Any] = {
        "output": str(output),
        "data": {
            "world": {
                "teacher_documents": 80,
                "student_documents": 80,
                "teacher_pairs": 16,
                "teacher_prompts": 64,
                "student_prompts": 20,
                "test_prompts": 12,
            }
        },
        "template": "vicuna",
        "context_tokens": 64,
        "iterations": 2,
        "teachers": [
            {"init": init(16), "tuning": {"type": "full"}},
            {"init": init(24, "bpe"), "tuning": {"type": "lora", "rank": 2, "target_modules": "all-linear"}},
        ],
        "student": {"init": init(32), "tuning": {"type": "full"}},
        "teacher_training": {"positive": OPTIM, "negative": OPTIM, "preference": OPTIM | {"learning_rate": 1e-3}},
        "student_training": {"positive": OPTIM, "negative": OPTIM, "preference": OPTIM | {"learning_rate": 1e-3}},
        "sampling": {"max_new_tokens": 12},
        "compute": {"device": "cpu", "dtype": "float32", "threads": 1, "wave_requests": 8, "generation_batch": 8},
    }
    return Recipe.model_validate(tree | changes)


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder called `name` that `make` has filled, once a session; nobody may change it afterwards.

    The first xdist worker that asks makes it, and others wait.

    Raises whatever `make` raises; the next one who asks tries again.
    """
    base = factory.getbasetemp()
    top = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # a worker's own folder is in the session's
    folder, done = top / name, top / f"{name}.done"
    with (top / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


EVIL = (
    '<img src=x onerror="alert(1)"></script><script>alert(2)</script>'
    " {{ 7 * 7 }} \x00\x1b[31m \u202egnol\u061c\u200b\u2028\u2066\ufeff"
)
TEACHERS = ("teacher0", "teacher1", "teacher2")
LEVELS = {
    "teacher0": (0.63, 0.71, 0.78, 0.84),
    "teacher1": (0.52, 0.60, 0.66, 0.71),
    "teacher2": (0.67, 0.74, 0.80, 0.79),
    "student": (0.70, 0.81, 0.93, 0.92),
    "ceiling": (0.99,),
}
ARMS = {
    "filtered-sft": (0.95,),
    "one-teacher": (0.66, 0.74, 0.78, 0.80),
    "weak-negatives": (0.70, 0.80, 0.86, 0.90),
    "own-samples": (0.70, 0.72, 0.73, 0.74),
}
TOPICS = ("repair the car", "plant the hedge", "scare the rabbit", "paint the kitchen", "feed the parrot")


def make_run(
    folder: Path, *, seed: int = 200, gold: bool = True, finished: bool = True, evil: bool = False, num_test: int = 60
) -> Path:
    """A run folder as `macpo run` leaves it: three teachers, a student, a ceiling, four ablation arms, T = 3."""
    rng = random.Random(seed)
    number, stages = 0, []
    shift = {name: rng.gauss(0, 0.02) for name in (*LEVELS, *ARMS)}

    def stage(name: str, seconds: float, tokens: int) -> Path:
        nonlocal number
        number += 1
        path = folder / f"{number:02d}-{name}"
        path.mkdir(parents=True)
        counts = {"tokens": tokens, "resampled": number % 3}
        write_json(path / "timing.json", {"seconds": seconds, "counts": counts})
        stages.append({"name": name, "seconds": seconds, "tokens": tokens})
        return path

    def prompt(i: int) -> dict:
        text = f"my name is emma and i want to {TOPICS[i % len(TOPICS)]} number {i} ."
        turns = [{"role": "user", "content": EVIL if evil and i == 0 else text}]
        return {"prompt_id": hashlib.sha256(text.encode()).hexdigest()[:16], "prompt": turns}

    def response(agent: str, i: int, level: float) -> str:
        if evil:
            return f"{agent} {EVIL}"
        if rng.random() < level:
            return f"sure emma , to {TOPICS[i % len(TOPICS)]} first open the door and then check step {i} . good luck !"
        return rng.choice(["go away , you silly person .", "well the cat and the street .", ""])

    def train(name: str, preference: bool, num_steps: int, level: float) -> None:
        rows, timing = [], []
        for step in range(1, num_steps + 1):
            done = step / num_steps
            row = {"step": step, "lr": 1e-4 * (1 - done), "grad_norm": 0.8 + rng.random() * 0.2, "tokens": 900}
            row["loss"] = (0.69 if preference else 2.2) * math.exp(-done * level) + rng.gauss(0, 0.03)
            if preference:
                row |= {"margin": done * level + rng.gauss(0, 0.05), "accuracy": min(1.0, 0.5 + done * level / 2)}
            if name == "iter2-student-train" and step == 150:
                row |= {"loss": row["loss"] + 1.5, "spike": 9.27}
            rows.append(row)
            unit, seconds = "pairs_per_s" if preference else "sequences_per_s", 0.25 + 0.25 * (step % 2)
            timing.append({"step": step, "seconds": seconds, "tokens_per_s": 900 / seconds, unit: 16 / seconds})
            timing[-1] |= {"mfu": 0.125 / seconds, "peak_memory_bytes": 10**9 + 10**6 * step}
        path = stage(name, 4 + 8 * level, 900 * num_steps)
        write_jsonl(path / "metrics.jsonl", rows)
        write_jsonl(path / "timing.jsonl", timing)

    def evaluate(agent: str, iteration: int, level: float, prefix: str = "") -> dict:
        rows = []
        for i in range(num_test):
            text = response(agent, i, level)
            bc, br = rng.gauss(-40, 4), rng.gauss(-41, 4)
            row = {**prompt(1000 + i), "answer": text, "finished": bool(rng.random() < 0.95)}
            row |= {"chosen_logp": bc + rng.gauss(4 * level - 1, 3), "rejected_logp": br + rng.gauss(-1, 3)}
            row |= {"base_chosen_logp": bc, "base_rejected_logp": br}
            if gold:
                row["gold"] = round(rng.random() * 0.2 + 0.8 * (rng.random() < level), 2)
            rows.append(row)
        if gold:  # the mean is the level
            off = level - sum(row["gold"] for row in rows) / num_test
            rows = [row | {"gold": row["gold"] + off} for row in rows]
        metrics = response_stats([row["answer"] for row in rows], [row["finished"] for row in rows])
        names = ("chosen_logp", "rejected_logp", "base_chosen_logp", "base_rejected_logp")
        metrics |= preference_metrics(*([row[name] for row in rows] for name in names), beta=0.1)
        if gold:
            metrics |= gold_mean([row["gold"] for row in rows])
        path = stage(f"{prefix}eval-{agent}-iter{iteration}", 2.5, 3000)
        write_json(path / "evaluation.json", metrics)
        write_jsonl(path / "evaluation.jsonl", rows)
        return metrics

    def select(iteration: int) -> None:
        path = stage(f"iter{iteration}-student-select", 3.1, 8000)
        scores, pairs = [], []
        for i in range(40):
            texts = [response(name, i, LEVELS[name][iteration - 1]) or "." for name in TEACHERS]
            candidates = [
                {"by": name, "text": text, "finished": True, "sum_logp": -30.0, "num_tokens": 12, "perplexity": ppl}
                for name, text, ppl in zip(TEACHERS, texts, (rng.uniform(2, 30) for _ in TEACHERS), strict=True)
            ]
            kept = min(range(3), key=lambda k: candidates[k]["perplexity"])
            scores.append({"prompt_id": prompt(i)["prompt_id"], "candidates": candidates, "kept": kept})
            scores[-1]["why"] = f"lowest perplexity of 3 ({candidates[kept]['perplexity']:.2f})"
            pair = {
                **prompt(i),
                "chosen": texts[kept],
                "rejected": response("student", i, 0.0),
                "chosen_finished": True,
            }
            pair |= {"rejected_finished": True, "chosen_by": TEACHERS[kept], "rejected_by": "student"}
            pairs.append(pair | {"ref_chosen_logp": -30.0})
        write_jsonl(path / "scores.jsonl", scores)
        write_jsonl(path / "pairs.jsonl", pairs)

    write_json(stage("data", 0.2, 0) / "counts.json", {"rows": {"student": 40}, "input": {"identical": 17}})
    agents = {name: AgentHistory("teacher") for name in TEACHERS}
    agents |= {"student": AgentHistory("student"), "ceiling": AgentHistory("ceiling")}
    arms: dict[str, dict[str, AgentHistory]] = {name: {"student": AgentHistory("student")} for name in ARMS}
    for name in agents:
        train(f"init-{name}-positive", False, 60, 1.2)
    last = 3 if finished else 1
    for t in range(last + 1):
        if t:
            select(t)
        for name in ("student", *TEACHERS):
            if t:
                train(f"iter{t}-{name}-train", True, 250, 0.4 * t)
            agents[name].add(t, evaluate(name, t, min(1.0, LEVELS[name][t] + shift[name])))
    agents["ceiling"].add(0, evaluate("ceiling", 0, 0.99))
    for arm, levels in ARMS.items():
        for t, level in enumerate(levels[: last + 1]):
            if t:
                train(f"{arm}.iter{t}-student-train", True, 20, 0.3)
            arms[arm]["student"].add(t, evaluate("student", t, level + shift[arm], f"{arm}."))
    (folder / "recipe.yaml").write_text(f"seed: {seed}\niterations: 3\n# {EVIL if evil else 'as resolved'}\n")
    if not finished:
        (folder / f"{number + 1:02d}-iter2-student-select.tmp").mkdir()
        return folder
    summary = build_summary(
        agents,
        stages,
        seed,
        {"macpo": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.2"},
        arms=arms,
        title=EVIL if evil else "MACPO demo",
        models=dict.fromkeys(agents, EVIL if evil else "Llama, 4 layers × 128, 1.1 M parameters"),
        counts={"identical pairs dropped": 3, "empty responses resampled": 7},
        warnings=[EVIL] if evil else ["12 prompts appear in two rows of the data; the first row was kept."],
        descriptions={"own-samples": "the student's own samples as positives, no mutual learning"},
    )
    write_json(folder / "summary.json", summary)
    return folder
