"""The display of a run: on a terminal of any width, in a log, and with a clock that the test turns."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toy_run
from commands import Terminal

from macpo.engine.console import PLAIN_SECONDS, Display, Field, fitted, notice, notices_once
from macpo.engine.processes import StopFlag
from macpo.engine.progress import Pace, Progress, Report, bar, duration, shown_by
from macpo.engine.run.run_progress import Part, RunProgress
from macpo.engine.run.time_left import Planned

TOY = Path(toy_run.__file__)
DONE = re.compile(r"\[\d/7\] (\w+) done in \d+\.\d s( \(\d tokens\))?")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def command(folder: Path, *more: str) -> list[str]:
    return [sys.executable, str(TOY), str(folder), json.dumps({"num_rows": 6}), *more]


def finished(lines: list[str]) -> list[str]:
    return [match[1] for line in lines if (match := DONE.fullmatch(line))]


# --- words ---


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0.2, "0 s"), (99.4, "99 s"), (100, "2 min"), (5940, "99 min"), (6000, "1 h 40 min"), (7200, "2 h")),
        *((12_345, "3 h 30 min"), (200_000, "2 d 7 h"), (172_800, "2 d")),
    ],
)
def test_a_time_is_said_in_at_most_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_bar_has_its_size_whatever_the_share() -> None:
    assert [bar(share, 4) for share in (-1, 0, 0.5, 1, 2)] == ["────", "────", "━━──", "━━━━", "━━━━"]


def test_a_line_that_is_too_long_loses_its_least_important_fields() -> None:
    line = [Field("filtered-labels-sft.init-student-positive"), Field("SFT", 2), Field("step 12/48"), Field("20 s", 4)]
    assert [field.text for field in fitted(line, 100)] == [field.text for field in line]
    assert [field.text for field in fitted(line, 60)] == [line[0].text, "step 12/48", "20 s"]
    for width in (20, 24, 30, 39, 54):
        assert sum(len(field.text) + 2 for field in fitted(line, width)) - 2 <= width
        assert "step 12/48" in [field.text for field in fitted(line, width)]
    assert [field.text for field in fitted(line, 40)] == ["…init-student-positive", "step 12/48", "20 s"]
    assert [field.text for field in fitted(line, 24)] == ["…nt-positive", "step 12/48"]


def test_the_time_left_of_work_counts_from_its_first_report() -> None:
    pace = Pace(Report("step", 24, 48, since=24), 100.0)
    assert pace.left(150.0) is None, "nothing is done yet"
    pace.add(Report("step", 30, 48, since=24), 112.0)
    assert pace.left(112.0) == pytest.approx(36.0) and pace.left(122.0) == pytest.approx(26.0)
    assert pace.left(1000.0) == 0.0
    assert pace.goes_on_with(Report("step", 31, 48)) and not pace.goes_on_with(Report("responses", 31, 48))


def test_reports_go_to_what_shows_the_run_and_never_exceed_the_whole() -> None:
    class Sink:
        def __init__(self) -> None:
            self.found: list[Report] = []

        def report(self, report: Report) -> None:
            self.found.append(report)

        def close(self) -> None:
            raise AssertionError("it is not theirs to close")

    sink = Sink()
    with shown_by(sink), Progress("a", "responses", 5, done=2) as progress:
        progress.add(2, 10)
        progress.add(4)
    assert [str(report) for report in sink.found] == ["2/5 responses", "4/5 responses", "5/5 responses"]
    assert sink.found[1].tokens_per_s and all(report.since == 2 for report in sink.found)


@pytest.mark.parametrize(("leave", "said"), [(True, "check rows: 100/150 rows\n"), (False, "")])
def test_work_of_its_own_leaves_its_last_state_if_it_shall(
    leave: bool, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("check rows", "rows", 150, done=100, leave=leave):
        pass
    assert capsys.readouterr().err == said


def test_a_notice_is_printed_once_whoever_says_it_again(capsys: pytest.CaptureFixture[str]) -> None:
    with notices_once():
        for stage in ("a", "b"):
            with notices_once():
                notice("note: one", of=stage)
    notice("note: one")
    assert capsys.readouterr().err.splitlines() == ["a: note: one", "note: one"]


# --- the line ---


def test_the_plain_line_comes_every_30_seconds() -> None:
    clock, lines = Clock(), list[str]()
    display = Display(lambda: [], lambda: f"at {clock.now:.0f}", write=lines.append, clock=clock)
    assert not display.live and PLAIN_SECONDS == 30.0
    for clock.now in range(0, 121, 5):
        display.tick()
    assert lines == ["at 30", "at 60", "at 90", "at 120"]


def shown(clock: Clock, lines: list[str], **more: Any) -> RunProgress:
    planned = {"data": Planned(0.0), **{name: Planned(100.0) for name in ("a1", "b1", "a2", "b2")}}
    planned |= {name: Planned(0.0) for name in ("join1", "join2")}
    return RunProgress(toy_run.build({}), planned=planned, write=lines.append, clock=clock, **more)


def test_a_line_has_the_stage_each_job_its_speed_and_the_time_left() -> None:
    clock, lines = Clock(), list[str]()
    progress = shown(clock, lines, jobs=2, part=Part("seed 7", 1, 2))
    progress.begin("data")
    assert progress.line() == "seed 7 (1 of 2): 0 of 7 stages, 0 s so far, time left: …; data: make data"
    clock.now = 1.0
    assert progress.finished("data", {"seconds": 1.0}) == "[1/7] data done in 1.0 s"
    for process, name in ((11, "a1"), (12, "b1")):
        progress.begin(name, process)
    progress.of_stage("a1", Report("step", 0, 48, last=True))
    clock.now = 61.0
    progress.of_stage("a1", Report("step", 12, 48, 0, 2814.2, 0.92384, last=True))
    said = progress.line()
    assert said.startswith("seed 7 (1 of 2): 1 of 7 stages, 61 s so far, ")
    assert "a1: transform, step 12/48, 2,814 tok/s, loss 0.9238, 3 min left; b1: transform, " in said
    assert progress.finished("a1", {"seconds": 240.0, "counts": {"tokens": 20871}}) == (
        "[2/7] a1 done in 240.0 s (20,871 tokens)"
    )
    assert not re.search(r"[{}\r\x1b]", said)


def test_a_picture_names_what_runs_now() -> None:
    clock, lines = Clock(), list[str]()
    progress = shown(clock, lines, jobs=2)
    progress.begin("a1", 11)
    progress.of_stage("a1", Report("rows", 3, 6))
    whole, job = progress.picture()
    assert whole[0].text == "0 of 7 stages" and job[2].text == "3/6 rows"


# --- real runs ---


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("columns", [40, 100])
def test_a_terminal_has_one_display_and_ends_with_a_line_for_each_stage(
    tmp_path: Path, jobs: int, columns: int
) -> None:
    shown = Terminal(command(tmp_path, "--jobs", str(jobs)), columns=columns, environment={"TOY_SLEEP": "0.15"})
    assert shown.code == 0 and shown.unchanged, shown.raw
    assert sorted(finished(shown.lines)) == sorted(["data", "a1", "b1", "join1", "a2", "b2", "join2"]), shown.lines
    assert [line for line in shown.lines if not DONE.fullmatch(line)] == ["data: 6 rows"], "the display is gone"
    assert "\x1b[?" not in shown.raw, "the cursor was never hidden"
    live = [picture for picture in shown.pictures if any("/6 rows" in line for line in picture)]
    assert live and all(len(line) < columns for picture in live for line in picture)
    assert all(sum(" of 7 stages" in line for line in picture) == 1 for picture in live)
    if jobs == 2:
        assert any(sum("/6 rows" in line for line in picture) == 2 for picture in live)
    if columns == 100:
        assert any("1,234 tok/s" in line for picture in live for line in picture)


def test_a_terminal_that_becomes_narrower_shows_no_line_twice(tmp_path: Path) -> None:
    environment = {"TOY_SLEEP": "0.3"}
    shown = Terminal(command(tmp_path), columns=100, resize={"a1  ": 40}, environment=environment)
    assert shown.code == 0 and len(finished(shown.lines)) == 7
    assert [line for line in shown.lines if not DONE.fullmatch(line)] == ["data: 6 rows"]


def test_no_colour_means_no_colour(tmp_path: Path) -> None:
    environment = {"TOY_SLEEP": "0.15", "NO_COLOR": "1"}
    shown = Terminal(command(tmp_path), environment=environment)
    assert "/6 rows" in shown.raw and not re.search(r"\x1b\[(3|4|9)\d", shown.raw)


def test_a_dumb_terminal_gets_plain_lines(tmp_path: Path) -> None:
    shown = Terminal(command(tmp_path), environment={"TERM": "dumb", "TOY_SLEEP": "0.05"})
    assert shown.code == 0 and "\x1b" not in shown.raw and len(finished(shown.lines)) == 7


@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_leaves_the_terminal_as_it_was(tmp_path: Path, jobs: int) -> None:
    environment = {"TOY_SLEEP": "0.5"}
    shown = Terminal(command(tmp_path, "--jobs", str(jobs)), keys={"/6 rows": b"\x03"}, environment=environment)
    assert shown.code == 75 and shown.unchanged
    assert "stopping at the next safe point; Ctrl-C again aborts at once" in shown.lines
    assert not any("of 7 stages" in line or "/6 rows" in line for line in shown.lines), shown.lines
    assert shown.lines[-1].startswith("error: stopped at ")


@pytest.mark.parametrize(("how", "code"), [("data", 3), ("crash", 1), ("exit", 7)])
def test_errors_and_crashes_of_workers_leave_the_terminal_as_it_was(tmp_path: Path, how: str, code: int) -> None:
    environment = {"TOY_SLEEP": "0.1", "TOY_FAIL": f"b1:{how}"}
    shown = Terminal(command(tmp_path, "--jobs", "2"), environment=environment)
    assert shown.code == code and shown.unchanged
    assert sum(line.startswith("error: ") for line in shown.lines) == 1 and finished(shown.lines)[0] == "data"
    assert not any("of 7 stages" in line or "/6 rows" in line for line in shown.lines)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_pipe_gets_a_line_for_each_stage_and_no_control(tmp_path: Path, jobs: int) -> None:
    done = subprocess.run(command(tmp_path, "--jobs", str(jobs)), capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert len(finished(lines)) == 7 and [line for line in lines if not DONE.fullmatch(line)] == ["data: 6 rows"]
    assert done.stdout == "" and not re.search(r"[\r\x1b━─]", done.stderr)


def test_a_resumed_run_says_what_is_done_and_where_it_goes_on(tmp_path: Path) -> None:
    environment = {**os.environ, "TOY_FAIL": "b1:data"}
    subprocess.run(command(tmp_path), env=environment, capture_output=True, check=False)
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[0] == "resuming: 2 of 7 stages done, 0 s of work; next b1"
    again = subprocess.run(command(tmp_path), capture_output=True, text=True, check=True)
    assert "resuming" not in again.stderr


def test_the_first_start_of_a_run_resumes_nothing(tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, check=True)
    assert "resuming" not in done.stderr


def test_a_stop_is_noticed_where_the_display_is_a_log(tmp_path: Path) -> None:
    clock, lines = Clock(), list[str]()
    progress = shown(clock, lines)
    stop = StopFlag()
    progress.start([], stop)
    progress.close()
    assert not stop.quiet, "the signal's handler says it itself"
