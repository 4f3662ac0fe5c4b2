"""`macpo plan`: estimates follow the recipe, and the memory budget decides how often bases are loaded."""

from __future__ import annotations

from pathlib import Path

from tiny import tiny

from macpo.config import Recipe
from macpo.iteration import build_plan
from macpo.planning import Estimate, estimate, shape_of, show


def rows(recipe: Recipe) -> list[Estimate]:
    return estimate(recipe, build_plan(recipe))


def with_memory(recipe: Recipe, gigabytes: float) -> Recipe:
    return recipe.model_copy(update={"compute": recipe.compute.model_copy(update={"memory_gb": gigabytes})})


def test_every_stage_is_planned_in_order(tmp_path: Path) -> None:
    recipe = tiny(tmp_path)
    assert [row.stage for row in rows(recipe)] == [stage.name for stage in build_plan(recipe).graph.stages]
    assert all(row.disk_bytes >= 0 and row.seconds >= 0 for row in rows(recipe))
    assert next(row for row in rows(recipe) if row.stage == "base-student").tokens > 0


def test_the_budget_decides_how_many_bases_stay_loaded(tmp_path: Path) -> None:
    """K + 1 bases fit, or only one at a time does."""
    recipe = tiny(tmp_path)
    names = [agent.name for agent in (*recipe.teachers, recipe.student)]
    sizes = [shape_of(agent, recipe).bytes_loaded for agent in (*recipe.teachers, recipe.student)]
    roomy, tight = rows(with_memory(recipe, 1.0)), rows(with_memory(recipe, max(sizes) / 1e9))
    assert sum(row.load for row in roomy) == len(names) and roomy[-1].resident_bytes == sum(sizes)
    assert sum(row.load for row in tight) > 2 * len(names)
    assert max(row.resident_bytes for row in tight) <= max(sizes)
    assert f"{sum(row.load for row in tight)} loads" in show(with_memory(recipe, max(sizes) / 1e9))


def test_adapters_cost_less_disk_than_whole_models(tmp_path: Path) -> None:
    recipe = tiny(tmp_path)
    full, lora = (shape_of(agent, recipe) for agent in recipe.teachers)
    assert full.bytes_policy == 4 * full.num_parameters
    assert lora.bytes_policy < lora.bytes_loaded / 4


def test_more_iterations_cost_more(tmp_path: Path) -> None:
    short, long = (rows(tiny(tmp_path, iterations=t)) for t in (1, 3))
    assert sum(row.tokens for row in long) > sum(row.tokens for row in short)
    assert sum(row.disk_bytes for row in long) > sum(row.disk_bytes for row in short)
