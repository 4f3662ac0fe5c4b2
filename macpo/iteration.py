"""The MACPO loop, Algorithm 1 of arXiv 2410.07672: `macpo` below adds it to a plan as stages, nothing runs yet."""

from __future__ import annotations

from macpo.method.run_plan import Policies, StageName
from macpo.method.steps import Steps


def macpo(steps: Steps) -> None:
    """Initialise every agent; then, T times, the student learns from the teachers and they from the student."""
    recipe, student, teachers = steps.recipe, steps.student, steps.teachers
    positive: Policies = {}
    negative: Policies = {}
    responses: dict[str, StageName] = {}
    bad_responses: dict[str, StageName] = {}

    for teacher in teachers:  # weak teachers learn from few human labels
        human = (steps.data, f"teacher-{teacher.name}.jsonl")
        positive[teacher.name] = steps.imitate(teacher, "positive", None, human, "chosen")
        negative[teacher.name] = steps.imitate(teacher, "negative", positive[teacher.name], human, "rejected")
        responses[teacher.name] = steps.response(teacher, "positive", 0, positive[teacher.name])
        bad_responses[teacher.name] = steps.response(teacher, "negative", 0, negative[teacher.name])

    weak, weak_negative = steps.weak_labels(responses), steps.weak_negative_labels(bad_responses)
    examples = (weak, "examples.jsonl"), (weak_negative, "examples.jsonl")
    positive[student.name] = steps.imitate(student, "positive", None, examples[0], "answer")
    negative[student.name] = steps.imitate(student, "negative", positive[student.name], examples[1], "answer")
    bad_responses[student.name] = steps.response(student, "negative", 0, negative[student.name])
    steps.evaluate_all(0, positive)

    own_samples = recipe.positives.source == "own"  # an ablation: nobody learns from another agent's responses
    for t in range(1, recipe.iterations + 1):
        if student.train:  # the student learns from the teachers' best responses against its own bad habits
            candidates = {student.name: steps.own_sample(student, t, positive)} if own_samples else responses
            if t == 1 and recipe.positives.cross_fit:  # a variant: no label is scored by a student that learnt it
                scores = steps.cross_score(examples[0], candidates)
            else:
                scores = [steps.score(student, t, positive[student.name], candidates)]
            bad = steps.negatives_for(student, t, positive, negative, bad_responses)
            positive[student.name] = steps.prefer(
                student, t, positive[student.name], steps.student_pairs(t, scores, bad)
            )
        if recipe.mutual_learning:  # then every teacher learns from the student's responses
            student_responses = steps.response(student, "positive", t, positive[student.name])
            learners = [teacher for teacher in teachers if teacher.train]
            for teacher in learners:
                good = steps.own_sample(teacher, t, positive) if own_samples else student_responses
                bad = steps.negatives_for(teacher, t, positive, negative, bad_responses)
                positive[teacher.name] = steps.prefer(
                    teacher, t, positive[teacher.name], steps.teacher_pairs(teacher, t, good, bad)
                )
            if t < recipe.iterations and not own_samples:
                responses |= {k.name: steps.response(k, "positive", t, positive[k.name]) for k in learners}
        steps.evaluate_all(t, positive)

    for name in negative:
        steps.plan.negatives[(steps.arm, name)] = negative[name]
