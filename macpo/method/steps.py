"""The stages of a run: each method adds one to the plan and returns its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from macpo.agent_settings import AgentSettings
from macpo.config import Recipe, TrainingSettings
from macpo.evaluation.summary import Role
from macpo.method.data_sets import read_pairs
from macpo.method.heldout import BaseLogps, EvaluateInputs, EvaluatePolicy, HeldOut
from macpo.method.learning import Imitate, ImitateInputs, Prefer, PreferInputs
from macpo.method.negatives import WeakNegativeInputs, WeakNegativeLabels
from macpo.method.pairs import StudentPairInputs, StudentPairs, TeacherPairInputs, TeacherPairs
from macpo.method.policies import PolicyDataInputs
from macpo.method.positives import Half, ScoreCandidates, ScoreInputs, WeakLabelInputs, WeakLabels
from macpo.method.prompt_sets import HumanResponses, PromptSets, SplitPrompts
from macpo.method.responses import Respond, ServedModel
from macpo.method.run_plan import Builder, Plan, Point, Policies, StageName, pretrains
from macpo.method.scoring.planned import ScorerStages

Side = Literal["chosen", "rejected", "answer"]
PolicyName = Literal["positive", "negative"]


class Steps(Builder):
    """Adds one arm's stages of the method to a plan."""

    def __init__(self, recipe: Recipe, plan: Plan, arm: str) -> None:
        super().__init__(recipe, plan, arm)
        self.recipe = recipe
        self.student = recipe.student
        self.teachers = recipe.active_teachers
        self.data = self.add("data", self._prompt_sets(SplitPrompts))
        self.scorers = ScorerStages(self, recipe)

    # --- data -----------------------------------------------------------------------------------------------

    def _prompt_sets(self, kind: type[PromptSets]) -> PromptSets:
        recipe = self.recipe
        files = {recipe.data.path, recipe.data.test_path} | {teacher.data for teacher in recipe.teachers}
        return kind(
            data=self.plan.identities.sized(recipe.data, read_pairs),
            teachers={teacher.name: teacher.data for teacher in recipe.teachers},
            most={teacher.name: teacher.data_prompts for teacher in recipe.teachers if teacher.data_prompts} or None,
            files={path: self.plan.identities.of_data(path) for path in sorted(filter(None, files))},
            seed=recipe.seed,
            pretrains=pretrains(recipe.agents),
        )

    # --- policies -------------------------------------------------------------------------------------------

    def imitate(
        self,
        agent: AgentSettings,
        policy: PolicyName,
        start: StageName | None,
        examples: tuple[StageName, str],
        side: Side,
        name: str | None = None,
        half: Half | None = None,
    ) -> StageName | None:
        """SFT of an initial policy, unless the recipe brings it ready; with a `name`, of one that is trained anyway."""
        if name is None and (getattr(agent, policy) is not None or agent.served is not None):
            return None
        folder, file = examples
        work = Imitate(
            policy=self.policy(agent, ready=agent.positive if policy == "negative" else None),
            optim=getattr(self.training(agent), policy),
            tuning=agent.tuning,
            file=file,
            side=side,
            half=half,
            seed=self.seed(agent, policy),
            inputs=ImitateInputs(base=self.base(agent), examples=folder, policy=start),
            compute=self.compute,
        )
        return self.add(name or f"init-{agent.name}-{policy}", work)

    def prefer(
        self, agent: AgentSettings, t: int, start: StageName | None, chosen: StageName, *, pairs_per_prompt: int = 1
    ) -> StageName:
        """Preference training from the previous policy, by default its own frozen reference."""
        optim = self.training(agent).preference
        work = Prefer(
            policy=self.policy(agent, ready=agent.positive if start is None else None),
            optim=optim,
            tuning=agent.tuning,
            reference_weights=self.fingerprints(optim.reference_model),
            seed=self.seed(agent, f"iteration {t}"),
            pairs_per_prompt=pairs_per_prompt,
            inputs=PreferInputs(base=self.base(agent), pairs=chosen, policy=start),
            compute=self.compute,
        )
        return self.add(f"iter{t}-{agent.name}-train", work)

    # --- generation -----------------------------------------------------------------------------------------

    def response(
        self,
        agent: AgentSettings,
        policy: PolicyName,
        t: int,
        start: StageName | None,
        draw: int = 0,
        begin: str = "",
    ) -> StageName:
        """The agent's policy answers the student half.

        Args:
            draw: > 0 asks for fresh noise.
            begin: text put before each response, which is no part of it.
        """
        ready = getattr(agent, policy) if start is None and agent.served is None else None
        work = Respond(
            policy=self.policy(agent, ready),
            sampling=self.recipe.sampling,
            policy_name=policy if draw == 0 else f"{policy}/{draw}",
            seed=self.recipe.seed,
            served=self.served(agent, policy),
            begin=begin,
            inputs=PolicyDataInputs(base=self.base(agent), data=self.data, policy=start),
            compute=self.compute,
            server=agent.served,
        )
        stage = f"init-{agent.name}" if t == 0 else f"iter{t}-{agent.name}"
        again = ("", "-again")[draw] if draw < 2 else f"-again-{draw}"
        return self.add(f"{stage}-bad-answer" if policy == "negative" else f"{stage}-answer{again}", work)

    def served(self, agent: AgentSettings, policy: PolicyName) -> ServedModel | None:
        """Which weights a served agent's server answers with, not where they are."""
        server = agent.served
        if server is None:
            return None
        return ServedModel(model=getattr(server, policy), server=server.server, api=server.api)

    def own_sample(self, agent: AgentSettings, t: int, positive: Policies, draw: int = 0) -> StageName:
        """The agent's own positive responses of iteration t-1."""
        return self.response(agent, "positive", t - 1, positive[agent.name], draw=draw)

    # --- selection and pairs --------------------------------------------------------------------------------

    def weak_labels(self, given: dict[str, StageName]) -> StageName:
        rule = self.recipe.initial.weak_label
        if rule == "min-perplexity":
            inputs = WeakLabelInputs(data=self.data, scores=self.score(self.student, 0, None, given))
        else:
            inputs = WeakLabelInputs(data=self.data, answers={rule: given[rule]} if rule in given else given)
        return self.add("init-weak-labels", WeakLabels(weak_label=rule, seed=self.recipe.seed, inputs=inputs))

    def weak_negative_labels(self, bad_responses: dict[str, StageName]) -> StageName:
        inputs = WeakNegativeInputs(data=self.data, answers=bad_responses)
        return self.add("init-weak-negatives", WeakNegativeLabels(seed=self.recipe.seed, inputs=inputs))

    def score(
        self,
        agent: AgentSettings,
        t: int,
        start: StageName | None,
        responses: Mapping[str, StageName],
        name: str | None = None,
        half: Half | None = None,
    ) -> StageName:
        """Perplexity of every candidate under the agent's policy (t = 0: under its base model)."""
        own = None
        drawn = responses.get(agent.name)
        if drawn is not None and t > 0 and self.plan.graph.stage(drawn).inputs.get("policy") == start:
            own = agent.name  # the responses were drawn by the very weights that score them
        work = ScoreCandidates(
            policy=self.policy(agent, ready=agent.positive if start is None and t > 0 else None),
            own=own,
            half=half,
            inputs=ScoreInputs(base=self.base(agent), data=self.data, policy=start, answers=dict(responses)),
            compute=self.compute,
        )
        return self.add(name or (f"iter{t}-{agent.name}-score" if t else f"init-{agent.name}-score"), work)

    def cross_score(self, examples: tuple[StageName, str], responses: Mapping[str, StageName]) -> list[StageName]:
        """The candidates of each half of the prompts, by a student that learnt from the labels of the other half."""
        student, scores = self.student, []
        halves: tuple[tuple[Half, Half], ...] = ((0, 1), (1, 0))
        for half, other in halves:
            policy = self.imitate(
                student, "positive", None, examples, "answer", f"init-{student.name}-half{other}", other
            )
            name = f"iter1-{student.name}-score-half{half}"
            scores.append(self.score(student, 1, policy, responses, name, half))
        return scores

    def negatives_for(
        self,
        agent: AgentSettings,
        t: int,
        positive: Policies,
        negative: Policies,
        bad_responses: dict[str, StageName],
    ) -> dict[str, StageName]:
        """Where the agent's negative responses come from (`negatives.source`, `negatives.refresh`)."""
        recipe, student = self.recipe, self.student
        source = recipe.negatives.source
        if source == "previous-positive":  # fresh noise where the same samples are the positives
            return {agent.name: self.own_sample(agent, t, positive, draw=int(recipe.positives.source == "own"))}
        others = list(self.teachers) if agent is student else [student]
        donors = [agent] if source == "own" else others
        if not recipe.negatives.refresh:
            return {donor.name: bad_responses[donor.name] for donor in donors}
        return {d.name: self.response(d, "negative", t, negative[d.name], draw=t) for d in donors}

    def student_pairs(self, t: int, scores: Sequence[StageName], bad: dict[str, StageName]) -> StageName:
        """`scores`: of all prompts, or of each half."""
        first, other = scores if len(scores) == 2 else (scores[0], None)
        inputs = StudentPairInputs(data=self.data, scores=first, other_half=other, negatives=bad)
        work = StudentPairs(selection=self.recipe.positives.selection, seed=self.recipe.seed, inputs=inputs)
        return self.add(f"iter{t}-{self.student.name}-select", work)

    def teacher_pairs(self, teacher: AgentSettings, t: int, good: StageName, bad: dict[str, StageName]) -> StageName:
        inputs = TeacherPairInputs(data=self.data, positives={teacher.name: good}, negatives=bad)
        return self.add(f"iter{t}-{teacher.name}-pairs", TeacherPairs(seed=self.recipe.seed, inputs=inputs))

    # --- evaluation -----------------------------------------------------------------------------------------

    def evaluate_all(self, t: int, positive: Policies) -> None:
        for agent in (*self.teachers, self.student):
            self.evaluate(agent, t, positive[agent.name], self.role(agent))
        if t == 0 and self.recipe.data.num_dev_prompts and not self.arm:
            for teacher in self.teachers:  # which of them is the best one is not to be decided on the test prompts
                stage = self._evaluation(teacher, 0, positive[teacher.name], "teacher", "dev")
                self.plan.development[teacher.name] = stage
                self.scorers.score(stage, f"dev-{teacher.name}-iter0")

    def evaluate(self, agent: AgentSettings, t: int, policy: StageName | None, role: Role) -> None:
        """The agent's policy on the test prompts."""
        stage = self._evaluation(agent, t, policy, role, "test")
        label = "ceiling" if role == "ceiling" else agent.name
        self.plan.points.append(Point(self.arm, label, role, t, policy, stage))
        self.scorers.score(stage, f"{label}-iter{t if agent.served is None else 0}")

    def _evaluation(
        self, agent: AgentSettings, t: int, policy: StageName | None, role: Role, held_out: HeldOut
    ) -> StageName:
        recipe, base, base_logps = self.recipe, self.base(agent), None
        prefix = "eval" if held_out == "test" else "dev"
        if agent.has_weights:
            without_base = agent.model is None and agent.init is None
            work = BaseLogps(
                policy=self.policy(agent, ready=agent.positive if without_base else None),
                held_out=held_out,
                inputs=PolicyDataInputs(base=base, data=self.data),
                compute=self.compute,
            )
            base_logps = self.add(f"{prefix}-{agent.name}-base", work)
        label = "ceiling" if role == "ceiling" else agent.name
        asked = t if agent.served is None else 0  # a server is asked once for what does not change
        return self.add(
            f"{prefix}-{label}-iter{asked}",
            EvaluatePolicy(
                policy=self.policy(agent, ready=agent.positive if policy is None else None),
                sampling=recipe.evaluation.sampling or recipe.sampling,
                policy_name=held_out,
                seed=recipe.seed,
                served=self.served(agent, "positive"),
                role=role,
                iteration=asked,
                beta=self.training(agent).preference.beta,
                gold=recipe.data.world is not None,
                held_out=held_out,
                inputs=EvaluateInputs(
                    base=base, data=self.data, base_logps=base_logps, policy=policy if agent.has_weights else None
                ),
                compute=self.compute,
                server=agent.served,
            ),
        )

    def ceiling(self) -> None:
        """The student trained on human responses: the one that may read the student half's."""
        student = self.student
        work = Imitate(
            policy=self.policy(student),
            optim=self.training(student).positive,
            tuning=student.tuning,
            file="student.jsonl",
            side="chosen",
            seed=self.seed(student, "positive"),
            inputs=ImitateInputs(
                base=self.base(student), examples=self.add("human-answers", self._prompt_sets(HumanResponses))
            ),
            compute=self.compute,
        )
        self.evaluate(student, 0, self.add("ceiling", work), "ceiling")

    # --- shared ---------------------------------------------------------------------------------------------

    def role(self, agent: AgentSettings) -> Role:
        return "student" if agent is self.student else "teacher"

    def training(self, agent: AgentSettings) -> TrainingSettings:
        return self.recipe.student_training if agent is self.student else self.recipe.teacher_training
