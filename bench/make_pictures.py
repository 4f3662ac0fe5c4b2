"""Draws docs/loop.svg, the method: `python bench/make_pictures.py`; update_readme.py has docs/demo.svg drawn.

Several runs are drawn as the mean over their seeds with a band of one standard error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from macpo.engine.files import atomic_write
from macpo.evaluation.claims import shared_metric
from macpo.report.charts import by_iteration, mean_summary

DOCS = Path(__file__).parent.parent / "docs"

STYLE = """
  .bg { fill: #ffffff; stroke: #d5dae1; }
  text { fill: #1f2933; font: 14px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
  .b { font-weight: 600; } .m { fill: #5c6875; font-size: 12.5px; } .lane { fill: #f3f5f8; }
  .t { fill: #e8f0fe; stroke: #2f6fde; } .s { fill: #fdece6; stroke: #d6451b; } .p { fill: #ffffff; stroke: #8a96a3; }
  .a { stroke: #5c6875; stroke-width: 1.8; fill: none; } .h { fill: #5c6875; }
  @media (prefers-color-scheme: dark) {
    .bg { fill: #12171e; stroke: #343d49; } text { fill: #e5e9ee; } .m { fill: #9aa6b3; } .lane { fill: #1a212a; }
    .t { fill: #16294a; stroke: #6ea2ff; } .s { fill: #40200f; stroke: #ff7a4d; } .p { fill: #12171e; stroke: #7c8894; }
    .a { stroke: #9aa6b3; } .h { fill: #9aa6b3; }
  }
"""


def box(x: int, y: int, width: int, kind: str, title: str, *lines: str) -> str:
    """Draw a rounded box: a bold title and lines below; 30 units high plus 18 a line."""
    height = 30 + 18 * len(lines)
    parts = [f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="8"/>']
    parts.append(f'<text class="b" x="{x + 12}" y="{y + 20}">{escape(title)}</text>')
    parts += [
        f'<text class="m" x="{x + 12}" y="{y + 38 + 18 * i}">{escape(line)}</text>' for i, line in enumerate(lines)
    ]
    return "".join(parts)


def arrow(*points: tuple[int, int]) -> str:
    path = " L ".join(f"{x} {y}" for x, y in points)
    return f'<path class="a" d="M {path}" marker-end="url(#head)"/>'


def loop_svg() -> str:
    """Draw the MACPO loop as a standalone SVG that follows the reader's light or dark mode."""
    parts = [
        '<rect class="bg" x="0.5" y="0.5" width="959" height="479" rx="12"/>',
        '<rect class="lane" x="16" y="16" width="928" height="216" rx="10"/>',
        '<text class="b" x="32" y="40">1 · Strong student, iteration t</text>',
        box(32, 56, 210, "t", "Weak teachers, t−1", "every teacher answers", "every prompt"),
        box(278, 56, 214, "s", "Perplexity filter", "the student keeps the response", "that surprises it least"),
        box(32, 150, 210, "s", "Own negative policy", "the student’s own response:", "familiar, so a hard negative"),
        box(528, 92, 176, "p", "Pair", "chosen: another agent’s", "rejected: its own"),
        box(740, 92, 188, "s", "Strong student, t", "DPO from student t−1,", "+ SFT on the chosen"),
        arrow((242, 89), (276, 89)),
        arrow((492, 89), (510, 89), (510, 114), (526, 114)),
        arrow((242, 183), (510, 183), (510, 136), (526, 136)),
        arrow((704, 125), (738, 125)),
        '<rect class="lane" x="16" y="248" width="928" height="216" rx="10"/>',
        '<text class="b" x="40" y="276">2 · Every weak teacher k, iteration t</text>',
        box(740, 282, 188, "s", "Student’s responses", "student t answers", "every prompt"),
        box(528, 282, 176, "p", "Pair", "chosen: the student’s", "rejected: its own"),
        box(528, 384, 214, "t", "Own negative policy", "the teacher’s own response:", "familiar, so a hard negative"),
        box(278, 282, 214, "t", "Weak teacher k, t", "DPO from teacher k, t−1,", "+ SFT on the chosen"),
        arrow((834, 158), (834, 280)),
        arrow((740, 315), (706, 315)),
        arrow((616, 384), (616, 350)),
        arrow((528, 315), (494, 315)),
        arrow((278, 315), (24, 315), (24, 89), (30, 89)),
        '<text class="m" x="40" y="308">Next iteration: t + 1</text>',
        '<text class="m" x="40" y="394">Only text passes between agents.</text>',
        '<text class="m" x="40" y="414">Humans label the teachers’ prompts only,</text>',
        '<text class="m" x="40" y="434">before iteration 1.</text>',
    ]
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="h" d="M 0 0 L 8 4 L 0 8 z"/></marker></defs>'
    )
    title = "<title>The MACPO loop: teachers teach the student, then the student teaches the teachers</title>"
    body = "\n".join(parts)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 480" width="960" height="480" role="img">\n'
        f"{title}\n<style>{STYLE}</style>\n{head}\n{body}\n</svg>\n"
    )


def demo_svg(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Draw every agent's headline score by iteration, the mean over the runs, as a standalone SVG."""
    metric = shared_metric(summaries)
    summary = mean_summary(summaries, metric) if len(summaries) > 1 else summaries[0]
    return by_iteration(summary, [metric], inline=False) + "\n"


def main() -> None:
    atomic_write(DOCS / "loop.svg", loop_svg())


if __name__ == "__main__":
    main()
