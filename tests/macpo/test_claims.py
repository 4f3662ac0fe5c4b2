"""Paired changes over seeds or prompts, their intervals and verdicts, and the gap recovered."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from macpo.engine.errors import DataError
from macpo.engine.files import write_json, write_jsonl
from macpo.evaluation.claims import CONTRADICTED, HOLDS, INCONCLUSIVE, Claim, claims, claims_json, claims_table
from macpo.evaluation.gap import gaps_recovered
from macpo.evaluation.prompt_scores import Policy, PromptScores, ScoredRun
from macpo.evaluation.summary import AgentHistory, build_summary
from macpo.evaluation.uncertainty import Clusters, hierarchical, holm, paired_differences, t_interval, the_means
from macpo.report.run_reader import RunReader


def run(seed, teacher=(0.5, 0.6), student=(0.6, 0.8), sft=0.7, arm=0.75, with_arm=True, **extra) -> ScoredRun:
    def agent(role, values):
        return AgentHistory(role, [{"iteration": i, "gold": v} for i, v in enumerate(values)])

    agents = {
        "teacher0": agent("teacher", teacher),
        "ready": agent("teacher", (0.55,)),
        "student": agent("student", student),
        "filtered-sft": agent("baseline", (sft,)),
    }
    arms = {"own-samples": {"student": agent("student", (0.6, arm)), "teacher0": agent("teacher", teacher)}}
    return ScoredRun(build_summary(agents, [], seed, {}, arms=arms if with_arm else None, **extra))


def test_every_claim_is_paired_by_seed():
    found = claims([run(200), run(201, teacher=(0.7, 0.65), student=(0.5, 0.9), sft=1.0, arm=0.8)])
    by_kind = {claim.kind: claim for claim in found}
    assert [claim.kind for claim in found] == ["teacher", "naive", "mean-teacher", "baseline", "ablation"]
    assert by_kind["teacher"].changes == pytest.approx((0.1, -0.05))
    assert by_kind["naive"].changes == pytest.approx((0.2, 0.4))
    assert by_kind["mean-teacher"].changes == pytest.approx((0.275, 0.275))  # .525 and .625: the ready one has .55
    assert by_kind["baseline"].changes == pytest.approx((0.1, -0.1))
    assert by_kind["ablation"].changes == pytest.approx((0.05, 0.1))
    assert all(claim.seeds == (200, 201) for claim in found)


@pytest.mark.parametrize(
    ("finals", "verdict"),
    [
        ((0.800, 0.801, 0.802), HOLDS),
        ((0.80, 0.95, 0.58), INCONCLUSIVE),
        ((0.50, 0.501, 0.499), CONTRADICTED),
        ((0.55, 0.60, 0.50), INCONCLUSIVE),  # lower on average, and the interval covers 0
        ((0.60, 0.60, 0.60), INCONCLUSIVE),  # no change is not a rise
        ((0.80,), INCONCLUSIVE),  # one seed without scores by prompt has no interval
    ],
)
def test_verdicts(finals, verdict):
    found = claims([run(i, student=(0.6, final)) for i, final in enumerate(finals)])
    naive = next(claim for claim in found if claim.kind == "naive")
    assert naive.verdict == verdict and (naive.estimate is None) == (len(finals) == 1)
    if len(finals) > 1:
        assert naive.estimate == t_interval(naive.changes) and naive.over == "seeds"


def test_a_verdict_needs_the_whole_table():
    """Five claims: an interval above 0 whose p value, times their number, is too large shows nothing."""
    finals = (0.68, 0.72, 0.75)
    found = claims([run(i, student=(0.6, final), teacher=(0.5, 0.5 + i / 10)) for i, final in enumerate(finals)])
    ps = [claim.estimate.p for claim in found]
    assert [claim.adjusted_p for claim in found] == holm(ps)
    naive = next(claim for claim in found if claim.kind == "naive")
    assert naive.interval[0] > 0 and naive.estimate.p < 0.05 < naive.adjusted_p and naive.verdict == INCONCLUSIVE


def test_every_row_stays_in_the_table_and_the_file():
    runs = [run(1, student=(0.9, 0.5)), run(2, student=(0.9, 0.4), with_arm=False)]
    found = claims(runs)
    text = claims_table(found, "gold")
    assert "seeds 1, 2" in text and "final student > ablation own-samples" in text and "0/1" in text
    assert len(text.splitlines()) == 3 + len(found)
    content = json.loads(json.dumps(claims_json(found, [each.summary for each in runs])))
    assert content["metric"] == "gold" and content["seeds"] == [1, 2] and content["adjustment"] == "holm"
    assert [row["verdict"] for row in content["claims"]] == [claim.verdict for claim in found]
    ablation = content["claims"][-1]
    assert ablation["seeds"] == [1] and ablation["interval"] is None and ablation["mean"] == pytest.approx(-0.25)


# --- scores by prompt -------------------------------------------------------------------------------------------------

LEVELS = {
    Policy("", "teacher0", 0): 0.2,
    Policy("", "teacher0", 1): 0.3,
    Policy("", "ready", 0): 0.4,
    Policy("", "student", 0): 0.5,
    Policy("", "student", 1): 0.8,
    Policy("", "filtered-sft", 0): 0.78,
    Policy("", "ceiling", 0): 1.0,
    Policy("own", "student", 1): 0.6,
}


def rows_of(level: float, seed: int, n: int = 60) -> list[dict]:
    """Two turns of each of n / 2 dialogues, with a difficulty that all policies share."""
    hard, noise = np.random.default_rng(seed), np.random.default_rng([seed, int(level * 100)])
    rows = []
    for i in range(n):
        turns = [{"role": "user", "content": f"dialogue {i // 2}"}]
        turns += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "and"}] * (i % 2)
        score = level + 0.3 * hard.normal() + 0.1 * noise.normal()
        rows.append({"prompt_id": f"p{i}", "prompt": turns, "gold": score, "answer": "word " * noise.integers(1, 20)})
    return rows


def scored(seed: int, missing: Sequence[Policy] = (), **extra) -> ScoredRun:
    def agent(arm: str, name: str, role: str) -> AgentHistory:
        own = [policy for policy in LEVELS if (policy.arm, policy.agent) == (arm, name)]
        return AgentHistory(role, [{"iteration": p.iteration, "gold": float(golds(seed, p).mean())} for p in own])

    found = {policy: rows_of(level, seed) for policy, level in LEVELS.items() if policy not in missing}
    roles = {"teacher0": "teacher", "ready": "teacher", "student": "student", "filtered-sft": "baseline"}
    agents = {name: agent("", name, role) for name, role in (roles | {"ceiling": "ceiling"}).items()}
    arms = {"own": {"student": agent("own", "student", "student")}}
    return ScoredRun(build_summary(agents, [], seed, {}, arms=arms, **extra), PromptScores("gold", found.get))


def golds(seed: int, *policies: Policy) -> np.ndarray:
    return np.mean([[row["gold"] for row in rows_of(LEVELS[policy], seed)] for policy in policies], 0)


def of_kind(found: list[Claim], kind: str) -> Claim:
    (claim,) = (claim for claim in found if claim.kind == kind)
    return claim


def test_one_seed_is_compared_prompt_by_prompt_and_by_dialogue():
    found = claims([scored(7)])
    clusters = [i // 2 for i in range(60)]
    final = golds(7, Policy("", "student", 1))
    for kind, others in (
        ("naive", [Policy("", "student", 0)]),
        ("mean-teacher", [Policy("", "teacher0", 0), Policy("", "ready", 0)]),
        ("baseline", [Policy("", "filtered-sft", 0)]),
        ("ablation", [Policy("own", "student", 1)]),
    ):
        claim = of_kind(found, kind)
        (direct,) = paired_differences(Clusters.of(final - golds(7, *others), clusters)) or ()
        assert claim.over == "prompts" and claim.mean == pytest.approx(direct.value)
        assert claim.interval == pytest.approx((direct.low, direct.high)) and claim.estimate.p == direct.p
    assert [of_kind(found, kind).verdict for kind in ("naive", "baseline")] == [HOLDS, INCONCLUSIVE]
    length = of_kind(found, "naive").equal_length
    assert length is not None and length.value == pytest.approx(0.3, abs=0.05)  # length makes no score here


def test_seeds_decide_by_t_and_show_the_hierarchical_interval():
    runs = [scored(seed) for seed in (1, 2, 3)]
    naive = of_kind(claims(runs), "naive")
    tables = []
    for seed in (1, 2, 3):
        change = golds(seed, Policy("", "student", 1)) - golds(seed, Policy("", "student", 0))
        tables.append(Clusters.of(change, [i // 2 for i in range(60)]))
    assert naive.over == "seeds" and naive.estimate == t_interval(naive.changes)
    assert naive.over_both == hierarchical(tables, the_means)[0]
    assert of_kind(claims(runs[:2]), "naive").over_both is None  # two seeds are too few


def test_policies_without_rows_leave_their_claim_open_and_the_others_as_they_are():
    whole, part = claims([scored(7)]), claims([scored(7, missing=[Policy("own", "student", 1)])])
    assert of_kind(part, "ablation").estimate is None and of_kind(part, "ablation").verdict == INCONCLUSIVE
    assert of_kind(part, "naive").interval == of_kind(whole, "naive").interval


def test_the_best_teacher_is_chosen_on_development_prompts_alone():
    """`ready` is better on the test prompts, `teacher0` on the others: it is the weak one of the second PGR."""
    development = {"teacher0": {"gold": 0.45}, "ready": {"gold": 0.35}}
    plain, chosen = scored(7), scored(7, development=development)
    assert [claim.kind for claim in claims([plain])].count("best-teacher") == 0 and len(gaps_recovered([plain])) == 1
    best = of_kind(claims([chosen]), "best-teacher")
    assert best.worse == "initial teacher that is best on development prompts"
    assert best.worse_values == pytest.approx([golds(7, Policy("", "teacher0", 0)).mean()])
    mean, one = gaps_recovered([chosen])
    assert mean["weak_agent"] == "mean initial teacher" and mean["weak"] == pytest.approx(one["weak"] + 0.1, abs=0.03)
    assert one["weak_agent"] == f"{best.worse} (teacher0)"
    other = scored(8, development={"teacher0": {"gold": 0.45}, "ready": {"gold": 0.55}})
    both = of_kind(claims([chosen, other]), "best-teacher")  # one claim, whichever teacher a seed has
    assert both.seeds == (7, 8) and both.worse_values[1] == pytest.approx(golds(8, Policy("", "ready", 0)).mean())
    half = scored(7, development={"teacher0": {"gold": 0.45}})  # not of every teacher: no choice
    assert len(gaps_recovered([half])) == 1


def test_gap_recovered_has_an_interval_or_says_that_there_is_no_gap():
    (gap,) = gaps_recovered([scored(7)])
    last = gap["student"][-1]
    assert last["value"] == pytest.approx((0.8 - 0.3) / (1.0 - 0.3), abs=0.05) and last["low"] < 0.7 < last["high"]
    assert gap["gap"][0] > 0.6 and [row["iteration"] for row in gap["student"]] == [0, 1]
    (over_seeds,) = gaps_recovered([scored(seed) for seed in (1, 2, 3)])
    assert over_seeds["student"][-1]["value"] == pytest.approx(5 / 7, abs=0.05)
    plain = scored(7).summary
    (without,) = gaps_recovered([ScoredRun(plain)])
    assert without["gap"] is None and without["student"][-1]["low"] is None
    assert without["student"][-1]["value"] == pytest.approx(last["value"])
    flat = dict(LEVELS)
    try:
        LEVELS[Policy("", "ceiling", 0)] = 0.3
        (none,) = gaps_recovered([scored(7)])
    finally:
        LEVELS.update(flat)
    assert none["gap"][0] < 0 < none["gap"][1] and {row["value"] for row in none["student"]} == {None}


def test_scores_by_prompt_of_human_pairs():
    """An implicit reward is measured against the base model; several samples of a prompt are rows of one cluster."""
    logps = [(-5, -6, -7, -7), (-5, -5, -6, -7), (-5, -5, -5, -5), (None, -5, -5, -5)]
    names = ("chosen_logp", "base_chosen_logp", "rejected_logp", "base_rejected_logp")
    rows = [{"prompt_id": "p", **dict(zip(names, each, strict=True))} for each in logps]
    scores = PromptScores("preference_accuracy", {Policy("", "a", 0): rows}.get)
    column = scores.columns([Policy("", "a", 0)])[:, 0]
    assert column[:3].tolist() == [1.0, 0.0, 0.5] and np.isnan(column[3]) and scores.clusters == ["p"] * 4
    assert np.isnan(scores.columns([Policy("", "b", 0)])).all()


def test_scores_are_read_from_the_stages_that_the_summary_names(tmp_path):
    """An arm that shares a stage of the main run has its rows; a scorer's scores lie beside the evaluation."""
    for number, (stage, level) in enumerate({"eval-a-iter0": 0.2, "x.eval-a-iter1": 0.6}.items()):
        rows = [{"prompt_id": f"p{i}", "gold": level + i / 10, "answer": "one two"} for i in range(3)]
        folder = tmp_path / f"{number:02d}-{stage}"
        folder.mkdir()
        write_json(folder / "evaluation.json", {"role": "student", "iteration": 0})
        write_jsonl(folder / "evaluation.jsonl", rows)
    (tmp_path / "03-x.score-rm-a-iter1").mkdir()
    given = [{"prompt_id": f"p{i}", "score": -i, "tokens": 4} for i in range(2)]
    write_jsonl(tmp_path / "03-x.score-rm-a-iter1" / "scores.jsonl", given)
    named = [{"arm": "y", "agent": "a", "iteration": 1, "stage": "x.eval-a-iter1"}]
    read = RunReader(tmp_path).prompt_scores("gold", named)
    policies = [Policy("", "a", 0), Policy("x", "a", 0), Policy("x", "a", 1), Policy("y", "a", 1), Policy("z", "b", 0)]
    assert read.columns(policies)[0].tolist()[:4] == [0.2, 0.2, 0.6, 0.6]  # x has no stage of its own at iteration 0
    assert np.isnan(read.columns(policies)[:, 4]).all() and (read.words(policies)[:, :4] == 2).all()
    scorer = RunReader(tmp_path).prompt_scores("score_rm", named).columns([Policy("y", "a", 1)])[:, 0]
    assert scorer[:2].tolist() == [0, -1] and np.isnan(scorer[2])


def test_claims_refuse_runs_that_cannot_be_compared():
    other = run(2)
    for agent in other.summary["agents"].values():
        agent["scores"] = [{"iteration": row["iteration"], "preference_accuracy": 0.5} for row in agent["scores"]]
    for runs, problem in (([], "no run"), ([run(1), run(1)], "twice"), ([run(1), other], "one metric")):
        with pytest.raises(DataError, match=problem):
            claims(runs)
