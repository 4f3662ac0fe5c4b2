"""SFT, preference or reward training of one model: a short graph of the method's own stages, and a held-out evaluation.

data -> [base] -> evaluate before -> [reference] -> train -> evaluate after

Where the recipe says how they are drawn, each evaluation also has the policy's responses to the held-out prompts.
"""

from __future__ import annotations

from macpo.agent_settings import AgentSettings
from macpo.method.data_sets import read_examples, read_pairs
from macpo.method.identities import Identities
from macpo.method.learning import Imitate, ImitateInputs, Prefer, PreferInputs
from macpo.method.policies import PolicyDataInputs
from macpo.method.run_plan import Builder, Plan, Point, StageName, pretrains
from macpo.method.scoring.reward_model import TrainReward, TrainRewardInputs
from macpo.standalone.config import NAME, PolicyRecipe, PreferenceRecipe, RewardRecipe, SftRecipe, Standalone
from macpo.standalone.evaluation import (
    Evaluate,
    EvaluateExamples,
    EvaluateInputs,
    EvaluatePairs,
    EvaluateReward,
    ScoreReference,
    ScoreReferenceInputs,
    WriteResponses,
)
from macpo.standalone.records import SplitRecords


def build_plan(recipe: Standalone, identities: Identities | None = None) -> Plan:
    """The stages of a standalone recipe; `identities`: of the files that it names, looked at here by default."""
    plan = Plan(identities=identities or Identities())
    steps = Builder(recipe, plan)
    (agent,) = recipe.agents
    paths = {recipe.data.path, recipe.data.test_path}
    files = {path: plan.identities.of_data(path) for path in sorted(filter(None, paths))}
    data = plan.identities.sized(recipe.data, read_examples if recipe.recipe == "sft" else read_pairs)
    split = SplitRecords(
        data=data, kind=recipe.recipe, files=files, seed=recipe.seed, pretrains=pretrains(recipe.agents)
    )
    steps.data = steps.add("data", split)
    if isinstance(recipe, PreferenceRecipe):
        _preference(recipe, steps, agent)
    elif isinstance(recipe, RewardRecipe):
        _reward(recipe, steps, agent)
    else:
        _sft(recipe, steps, agent)
    return plan


def _preference(recipe: PreferenceRecipe, steps: Builder, agent: AgentSettings) -> None:
    optim, base, compute = recipe.training, steps.base(agent), recipe.compute
    policy, weights = steps.policy(agent, ready=agent.positive), steps.fingerprints(optim.reference_model)
    reference = None
    if optim.has_reference:
        scoring = ScoreReference(
            policy=policy,
            tuning=agent.tuning,
            reference=optim.reference,
            reference_model=optim.reference_model,
            reference_weights=weights,
            inputs=ScoreReferenceInputs(base=base, pairs=steps.data),
            compute=compute,
        )
        reference = steps.add("reference", scoring)

    def evaluate(iteration: int, trained: StageName | None) -> None:
        work = EvaluatePairs(
            policy=steps.policy(agent, ready=agent.positive if trained is None else None),
            loss=optim,
            role="policy",
            iteration=iteration,
            inputs=EvaluateInputs(base=base, data=steps.data, reference=reference, policy=trained),
            compute=compute,
        )
        _add_evaluation(steps, work, trained)
        _respond(recipe, steps, work)

    evaluate(0, None)
    training = Prefer(
        policy=policy,
        optim=optim,
        tuning=agent.tuning,
        reference_weights=weights,
        file="train.jsonl",
        seed=steps.seed(agent, recipe.recipe),
        inputs=PreferInputs(base=base, pairs=steps.data, reference=reference),
        compute=compute,
    )
    evaluate(1, steps.add(f"train-{NAME}", training))


def _sft(recipe: SftRecipe, steps: Builder, agent: AgentSettings) -> None:
    base, compute = steps.base(agent), recipe.compute

    def evaluate(iteration: int, trained: StageName | None) -> None:
        work = EvaluateExamples(
            policy=steps.policy(agent, ready=agent.positive if trained is None else None),
            role="policy",
            iteration=iteration,
            inputs=EvaluateInputs(base=base, data=steps.data, policy=trained),
            compute=compute,
        )
        _add_evaluation(steps, work, trained)
        _respond(recipe, steps, work)

    evaluate(0, None)
    training = Imitate(
        policy=steps.policy(agent, ready=agent.positive),
        optim=recipe.training,
        tuning=agent.tuning,
        file="train.jsonl",
        side="answer",
        seed=steps.seed(agent, recipe.recipe),
        inputs=ImitateInputs(base=base, examples=steps.data),
        compute=compute,
    )
    evaluate(1, steps.add(f"train-{NAME}", training))


def _reward(recipe: RewardRecipe, steps: Builder, agent: AgentSettings) -> None:
    """A score head is zero before it is trained: there is nothing to evaluate then."""
    base, compute = steps.base(agent), recipe.compute
    training = TrainReward(
        policy=steps.policy(agent, ready=agent.positive),
        optim=recipe.training,
        tuning=agent.tuning,
        margins=recipe.data.margin is not None,
        seed=steps.seed(agent, recipe.recipe),
        inputs=TrainRewardInputs(base=base, pairs=steps.data),
        compute=compute,
    )
    trained = steps.add(f"train-{NAME}", training)
    work = EvaluateReward(
        policy=steps.policy(agent),
        role="policy",
        iteration=1,
        inputs=EvaluateInputs(base=base, data=steps.data, policy=trained),
        compute=compute,
    )
    _add_evaluation(steps, work, trained)


def _respond(recipe: PolicyRecipe, steps: Builder, evaluation: Evaluate) -> None:
    """The evaluated policy's responses to the held-out prompts, where the recipe says how they are drawn."""
    if recipe.sampling is None:
        return
    work = WriteResponses(
        policy=evaluation.policy,
        sampling=recipe.sampling,
        policy_name="test",
        seed=recipe.seed,
        server=None,
        role=evaluation.role,
        iteration=evaluation.iteration,
        gold=recipe.data.world is not None,
        inputs=PolicyDataInputs(
            base=evaluation.inputs.base, data=evaluation.inputs.data, policy=evaluation.inputs.policy
        ),
        compute=evaluation.compute,
    )
    steps.add(f"responses-{NAME}-iter{work.iteration}", work)


def _add_evaluation(steps: Builder, work: Evaluate, trained: StageName | None) -> None:
    stage = steps.add(f"eval-{NAME}-iter{work.iteration}", work)
    steps.plan.points.append(Point("", NAME, "policy", work.iteration, trained, stage))
