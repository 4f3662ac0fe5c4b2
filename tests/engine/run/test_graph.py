"""The stage graph alone: which stages are equal, what they depend on, what changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import toy_run
from pydantic import Field, ValidationError
from toy_run import From, Join, MakeData, Toy, Transform

from macpo.engine.errors import ConfigError
from macpo.engine.run.context import StageContext
from macpo.engine.run.keys import canonical, changes, key_of
from macpo.engine.run.stages import Graph, Stage, StageWork


class Idle(StageWork):
    name = "idle"

    def run(self, ctx: StageContext) -> None: ...


class Anything(Idle):
    name = "anything"
    x: Any


def test_equal_stages_are_one_and_different_ones_may_not_share_a_name() -> None:
    graph = toy_run.build({})
    twin = Stage("arm-a1", Transform(salt="s", i=1, inputs=From(data="data")))
    assert graph.add(twin) == "a1" and len(graph.stages) == 7
    pair = (Stage("tuple", Anything(x=(1, 2))), Stage("list", Anything(x=[1, 2])))
    assert graph.add(pair[0]) == graph.add(pair[1])
    with pytest.raises(ConfigError, match="two different stages are called 'a1'"):
        graph.add(Stage("a1", Transform(salt="s", i=9, inputs=From(data="data"))))
    with pytest.raises(ValueError, match="needs 'nobody'"):
        graph.add(Stage("c", Join(inputs=From(a="nobody"))))


@pytest.mark.parametrize("name", ["", "a/b", "../a", "a b", ".a", "a.tmp", "é"])
def test_stage_names_are_safe_file_names(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a stage"):
        Graph().add(Stage(name, Join()))


def test_identity_depends_on_kind_settings_and_inputs_only() -> None:
    def identity(work: type[Toy] = Transform, seed: int = 1, alias: str = "data", name: str = "x", **more: Any) -> str:
        graph = Graph()
        graph.add(Stage("data", MakeData(seed=seed)))
        more |= {"salt": "s"} if work is Transform else {}
        return graph.identity(graph.add(Stage(name, work(inputs=From(**{alias: "data"}), **more))))

    assert identity() == identity(name="other")
    assert len({identity(), identity(Join), identity(seed=2), identity(alias="rows"), identity(i=3)}) == 5


def test_a_default_is_not_in_the_key_nor_is_where_a_stage_runs() -> None:
    """So a kind can gain a setting, and a run can move to another machine, without making finished stages stale."""

    class Placed(Idle):
        name = "placed"
        seed: int
        maybe: int | None
        later: int = 3
        device: str = Field("cpu", exclude=True)

    assert Stage("x", Placed(seed=1, maybe=None)).settings == {"seed": 1, "maybe": None}
    assert Placed(seed=1, maybe=2, later=3, device="cuda").settings() == {"seed": 1, "maybe": 2}
    assert Placed(seed=1, maybe=2, later=4).settings() == {"seed": 1, "maybe": 2, "later": 4}
    with pytest.raises(ValidationError, match="sede"):
        Placed(seed=1, maybe=2, sede=3)


@pytest.mark.parametrize("bad", [{"x": float("nan")}, {"x": Path("p")}, {1: 2}, {"x": {1, 2}}])
def test_settings_must_be_json(bad: dict) -> None:
    with pytest.raises(ValueError, match=r"JSON|range|compliant"):
        key_of("x", bad, {})
    if "x" in bad and isinstance(bad["x"], float):
        with pytest.raises(ValueError, match=r"JSON|range|compliant"):
            Graph().add(Stage("x", Anything(**bad)))


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
