"""The README's pictures are made by the project, parse, and are the ones that are committed."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

from bench import make_pictures
from bench.evidence import update_readme
from bench.evidence.paper_claims import read_all
from macpo.evaluation.summary import AgentHistory, build_summary

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RESULTS = ROOT / "bench" / "results"


def test_committed_loop_is_what_the_script_draws():
    text = make_pictures.loop_svg()
    assert (ROOT / "docs" / "loop.svg").read_text(encoding="utf-8") == text
    ET.fromstring(text)


def test_demo_picture_of_several_runs():
    summaries = []
    for seed, last in ((1, 0.7), (2, 0.9)):
        agents = {
            "teacher0": AgentHistory("teacher", [{"iteration": t, "gold": 0.4 + t / 10} for t in range(2)]),
            "student": AgentHistory("student", [{"iteration": 0, "gold": 0.5}, {"iteration": 1, "gold": last}]),
            "ceiling": AgentHistory("ceiling", [{"iteration": 0, "gold": 1.0}]),
        }
        arms = {
            "filtered": {"student": AgentHistory("student", [{"iteration": 0, "gold": 0.6}])},
            "naive": {"student": AgentHistory("student", [{"iteration": 0, "gold": 0.5}])},
        }
        summaries.append(build_summary(agents, [], seed, {}, arms=arms))
    text = make_pictures.demo_svg(summaries)
    labels = {"".join(node.itertext()) for node in ET.fromstring(text).iter("{http://www.w3.org/2000/svg}text")}
    assert {"teacher0", "student", "ceiling", "filtered", "iteration", "gold score"} <= labels
    assert "naive" not in labels, "it is the student's own start"
    assert "var(--" not in text and "#0102" not in text  # real colours outside a page


def test_readme_and_docs_show_the_committed_result():
    """Their numbers are those of bench/results, nothing is typed by hand."""
    demo, comparison = read_all(RESULTS / "demo-world"), read_all(RESULTS / "demo-compare")
    for page, section, text in update_readme.sections(demo, comparison):
        found = page.read_text(encoding="utf-8")
        assert update_readme.replaced(found, section, text) == found
    drawn, committed = (
        set(re.findall(r">([^<>]+)</text>", text))
        for text in (make_pictures.demo_svg([seed.summary for seed in comparison]), (DOCS / "demo.svg").read_text())
    )
    assert drawn and drawn == committed  # the curves' digits depend on matplotlib's version
