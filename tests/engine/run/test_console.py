"""The end of every command: one line an error, and the exit code of its kind."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from macpo.engine.console import run_cli, say
from macpo.engine.distributed.agree import pack_error, unpack_error
from macpo.engine.errors import ConfigError, DataError, MacpoError, ResourceError, Stopped
from macpo.engine.files import atomic_open
from macpo.engine.processes import StopFlag, ended_by_sigterm, interrupt, signals_blocked
from macpo.engine.progress import Progress


def test_errors_survive_the_way_between_processes() -> None:
    for error in (ConfigError("a", "b", file="f", line=3, field="x"), ResourceError("c"), Stopped("d", "e")):
        back = unpack_error(json.loads(json.dumps(pack_error(error))))
        assert type(back) is type(error) and str(back) == str(error) and back.code == error.code


def test_run_cli_codes_and_lines(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> Any:
        def command() -> None:
            raise error

        return command

    assert run_cli(lambda: None) == 0
    full = OSError(errno.ENOSPC, "No space left on device", "/tmp/x")
    cases: list[tuple[BaseException, int]] = [(ConfigError("c"), 2), (MacpoError("m"), 1), (full, 4)]
    cases += [(PermissionError(errno.EACCES, "denied", "/x"), 2), (OSError(errno.EROFS, "read-only", "/x"), 2)]
    cases += [(KeyboardInterrupt(), 75), (Stopped("s"), 75), (KeyError("bug"), 1), (FileNotFoundError(2, "gone"), 1)]
    for error, code in cases:
        assert run_cli(fail(error)) == code
        text = capsys.readouterr().err
        assert text.startswith("error: ") and text.count("\n") == 1 and "Traceback" not in text
    assert run_cli(fail(KeyError("two\nlines"))) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert run_cli(fail(KeyError("bug")), debug=True) == 1
    assert "Traceback" in capsys.readouterr().err
    two = ConfigError(problems=[*ConfigError("a").problems, *ConfigError("b").problems])
    assert run_cli(fail(two)) == 2 and capsys.readouterr().err == "error: a.\nerror: b.\n"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    """`macpo status … | head -1` ends quietly."""
    body = "from macpo.engine.console import run_cli; run_cli(lambda: [print(i) for i in range(100000)])"
    command = f"{sys.executable} -c '{body}' | head -1"
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert ended.stdout == "0\n" and ended.stderr == ""


HOSTILE = "key\x1b[2K\rerror: forged\nerror: also forged\u202etxt\x9b\u2028\ud800\x00\u200b"


@pytest.mark.parametrize("place", ["message", "fix", "file", "field", "unexpected", "log"])
def test_whatever_stands_in_an_error_it_is_one_short_line_of_printable_text(
    place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        if place == "log":
            logging.lastResort.handle(logging.makeLogRecord({"msg": HOSTILE * 9999, "levelno": 30}))  # type: ignore
        elif place == "unexpected":
            raise KeyError(HOSTILE * 9999)
        else:
            raise DataError(**{"message": "m", place: HOSTILE * 9999})

    run_cli(command)
    text = capsys.readouterr().err
    assert text.endswith("\n") and text[:-1].isprintable()
    assert len(text) <= (1001 if place == "log" else 501)
    assert "\\x1b[2K\\rerror: forged\\n" in text


def test_a_long_part_does_not_hide_the_others() -> None:
    text = str(DataError("m" * 9000, "do this", file="rows.jsonl", line=7, field="prompt"))
    assert text.startswith("error: rows.jsonl:7: prompt: mmm") and text.endswith("mmm. Fix: do this.")
    assert str(DataError("né 中文 👩\u200d🚀 می\u200cخواهم")) == "error: né 中文 👩\u200d🚀 می\u200cخواهم."


def test_many_problems_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    problems = ConfigError("a").problems * 1000

    def command() -> None:
        raise ConfigError(problems=problems)

    assert run_cli(command) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 101 and lines[-1] == "error: 900 more problems. Fix: mend these first."


def test_progress_lines_and_logs_of_stages_are_printable(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Progress(HOSTILE, "rows", 3) as progress:
        progress.update(1)
    say(HOSTILE)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.isprintable() for line in lines)


# SIGTERM


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)  # Python calls the handler at the next bytecode


def test_sigterm_ends_a_command_with_75_and_leaves_no_half_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As while a summary is written, outside of every `StopFlag`; a second one changes nothing."""

    def command() -> None:
        try:
            with atomic_open(tmp_path / "summary.json") as file:
                file.write(b"half")
                terminate()
        finally:
            terminate()

    assert run_cli(command) == 75
    assert capsys.readouterr().err == "error: stopped by SIGTERM. Fix: run the same command again to go on.\n"
    assert list(tmp_path.iterdir()) == [] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_inside_a_stop_flag_waits_for_the_safe_point() -> None:
    def command() -> None:
        with StopFlag(quiet=True) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested
        terminate()
        raise AssertionError("never here")

    assert run_cli(command) == 75


