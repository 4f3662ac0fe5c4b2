"""A recipe of the whole method that runs in seconds: two small teachers with different tokenizers, one student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from macpo.config import Recipe

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
