"""SFT or preference training of one policy: a short graph of the method's own stages, and a held-out evaluation.

data -> [base] -> evaluate before -> [reference] -> train -> evaluate after
"""

from __future__ import annotations

from typing import Any

from macpo.data.rows import fingerprint
from macpo.method.learning import imitate, prefer
from macpo.method.run_plan import Builder, Plan, Point, StageName
from macpo.standalone.config import NAME, PreferenceRecipe, Standalone
from macpo.standalone.evaluation import evaluate_examples, evaluate_pairs, score_reference
from macpo.standalone.records import split_records


def build_plan(recipe: Standalone) -> Plan:
    """The stages of a standalone recipe."""
    plan = Plan()
    steps = Builder(recipe, plan)
    (agent,) = recipe.agents
    paths = {recipe.data.path, recipe.data.test_path}
    data_settings = {
        "data": recipe.data.model_dump(mode="json", exclude={"long_prompt", "special_text"}),
        "kind": recipe.recipe,
        "files": {path: fingerprint(path) for path in sorted(filter(None, paths))},
        "seed": recipe.seed,
    }
    data = steps.data = steps.add("data", split_records, data_settings, {})
    common = steps.policy_settings(agent, ready=agent.positive)
    base = steps.base(agent)
    training: dict[str, Any] = {"seed": steps.seed(agent, recipe.recipe)}
    inputs: dict[str, StageName] = {}

    if isinstance(recipe, PreferenceRecipe):
        training |= {"optim": recipe.training.model_dump(mode="json"), "file": "train.jsonl"}
        training |= steps.reference_settings(agent, recipe.training)
        if recipe.training.has_reference:
            chosen = {name: training["optim"][name] for name in ("reference", "reference_model")}
            settings = common | steps.reference_settings(agent, recipe.training) | chosen
            run = steps.compute(score_reference)
            inputs["reference"] = steps.add("reference", run, settings, base | {"pairs": data})
        run, alias, judge = steps.compute(prefer), "pairs", steps.compute(evaluate_pairs)
        judging: dict[str, Any] = {"loss": recipe.training.model_dump(mode="json", include=LOSS_FIELDS)}
    else:
        training |= {"optim": recipe.training.model_dump(mode="json"), "file": "train.jsonl", "side": "answer"}
        training |= {"tuning": agent.tuning.model_dump(mode="json")}
        run, alias, judge = steps.compute(imitate), "examples", steps.compute(evaluate_examples)
        judging = {}

    def evaluate(iteration: int, policy: StageName | None) -> None:
        ready = agent.positive if policy is None else None
        settings = steps.policy_settings(agent, ready) | judging | {"role": "policy", "iteration": iteration}
        sources = base | inputs | {"data": data} | ({"policy": policy} if policy else {})
        stage = steps.add(f"eval-{NAME}-iter{iteration}", judge, settings, sources)
        plan.points.append(Point("", NAME, "policy", iteration, policy, stage))

    evaluate(0, None)
    evaluate(1, steps.add(f"train-{NAME}", run, common | training, base | inputs | {alias: data}))
    return plan


LOSS_FIELDS = {"loss", "beta", "label_smoothing", "gamma", "ld_alpha", "sft_weight"}


# --- data ---------------------------------------------------------------------------------------------------------


# --- reference and evaluation -------------------------------------------------------------------------------------