def test_a_stop_that_a_library_swallowed_is_remembered() -> None:
    with ended_by_sigterm():
        with contextlib.suppress(BaseException):  # as some libraries do around an import
            terminate()
        with StopFlag(quiet=True) as stop:
            assert stop.requested
    with ended_by_sigterm(), StopFlag(quiet=True) as stop:
        assert not stop.requested


def test_a_signal_that_the_process_ignores_stops_nothing() -> None:
    """A script's background job ignores Ctrl-C: that is meant for the script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopFlag(quiet=True) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.requested
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_that_became_another_error_is_a_stop(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    class Field:
        def __set_name__(self, owner: type, name: str) -> None:
            os.kill(os.getpid(), number)

    def command() -> None:
        type("Made", (), {"field": Field()})  # in Python 3.11 what is raised here leaves as a RuntimeError

    assert run_cli(command) == 75
    assert "run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_that_a_library_swallowed_and_made_an_error_of_is_a_stop(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """As matplotlib's C++ code does with any error of an array; the next command is not taken for stopped."""

    def command() -> None:
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), number)
        raise ValueError("Invalid affine transformation matrix")

    assert run_cli(command) == 75
    assert "run the same command again" in capsys.readouterr().err

    def wrong() -> None:
        raise ValueError("of its own")

    with pytest.raises(KeyboardInterrupt):
        interrupt()  # outside any command, as a StopFlag does at a second Ctrl-C
    assert run_cli(wrong) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_a_module_that_makes_code_of_text_ends_with_75(tmp_path: Path) -> None:
    """As dataclasses do while a command imports; under `python -m` the interpreter would end by SIGINT after all."""
    body = """
        import os, signal, sys
        from macpo.engine.console import run_cli
        text = "os.kill(os.getpid(), signal.SIGINT); [None for _ in range(10**6)]"
        sys.exit(run_cli(lambda: exec(text)))
    """
    (tmp_path / "interrupted.py").write_text(textwrap.dedent(body))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "interrupted"],
        env=environment, stderr=subprocess.PIPE, text=True, check=False, timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert done.returncode == 75, done.stderr
    assert "aborted by Ctrl-C" in done.stderr


def test_an_error_that_is_its_own_cause_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        error = ValueError("round and round")
        raise error from error

    assert run_cli(command) == 1
    assert "round and round" in capsys.readouterr().err


def test_a_process_started_with_signals_blocked_responses_them_later() -> None:
    """It gets SIGTERM while it still imports, and has its exit code from `run_cli`."""
    body = "import sys, time; print(flush=True); time.sleep(0.3); from macpo.engine.console import run_cli; "
    body += "sys.exit(run_cli(lambda: time.sleep(10)))"
    with signals_blocked():
        process = subprocess.Popen([sys.executable, "-c", body], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    process.terminate()
    assert process.wait(timeout=20) == 75
    process.communicate()
