"""MACPO's loop with SFT on the selected positives in the place of contrast: the control of what the negatives add."""

from __future__ import annotations

from macpo.agent_settings import AgentSettings
from macpo.engine.config import OptimSettings
from macpo.iteration import macpo
from macpo.method.learning import Imitate, ImitateInputs
from macpo.method.run_plan import StageName
from macpo.method.steps import Steps


class _Imitating(Steps):
    """Learns from the better side of each pair alone, with the steps and learning rate of the preference training."""

    def prefer(
        self, agent: AgentSettings, t: int, start: StageName | None, chosen: StageName, *, pairs_per_prompt: int = 1
    ) -> StageName:
        preference = self.training(agent).preference
        work = Imitate(
            policy=self.policy(agent, ready=agent.positive if start is None else None),
            optim=OptimSettings(**{name: getattr(preference, name) for name in OptimSettings.model_fields}),
            tuning=agent.tuning,
            file="pairs.jsonl",
            side="chosen",
            seed=self.seed(agent, f"iteration {t}"),
            inputs=ImitateInputs(base=self.base(agent), examples=chosen, policy=start),
            compute=self.compute,
        )
        return self.add(f"iter{t}-{agent.name}-train", work)


def positives(steps: Steps) -> None:
    """Algorithm 1, every policy trained on what it would have preferred."""
    macpo(_Imitating(steps.recipe, steps.plan, steps.arm))
