"""Which arms a comparison has, and what each takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import init, tiny

from macpo.commands.planning.estimates import size_of
from macpo.comparison.arms import matched, method_arms, named_arms, teacher_arms
from macpo.comparison.ledger import ledgers
from macpo.config import Recipe
from macpo.engine.errors import ConfigError
from macpo.methods.registry import METHODS, build_plan


def recipe(folder: Path, **changes: Any) -> Recipe:
    teachers = [{"init": init(16), "tuning": {"type": "full"}} for _ in range(3)]
    return tiny(folder, **({"teachers": teachers} | changes))


def test_every_method_has_an_arm_and_every_arm_is_a_valid_recipe(tmp_path: Path) -> None:
    arms = named_arms("methods")
    assert {arm["method"] for arm in arms.values()} == set(METHODS) - {"macpo"}
    base = recipe(tmp_path, ablations=arms | named_arms("ablations"))
    for name in base.ablations:
        own = base.arm(name)
        assert own.method == arms.get(name, {}).get("method", "macpo")


def test_methods_that_ask_in_words_are_left_out_of_the_demo_world_with_a_reason(tmp_path: Path) -> None:
    arms, left_out = method_arms(recipe(tmp_path), None)
    assert set(left_out) == {"self-rewarding", "rlaif", "rlcd"} and not set(left_out) & set(arms)
    build_plan(recipe(tmp_path, ablations=arms))
    assert list(method_arms(recipe(tmp_path), ["spin", "macpo"])[0]) == ["spin"]
    with pytest.raises(ConfigError, match=r"--methods: no method 'spinn'"):
        method_arms(recipe(tmp_path), ["spinn"])


def test_the_teacher_curve_has_every_window_of_the_ring(tmp_path: Path) -> None:
    arms = teacher_arms(recipe(tmp_path), range(1, 4))
    assert [len(arm["use_teachers"]) for arm in arms.values()] == [1, 1, 1, 2, 2, 2], "all three are the recipe itself"
    assert arms["k2-teacher2"]["use_teachers"] == ["teacher2", "teacher0"]
    with pytest.raises(ConfigError, match=r"--k-curve: got 5.*3 teachers"):
        teacher_arms(recipe(tmp_path), [5])
    assert list(teacher_arms(recipe(tmp_path), [1, 2, 3], 2)) == [
        "k1-teacher0",
        "k1-teacher1",
        "k2-teacher0",
        "k2-teacher1",
    ]
    for wrong in (0, 4):
        with pytest.raises(ConfigError, match=rf"--k-orders: got {wrong}.*3 teachers"):
            teacher_arms(recipe(tmp_path), [1], wrong)


def test_the_ledger_counts_what_each_arms_student_needs(tmp_path: Path) -> None:
    arms = {"naive": {"method": "naive-sft", "iterations": 0}, "spin": {"method": "spin"}}
    base = recipe(tmp_path, ablations=arms)
    found = ledgers(build_plan(base), size_of(base), base)
    assert list(found) == ["", "ceiling", "naive", "spin"]
    assert found["naive"].human_labels == found[""].human_labels == 3 * 16, "each teacher's pairs, once"
    assert found["ceiling"].human_labels == 20, "the student's own prompts"
    steps = -(-20 // 8)
    both = -(-2 * 20 // 8)  # the second round of SPIN has the first one's pairs too
    assert found["naive"].student_steps == steps and found["spin"].student_steps == 2 * steps + both
    assert found[""].student_steps == 4 * steps, "a negative policy too"
    assert found["naive"].own_stages == 0 and found["spin"].own_stages == 6
    assert 0 < found["naive"].trained < found["spin"].trained < found[""].trained
    once = {stage.name: {"tokens": 1} for stage in build_plan(base).graph.stages}
    written = {name: each.generated for name, each in ledgers(build_plan(base), size_of(base), base, once).items()}
    assert written == {"": 3 + 4 + 4, "ceiling": 0, "naive": 3, "spin": 3 + 2}, "sets of responses to learn from"
    noted = {"init-student-positive": {"tokens": 1000, "steps": 7}}
    measured = ledgers(build_plan(base), size_of(base), base, noted)
    assert measured["naive"].student_steps == 7


def test_matched_arms_take_no_more_steps_than_the_method(tmp_path: Path) -> None:
    base = recipe(tmp_path, iterations=1)
    arms = {"spin": {"method": "spin", "iterations": 5}, "naive": {"method": "naive-sft", "iterations": 0}}
    found = matched(base, arms, size_of(base))
    assert found["naive"] == arms["naive"] and found["spin"]["iterations"] == 1, "3 + 5 steps are too many"
