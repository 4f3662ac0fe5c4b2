"""How each kind of recipe is called at the head of its report."""

from __future__ import annotations

TITLES = {"sft": "Supervised fine-tuning", "preference": "Preference training", "reward": "Reward model"}
SUBTITLES = {
    "macpo": "Weak-to-strong alignment by multi-agent contrastive preference optimisation (arXiv 2410.07672)",
    "sft": "One policy, trained on one response to each prompt and evaluated before and after",
    "preference": "One policy, trained on preference pairs and evaluated before and after",
    "reward": "One reward model, trained on preference pairs and compared with people",
}


def title_of(kind: str, run_name: str) -> str:
    """The title of a run of that kind, by the name of its folder."""
    return f"{TITLES[kind]}: {run_name}" if kind in TITLES else f"MACPO run {run_name}"
