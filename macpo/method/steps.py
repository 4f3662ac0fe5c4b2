"""The stages of a run: each method adds one to the plan and returns its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from macpo.config import AgentSettings, Recipe
from macpo.data.rows import fingerprint
from macpo.engine.config import PreferenceSettings
from macpo.evaluation.summary import Role
from macpo.method import answers, heldout, learning, negatives, pairs, positives, prompt_sets
from macpo.method.run_plan import Builder, Plan, Point, Policies, StageName


class Steps(Builder):
    """Adds one arm's stages of the method to a plan."""

    def __init__(self, recipe: Recipe, plan: Plan, arm: str) -> None:
        super().__init__(recipe, plan, arm)
        self.recipe = recipe
        self.student = recipe.student
        self.teachers = recipe.active_teachers
        self.data = self._data()

    # --- data -----------------------------------------------------------------------------------------------

    def _data(self) -> StageName:
        return self.add("data", prompt_sets.split_prompts, self._data_settings(), {})

    def _data_settings(self) -> dict[str, Any]:
        recipe = self.recipe
        files = {recipe.data.path} | {teacher.data for teacher in recipe.teachers}
        return {
            "data": recipe.data.model_dump(mode="json", exclude={"long_prompt", "special_text"}),
            "teachers": {teacher.name: teacher.data for teacher in recipe.teachers},
            "files": {path: fingerprint(path) for path in sorted(filter(None, files))},
            "seed": recipe.seed,
        }

    # --- policies -------------------------------------------------------------------------------------------

    def imitate(
        self,
        agent: AgentSettings,
        policy: str,
        start: StageName | None,
        examples: tuple[StageName, str],
        side: str,
    ) -> StageName | None:
        """SFT of an initial policy, unless the recipe brings it ready."""
        if getattr(agent, policy) is not None or agent.served is not None:
            return None
        optim = getattr(self.training(agent), policy)
        folder, file = examples
        settings = self.policy_settings(agent, ready=agent.positive if policy == "negative" else None) | {
            "optim": optim.model_dump(mode="json"),
            "tuning": agent.tuning.model_dump(mode="json"),
            "file": file,
            "side": side,
            "seed": self.seed(agent, policy),
        }
        inputs = self.base(agent) | {"examples": folder} | ({"policy": start} if start else {})
        return self.add(f"init-{agent.name}-{policy}", self.compute(learning.imitate), settings, inputs)

    def prefer(self, agent: AgentSettings, t: int, start: StageName | None, chosen: StageName) -> StageName:
        """Preference training from the previous policy, by default its own frozen reference."""
        optim: PreferenceSettings = self.training(agent).preference
        settings = self.policy_settings(agent, ready=agent.positive if start is None else None)
        settings |= self.reference_settings(agent, optim) | {
            "optim": optim.model_dump(mode="json"),
            "seed": self.seed(agent, f"iteration {t}"),
        }
        inputs = self.base(agent) | {"pairs": chosen} | ({"policy": start} if start else {})
        return self.add(f"iter{t}-{agent.name}-train", self.compute(learning.prefer), settings, inputs)

    # --- generation -----------------------------------------------------------------------------------------

    def answer(self, agent: AgentSettings, policy: str, t: int, start: StageName | None, draw: int = 0) -> StageName:
        """The agent's policy answers the student half; `draw` > 0 asks for fresh noise."""
        run, served = self.generating(answers.answer, agent, policy)
        ready = getattr(agent, policy) if start is None and agent.served is None else None
        settings = (
            self.policy_settings(agent, ready)
            | served
            | {
                "sampling": self.recipe.sampling.model_dump(mode="json"),
                "policy_name": policy if draw == 0 else f"{policy}/{draw}",
                "seed": self.recipe.seed,
            }
        )
        inputs = self.base(agent) | {"data": self.data} | ({"policy": start} if start else {})
        stage = f"init-{agent.name}" if t == 0 else f"iter{t}-{agent.name}"
        name = f"{stage}-bad-answer" if policy == "negative" else f"{stage}-answer{'-again' if draw else ''}"
        return self.add(name, run, settings, inputs)

    def generating(
        self, function: Callable[..., None], agent: AgentSettings, policy: str
    ) -> tuple[Callable[..., None], dict[str, Any]]:
        """What runs a stage that generates, and its settings: of a served agent which weights, not where they are."""
        if agent.served is None:
            return self.compute(function), {}
        about = {"model": getattr(agent.served, policy), "server": agent.served.server, "api": agent.served.api}
        return self.compute(function, served=agent.served), {"served": about}

    def own_sample(self, agent: AgentSettings, t: int, positive: Policies, draw: int = 0) -> StageName:
        """The agent's own positive answers of iteration t-1."""
        return self.answer(agent, "positive", t - 1, positive[agent.name], draw=draw)

    # --- selection and pairs --------------------------------------------------------------------------------

    def weak_labels(self, given: dict[str, StageName]) -> StageName:
        rule = self.recipe.initial.weak_label
        settings = {"weak_label": rule, "seed": self.recipe.seed}
        inputs = {"data": self.data}
        if rule == "min-perplexity":
            inputs["scores"] = self.score(self.student, 0, None, given)
        else:
            names = [rule] if rule in given else list(given)
            inputs |= {f"answers:{name}": given[name] for name in names}
        return self.add("init-weak-labels", positives.weak_labels, settings, inputs)

    def weak_negative_labels(self, bad_answers: dict[str, StageName]) -> StageName:
        inputs = {"data": self.data} | {f"answers:{name}": stage for name, stage in bad_answers.items()}
        return self.add("init-weak-negatives", negatives.weak_negative_labels, {"seed": self.recipe.seed}, inputs)

    def score(
        self, agent: AgentSettings, t: int, start: StageName | None, answers: Mapping[str, StageName]
    ) -> StageName:
        """Perplexity of every candidate under the agent's policy (t = 0: under its base model)."""
        ready = agent.positive if start is None and t > 0 else None
        inputs = self.base(agent) | {"data": self.data} | ({"policy": start} if start else {})
        inputs |= {f"answers:{name}": stage for name, stage in answers.items()}
        settings = self.policy_settings(agent, ready)
        if agent.name in answers and t > 0 and self.plan.graph.stage(answers[agent.name]).inputs.get("policy") == start:
            settings["own"] = agent.name  # the answers were drawn by the very weights that score them
        name = f"iter{t}-{agent.name}-score" if t else f"init-{agent.name}-score"
        return self.add(name, self.compute(positives.score_candidates), settings, inputs)

    def negatives_for(
        self,
        agent: AgentSettings,
        t: int,
        positive: Policies,
        negative: Policies,
        bad_answers: dict[str, StageName],
    ) -> dict[str, StageName]:
        """Where the agent's negative answers come from (`negatives.source`, `negatives.refresh`)."""
        recipe, student = self.recipe, self.student
        source = recipe.negatives.source
        if source == "previous-positive":  # fresh noise where the same samples are the positives
            return {agent.name: self.own_sample(agent, t, positive, draw=int(recipe.positives.source == "own"))}
        others = list(self.teachers) if agent is student else [student]
        donors = [agent] if source == "own" else others
        if not recipe.negatives.refresh:
            return {donor.name: bad_answers[donor.name] for donor in donors}
        return {d.name: self.answer(d, "negative", t, negative[d.name], draw=t) for d in donors}

    def student_pairs(self, t: int, scores: StageName, bad: dict[str, StageName]) -> StageName:
        settings = {"selection": self.recipe.positives.selection, "seed": self.recipe.seed}
        inputs = {"data": self.data, "scores": scores} | {f"negatives:{name}": stage for name, stage in bad.items()}
        return self.add(f"iter{t}-{self.student.name}-select", pairs.student_pairs, settings, inputs)

    def teacher_pairs(self, teacher: AgentSettings, t: int, good: StageName, bad: dict[str, StageName]) -> StageName:
        inputs = {"data": self.data, f"positives:{teacher.name}": good}
        inputs |= {f"negatives:{name}": stage for name, stage in bad.items()}
        return self.add(f"iter{t}-{teacher.name}-pairs", pairs.teacher_pairs, {"seed": self.recipe.seed}, inputs)

    # --- evaluation -----------------------------------------------------------------------------------------

    def evaluate_all(self, t: int, positive: Policies) -> None:
        for agent in (*self.teachers, self.student):
            self.evaluate(agent, t, positive[agent.name], self.role(agent))

    def evaluate(self, agent: AgentSettings, t: int, policy: StageName | None, role: Role) -> None:
        recipe = self.recipe
        inputs = common = self.base(agent) | {"data": self.data}
        reference_ready = agent.positive if agent.model is None and agent.init is None else None
        if agent.has_weights:
            base_logps = self.add(
                f"eval-{agent.name}-base",
                self.compute(heldout.judge_base),
                self.policy_settings(agent, ready=reference_ready),
                common,
            )
            inputs = common | {"base_logps": base_logps} | ({"policy": policy} if policy else {})
        label = "ceiling" if role == "ceiling" else agent.name
        run, served = self.generating(heldout.evaluate_policy, agent, "positive")
        asked = 0 if served else t  # a server is asked once for what does not change
        settings = (
            self.policy_settings(agent, ready=agent.positive if policy is None else None)
            | served
            | {
                "sampling": (recipe.evaluation.sampling or recipe.sampling).model_dump(mode="json"),
                "policy_name": "test",
                "role": role,
                "iteration": asked,
                "beta": self.training(agent).preference.beta,
                "gold": recipe.data.world is not None,
                "seed": recipe.seed,
            }
        )
        stage = self.add(f"eval-{label}-iter{asked}", run, settings, inputs)
        self.plan.points.append(Point(self.arm, label, role, t, policy, stage))

    def ceiling(self) -> None:
        """The student trained on human answers: the one that may read the student half's."""
        human = self.add("human-answers", prompt_sets.human_answers, self._data_settings(), {})
        student = self.student
        settings = self.policy_settings(student) | {
            "optim": self.training(student).positive.model_dump(mode="json"),
            "tuning": student.tuning.model_dump(mode="json"),
            "file": "student.jsonl",
            "side": "chosen",
            "seed": self.seed(student, "positive"),
        }
        inputs = self.base(student) | {"examples": human}
        policy = self.add("ceiling", self.compute(learning.imitate), settings, inputs)
        self.evaluate(student, 0, policy, "ceiling")

    # --- shared ---------------------------------------------------------------------------------------------

    def role(self, agent: AgentSettings) -> Role:
        return "student" if agent is self.student else "teacher"

    def training(self, agent: AgentSettings) -> Any:
        return self.recipe.student_training if agent is self.student else self.recipe.teacher_training
