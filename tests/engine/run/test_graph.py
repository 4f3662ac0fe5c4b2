"""The stage graph alone: which stages are equal, what they depend on, what changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import toy_run

from macpo.engine.errors import ConfigError
from macpo.engine.run.keys import canonical, changes
from macpo.engine.run.stages import Graph, Stage


def test_equal_stages_are_one_and_different_ones_may_not_share_a_name() -> None:
    graph = toy_run.build({})
    twin = Stage("arm-a1", "transform", toy_run.transform, {"i": 1, "salt": "s"}, {"data": "data"})
    assert graph.add(twin) == "a1" and len(graph.stages) == 7
    assert graph.add(Stage("tuple", "join", toy_run.join, {"x": (1, 2)})) == graph.add(
        Stage("y", "join", toy_run.join, {"x": [1, 2]})
    )
    with pytest.raises(ConfigError, match="two different stages are called 'a1'"):
        graph.add(Stage("a1", "transform", toy_run.transform, {"i": 9}, {"data": "data"}))
    with pytest.raises(ValueError, match="needs 'nobody'"):
        graph.add(Stage("c", "join", toy_run.join, {}, {"x": "nobody"}))


@pytest.mark.parametrize("name", ["", "a/b", "../a", "a b", ".a", "a.tmp", "é"])
def test_stage_names_are_safe_file_names(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a stage"):
        Graph().add(Stage(name, "join", toy_run.join, {}))


def test_identity_depends_on_function_settings_and_inputs_only() -> None:
    def identity(run: Any = toy_run.transform, seed: int = 1, alias: str = "data", name: str = "x") -> str:
        graph = Graph()
        graph.add(Stage("data", "make_data", toy_run.make_data, {"seed": seed}))
        return graph.identity(graph.add(Stage(name, run.__name__, run, {"salt": "s"}, {alias: "data"})))

    assert identity() == identity(name="other")
    assert len({identity(), identity(toy_run.join), identity(seed=2), identity(alias="rows")}) == 4


@pytest.mark.parametrize("bad", [{"x": float("nan")}, {"x": Path("p")}, {1: 2}, {"x": {1, 2}}])
def test_settings_must_be_json(bad: dict) -> None:
    with pytest.raises(ValueError, match=r"JSON|range|compliant"):
        Graph().add(Stage("x", "join", toy_run.join, bad))


def test_urgency_and_downstream() -> None:
    graph = toy_run.build({"extra": True})
    assert graph.downstream(["a2"]) == ["a2", "join2"]
    assert graph.downstream(["join1"]) == ["join1", "a2", "b2", "join2"]
    assert graph.urgency()["data"] == 5 and graph.urgency()["extra"] == 1 and graph.urgency()["a1"] == 4
    with pytest.raises(ConfigError, match="did you mean 'join1'"):
        graph.stage("joni1")


def test_changes_name_the_leaves() -> None:
    before = {"a": {"lr": 1e-5, "gone": 1}, "l": [1, 2], "m": [1]}
    now = {"a": {"lr": 2e-5, "new": "x"}, "l": [1, 3], "m": [1, 2]}
    assert changes(before, now) == [
        "a.lr: 1e-05 -> 2e-05",
        "a.gone: 1 -> removed",
        'a.new: new -> "x"',
        "l.1: 2 -> 3",
        "m: [1] -> [1, 2]",
    ]
    assert changes(before, json.loads(canonical(before))) == []
