"""The gates of the demo world are exact, and close where they should."""

from __future__ import annotations

import math

import pytest

from macpo.demo_world import WorldSettings
from macpo.demo_world.gates import every, text_gates
from macpo.demo_world.grammar import (
    Draw,
    requests,
)  # fmt: skip
from macpo.demo_world.responses import bad, graded
from macpo.demo_world.settings import BenignMix, Habits, HarmfulMix


def test_every_way_of_a_function_of_choices_is_gone_through_once() -> None:
    def choose(chooser: Draw) -> str:
        first = chooser.weighted([("a", 0.5), ("b", 0.3), ("never", 0.0), ("c", 0.2)])
        return first + (chooser.pick("xy") if first == "a" else "") + ("!" if chooser.chance(0.25) else "")

    found = list(every(choose))
    assert dict(found) == pytest.approx({
        "ax!": 0.0625, "ax": 0.1875, "ay!": 0.0625, "ay": 0.1875, "b!": 0.075, "b": 0.225, "c!": 0.05, "c": 0.15,
    })  # fmt: skip
    assert len(found) == 8


def test_gates_of_the_default_world() -> None:
    found = text_gates(WorldSettings())
    assert {(gate.role, gate.harmful) for gate in found} == {(r, h) for r in ("teacher", "student") for h in (0, 1)}
    assert all(gate.passed for gate in found), found


def test_gates_see_what_they_are_there_for() -> None:
    """Ten variants of every harmful step make all harm unlikely; rude text alone shares no first word."""
    many = text_gates(WorldSettings(harmful_steps=6))
    assert [gate.passed for gate in many if gate.harmful] == [False, False]
    rude = Habits(harmful=HarmfulMix(rude=1.0), benign=BenignMix(rude=1.0))
    assert {gate.first_words for gate in text_gates(WorldSettings(teacher_habits=rude)) if gate.role == "teacher"} == {
        0.0
    }


def test_auc_of_the_gates_is_that_of_drawn_responses() -> None:
    """By 4,000 draws and the texts' own frequencies among many more."""
    settings, request = WorldSettings(), next(request for request in requests() if not request.harmful)
    draw = Draw("auc")
    exact = next(gate.auc for gate in text_gates(settings) if gate.role == "student" and not gate.harmful)
    ways: dict[str, float] = {}
    for share, choose in (
        (settings.good_share, lambda chooser: graded(request, chooser, settings)[0]),
        (1 - settings.good_share, lambda chooser: bad(request, chooser, settings, "student")),
    ):
        for text, p in every(choose):
            ways[text] = ways.get(text, 0.0) + share * p

    def score(text: str) -> float:
        return math.log(ways[text]) / (len(text.split()) + 1)

    wins = 0.0
    for _ in range(4000):
        one, other = score(graded(request, draw, settings)[0]), score(bad(request, draw, settings, "student"))
        wins += 1.0 if one > other + 1e-9 else 0.5 if abs(one - other) <= 1e-9 else 0.0
    assert wins / 4000 == pytest.approx(exact, abs=0.025)
    assert sum(ways.values()) == pytest.approx(1.0)
