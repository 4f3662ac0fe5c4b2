"""A weak model as annotator (Tao and Li, arXiv 2409.08813): teachers aligned by DPO label the student's responses.

Each teacher is first trained by DPO on its human pairs. Its implicit reward, beta (log pi - log pi_ref) with its SFT
policy as the reference, then says which of two responses of the student is better; several teachers' rewards are
averaged. The student learns from the labels by DPO.
"""

from __future__ import annotations

from macpo.agent_settings import AgentSettings
from macpo.engine.files import write_jsonl
from macpo.engine.run.context import StageContext
from macpo.engine.run.stages import StageInputs
from macpo.method.costs import MethodStage, RunSize
from macpo.method.learning import Prefer, PreferInputs
from macpo.method.positives import read_candidates
from macpo.method.run_plan import StageName
from macpo.method.steps import Steps
from macpo.methods.naive import started
from macpo.methods.ratings import RatedPairInputs, RatedPairs


def annotator(steps: Steps) -> None:
    """`iterations` rounds of two responses a prompt, labelled by the teachers' implicit reward."""
    start, student = started(steps), steps.student
    aligned = {each.name: _aligned(steps, each, start.positive[each.name]) for each in steps.teachers}
    for t in range(1, steps.recipe.iterations + 1):
        last = start.positive[student.name]
        draws = {str(n): steps.own_sample(student, t, start.positive, draw=n) for n in range(2)}
        ratings = {}
        for each in steps.teachers:
            inputs = RewardInputs(
                policy=steps.score(each, t, aligned[each.name], draws, name=f"iter{t}-{each.name}-aligned-score"),
                reference=steps.score(each, t, start.positive[each.name], draws, name=f"iter{t}-{each.name}-score"),
            )
            beta = steps.training(each).preference.beta
            ratings[each.name] = steps.add(f"iter{t}-{each.name}-reward", ImplicitReward(beta=beta, inputs=inputs))
        pair_inputs = RatedPairInputs(data=steps.data, answers=draws, ratings=ratings)
        pairs = steps.add(f"iter{t}-{student.name}-pairs", RatedPairs(inputs=pair_inputs))
        start.positive[student.name] = steps.prefer(student, t, last, pairs)
        steps.evaluate(student, t, start.positive[student.name], "student")


def _aligned(steps: Steps, teacher: AgentSettings, start: StageName | None) -> StageName:
    """The teacher after DPO on its human pairs."""
    optim = steps.training(teacher).preference
    work = Prefer(
        policy=steps.policy(teacher, ready=teacher.positive if start is None else None),
        optim=optim,
        tuning=teacher.tuning,
        reference_weights=steps.fingerprints(optim.reference_model),
        seed=steps.seed(teacher, "aligned"),
        file=f"teacher-{teacher.name}.jsonl",
        inputs=PreferInputs(base=steps.base(teacher), pairs=steps.data, policy=start),
        compute=steps.compute,
    )
    return steps.add(f"init-{teacher.name}-aligned", work)


class RewardInputs(StageInputs):
    policy: str
    """Scored the responses under the aligned policy."""
    reference: str
    """Scored them under its reference."""


class ImplicitReward(MethodStage):
    """The implicit reward of each draw's response, `ratings.jsonl`."""

    name = "implicit_reward"
    doing = "computes implicit rewards"
    beta: float
    inputs: RewardInputs

    def run(self, ctx: StageContext) -> None:
        policy, reference = (read_candidates(ctx.input(stage)) for stage in (self.inputs.policy, self.inputs.reference))
        rows = []
        for prompt_id in sorted(policy.keys() & reference.keys()):
            logps = zip(policy[prompt_id], reference[prompt_id], strict=True)
            ratings = [self.beta * (ours.sum_logp - theirs.sum_logp) for ours, theirs in logps]
            rows.append({"prompt_id": prompt_id, "ratings": ratings})
        write_jsonl(ctx.dir / "ratings.jsonl", rows)
        ctx.note(rated=len(rows))

    def disk_bytes(self, run: RunSize) -> float:
        return 80 * run.student_prompts
