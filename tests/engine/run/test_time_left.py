"""The time left of a run whose stages take what the test says, beside what they were planned to take."""

from __future__ import annotations

import random

import pytest
import toy_run
from toy_run import From, Join, Transform

from macpo.engine.run.stages import Graph, Stage
from macpo.engine.run.time_left import STAGE_S, Planned, TimeLeft, UnderWay, stage_left


def chain(length: int) -> Graph:
    """data, then stages one after the other."""
    graph = Graph()
    last = graph.add(Stage("data", toy_run.MakeData(seed=1)))
    for i in range(length):
        last = graph.add(Stage(f"t{i}", Transform(salt=str(i), i=i, inputs=From(rows=last))))
    return graph


def fan(width: int) -> Graph:
    """data, then stages side by side, then one that reads two of them."""
    graph = Graph()
    data = graph.add(Stage("data", toy_run.MakeData(seed=1)))
    for i in range(width):
        graph.add(Stage(f"t{i}", Transform(salt=str(i), i=i, inputs=From(data=data))))
    graph.add(Stage("join", Join(inputs=From(a="t0", b="t1"))))
    return graph


@pytest.mark.parametrize("slower", [0.2, 1.0, 7.0])
def test_it_is_exact_once_the_basis_is_there_on_a_machine_that_is_so_many_times_slower(slower: float) -> None:
    graph = chain(20)
    planned = {stage.name: Planned(10.0 + i, (stage.kind,)) for i, stage in enumerate(graph.stages)}
    left = TimeLeft(graph, planned)
    names = [stage.name for stage in graph.stages]
    truth = {name: slower * (planned[name].seconds + STAGE_S) for name in names}
    for i, name in enumerate(names[:-1]):
        left.measured(name, truth[name])
        rest = names[i + 1 :]
        expected = left.left(rest, {})
        assert expected is None or expected == pytest.approx(sum(truth[each] for each in rest))
        assert (expected is None) == (i == 0), "one stage of 21 is too little"
    assert left.whole() == pytest.approx(sum(truth.values()))


def test_nothing_is_said_before_there_is_a_basis() -> None:
    graph = chain(20)
    left = TimeLeft(graph, {stage.name: Planned(0.0 if stage.name == "data" else 100.0) for stage in graph.stages})
    names = [stage.name for stage in graph.stages]
    assert left.left(names, {}) is None and left.whole() is None
    left.measured("data", 2.0)
    assert left.left(names[1:], {}) is None, "a stage without work tells nothing about work"
    running = UnderWay(elapsed=30.0, left=170.0, last=True, seen=(0.15 * 100, 30.0))
    assert left.left(names[2:], {"t0": running}) is None
    running = UnderWay(elapsed=140.0, left=60.0, last=True, seen=(0.7 * (100 + STAGE_S), 140.0))
    found = left.left(names[2:], {"t0": running})
    assert found == pytest.approx(60 + 19 * 200, rel=0.01), "a running stage that counts is a basis too"


def test_each_kind_of_stage_is_corrected_by_its_own() -> None:
    """SFT is as planned, writing takes ten times as long, and the two alternate."""
    graph = chain(40)
    kinds = {f"t{i}": ("write" if i % 2 else "sft") for i in range(40)} | {"data": "data"}
    planned = {name: Planned(10.0, (kind,)) for name, kind in kinds.items()}
    left, draw = TimeLeft(graph, planned), random.Random(0)
    names = [stage.name for stage in graph.stages]
    truth = {name: (100.0 if kind == "write" else 10.0) * draw.uniform(0.8, 1.25) for name, kind in kinds.items()}
    errors = {}
    for i, name in enumerate(names[:-1]):
        left.measured(name, truth[name])
        rest = sum(truth[each] for each in names[i + 1 :])
        found = left.left(names[i + 1 :], {})
        errors[i] = abs((found or 0.0) / rest - 1)
    # the stages' own spread is 13 %: of the 5 last ones that write it leaves 6 %, of which twice as much is allowed
    assert errors[3] < 0.25 and max(errors[i] for i in range(12, 31)) < 0.12


def test_one_slow_stage_of_a_model_says_little_about_other_kinds() -> None:
    graph = chain(20)
    planned = {
        stage.name: Planned(10.0, ("all", "all big" if stage.name == "t0" else "all small")) for stage in graph.stages
    }
    left = TimeLeft(graph, planned)
    left.measured("t0", 1000.0)
    for i in range(1, 10):
        left.measured(f"t{i}", 10.0 + STAGE_S)
    expected = left.expected(["t15"])
    assert expected is not None and 10.0 < expected["t15"] < 18.0


def test_jobs_that_run_side_by_side_share_the_work() -> None:
    names = [f"t{i}" for i in range(6)]
    planned = {"data": Planned(10.0), "join": Planned(10.0), **{name: Planned(10.0) for name in names}}
    for jobs, rounds in ((1, 6), (2, 3), (4, 2)):
        left = TimeLeft(fan(6), planned, jobs)
        left.measured("data", 10.0 + STAGE_S)
        found = left.left([*names, "join"], {})
        each = 10.0 + STAGE_S
        # the two stages that join reads are the most urgent, so it runs beside the others
        assert found == pytest.approx({1: 7, 2: 4, 4: 2}[jobs] * each), (jobs, rounds)


def test_what_runs_counts_with_what_it_has_left() -> None:
    names = [f"t{i}" for i in range(4)]
    planned = {"data": Planned(10.0), "join": Planned(0.0), **{name: Planned(10.0) for name in names}}
    left = TimeLeft(fan(4), planned, 2)
    left.measured("data", 10.0 + STAGE_S)
    running = {"t0": UnderWay(5.0, left=2.0, last=True), "t1": UnderWay(5.0)}
    assert left.left(["t2", "t3"], running) == pytest.approx(5.0 + STAGE_S + 10.0 + STAGE_S)


def test_a_stage_that_counts_its_last_work_says_itself_what_it_has_left() -> None:
    assert stage_left(UnderWay(10.0, left=3.0, last=True), 100.0) == 3.0
    assert stage_left(UnderWay(10.0, left=3.0), 100.0) == 90.0, "more comes after this work"
    assert stage_left(UnderWay(10.0), None) is None and stage_left(UnderWay(10.0), 7.0) is None


def test_without_a_plan_the_stages_own_relative_durations_serve() -> None:
    graph = chain(10)
    left = TimeLeft(graph)
    left.measured("data", 26.0)
    assert left.left([f"t{i}" for i in range(10)], {}) == pytest.approx(260.0)


def test_stages_that_only_move_files_are_not_slower_by_as_much_as_computing() -> None:
    graph = chain(20)
    planned = {stage.name: Planned(10.0 if stage.name < "t2" else 0.0, (stage.name,)) for stage in graph.stages}
    left = TimeLeft(graph, planned)
    left.measured("t0", 60 * (10 + STAGE_S))
    expected = left.expected(["t1", "t5"])
    assert expected == pytest.approx({"t1": 60 * (10 + STAGE_S), "t5": STAGE_S})
    left.measured("t4", 0.1)
    assert left.expected(["t5"]) == pytest.approx({"t5": 0.1})
