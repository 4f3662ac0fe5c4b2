"""The README's pictures are made by the project, parse, and are the ones that are committed."""

from __future__ import annotations

import importlib.util
import xml.etree.ElementTree as ET
from pathlib import Path

from macpo.engine.files import write_json
from macpo.evaluation.summary import AgentHistory, build_summary

ROOT = Path(__file__).parents[2]


def load(name="make_pictures"):
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_committed_loop_is_what_the_script_draws():
    text = load().loop_svg()
    assert (ROOT / "docs" / "loop.svg").read_text(encoding="utf-8") == text
    ET.fromstring(text)


def test_demo_picture_of_several_runs(tmp_path):
    for seed, last in ((1, 0.7), (2, 0.9)):
        agents = {
            "teacher0": AgentHistory("teacher", [{"iteration": t, "gold": 0.4 + t / 10} for t in range(2)]),
            "student": AgentHistory("student", [{"iteration": 0, "gold": 0.5}, {"iteration": 1, "gold": last}]),
            "ceiling": AgentHistory("ceiling", [{"iteration": 0, "gold": 1.0}]),
        }
        (tmp_path / f"{seed}").mkdir()
        write_json(tmp_path / f"{seed}" / "summary.json", build_summary(agents, [], seed, {}))
    load().main([str(tmp_path / "1"), str(tmp_path / "2"), "--out", str(tmp_path / "docs")])
    text = (tmp_path / "docs" / "demo.svg").read_text(encoding="utf-8")
    labels = {"".join(node.itertext()) for node in ET.fromstring(text).iter("{http://www.w3.org/2000/svg}text")}
    assert {"teacher0", "student", "ceiling", "iteration", "gold score"} <= labels
    assert "var(--" not in text and "#0102" not in text  # real colours outside a page


def test_the_readme_shows_the_committed_result():
    """Its numbers are those that `macpo demo --seeds` wrote, nothing is typed by hand."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    claims = (ROOT / "docs" / "demo-claims.txt").read_text(encoding="utf-8")
    assert "95% interval" in claims
    assert load("update_readme").replaced(readme, claims) == readme
