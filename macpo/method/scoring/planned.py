"""Adds the stages of a recipe's scorers to a plan."""

from __future__ import annotations

from typing import NamedTuple

from macpo.agent_settings import AgentSettings
from macpo.config import Recipe
from macpo.method.run_plan import Builder, StageName, derived_seed
from macpo.method.scoring.reward_model import TrainReward, TrainRewardInputs
from macpo.method.scoring.scorers import ClassifierScorer, GoldScorer, ImplicitScorer, Scorer
from macpo.method.scoring.stages import CheckScorer, CheckScorerInputs, ScoreResponses, ScoreResponsesInputs
from macpo.scorer_settings import RewardTraining, ScorerSettings


def own_model(scorer: ScorerSettings) -> AgentSettings | None:
    """The model that a scorer names to be trained from in the run; None where it is ready, or begins as the student."""
    training = scorer.training
    if training is None or training.model is None:
        return None
    return AgentSettings(name=scorer.name, model=training.model, tuning=training.tuning)


class _Ready(NamedTuple):
    scorer: Scorer
    weights: dict[str, str]
    trained: StageName | None


class ScorerStages:
    """The scorers of a recipe: each is trained if it has to be, compared with people, and scores every evaluation."""

    def __init__(self, steps: Builder, recipe: Recipe) -> None:
        self.steps, self.recipe = steps, recipe

    def score(self, evaluation: StageName, what: str) -> None:
        """Score the responses of an evaluation by every scorer; `what` ends the names of the stages."""
        steps = self.steps
        for settings in self.recipe.evaluation.scorers:
            ready = self._ready(settings)
            work = ScoreResponses(
                scorer=ready.scorer,
                weights=ready.weights,
                base=self._base(settings),
                inputs=ScoreResponsesInputs(evaluation=evaluation, reward=ready.trained),
                compute=steps.compute,
            )
            stage = steps.add(f"score-{settings.name}-{what}", work)
            steps.plan.scores.setdefault(evaluation, {})[settings.name] = stage

    def _ready(self, settings: ScorerSettings) -> _Ready:
        steps = self.steps
        trained = None if settings.training is None else self._trained(settings, settings.training)
        ready = _Ready(*self._described(settings), trained)
        if settings.kind != "gold":
            work = CheckScorer(
                scorer=ready.scorer,
                weights=ready.weights,
                base=self._base(settings),
                inputs=CheckScorerInputs(data=steps.data, reward=trained),
                compute=steps.compute,
            )
            steps.plan.checks[settings.name] = steps.add(f"check-{settings.name}", work)
        return ready

    def _base(self, settings: ScorerSettings) -> str | None:
        return (own_model(settings) or self.recipe.student).name if settings.training is not None else None

    def _trained(self, settings: ScorerSettings, training: RewardTraining) -> StageName:
        steps, name = self.steps, settings.name
        agent = own_model(settings) or self.recipe.student
        work = TrainReward(
            policy=steps.policy(agent),
            optim=training.training,
            tuning=training.tuning,
            file="reward.jsonl",
            seed=derived_seed(self.recipe.seed, name, "reward"),
            inputs=TrainRewardInputs(base=steps.base(agent), pairs=steps.data),
            compute=steps.compute,
        )
        return steps.add(f"reward-{name}", work)

    def _described(self, settings: ScorerSettings) -> tuple[Scorer, dict[str, str]]:
        steps = self.steps
        if settings.kind == "gold":
            return GoldScorer(), {}
        template = steps.plan.identities.template(settings.template)
        if settings.kind == "implicit-reward":
            agent = AgentSettings(name=settings.name, model=settings.base, template=template)
            implicit = ImplicitScorer(
                agent=steps.stage_agent(agent),
                ready=str(settings.policy),
                beta=settings.beta or 0.1,
                dtype=steps.compute.dtype,
            )
            return implicit, steps.fingerprints(settings.base, settings.policy)
        path = settings.reward if isinstance(settings.reward, str) else None
        classifier = ClassifierScorer(
            model=path,
            label=settings.label,
            template=template,
            dtype=steps.compute.dtype if settings.dtype == "auto" else settings.dtype,
            max_tokens=settings.max_tokens or (None if path else self.recipe.context_tokens),
            batch_tokens=settings.batch_tokens,
            trust_remote_code=settings.trust_remote_code,
        )
        return classifier, steps.fingerprints(path)
