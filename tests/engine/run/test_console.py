"""The end of every command: one line an error, and the exit code of its kind."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from typing import Any

import pytest

from macpo.engine.console import run_cli
from macpo.engine.distributed.agree import pack_error, unpack_error
from macpo.engine.errors import ConfigError, MacpoError, ResourceError, Stopped


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
