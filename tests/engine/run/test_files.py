"""Files: atomic writes, strict JSON Lines, append-only logs, full disk (faults 6, 12, 13, 26, 27, 36)."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from macpo.engine import faults, files, removal
from macpo.engine.errors import ConfigError, DataError, IntegrityError, MacpoError, NumericsError, ResourceError

ROOT = Path(__file__).resolve().parents[3]


def rows(path: Path) -> list[tuple[int, dict]]:
    return list(files.read_jsonl(path))


def write(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


def child(code: str, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )


def test_atomic_write_keeps_the_old_file_when_the_writer_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.atomic_write(path, "old")
    with pytest.raises(RuntimeError), files.atomic_open(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("where", ["file-created", "file-written", "file-synced", "file-renamed"])
def test_a_kill_leaves_all_of_the_old_or_all_of_the_new(tmp_path: Path, where: str) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"v": "old"})
    code = "import sys; from macpo.engine import files; files.write_json(sys.argv[1], {'v': 'new'})"
    assert child(code, path, MACPO_KILL_AT=where).returncode == -9
    assert files.read_json(path) == {"v": "new" if where == "file-renamed" else "old"}
    removal.remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_is_error_4_with_both_numbers_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    code = (
        "import resource, sys; from macpo.engine import files; from macpo.engine.errors import MacpoError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: files.atomic_write(sys.argv[1], b'x' * 100000)\n"
        "except MacpoError as e: print(e); sys.exit(e.code)"
    )
    done = child(code, path)
    assert done.returncode == 4, done.stderr
    assert "100,000 bytes needed" in done.stdout and "bytes free" in done.stdout
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_full_disk_cuts_an_append_back_to_whole_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    code = (
        "import resource, sys; from macpo.engine import files; from macpo.engine.errors import MacpoError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "log = files.Appender(sys.argv[1]); log.add([{'id': 0}])\n"
        "try: log.add([{'id': i} for i in range(2000)])\n"
        "except MacpoError as e: sys.exit(e.code)"
    )
    assert child(code, path).returncode == 4
    assert path.read_text() == '{"id": 0}\n'


def test_probe_writable(tmp_path: Path) -> None:
    files.probe_writable(tmp_path / "new" / "deep")
    assert list((tmp_path / "new" / "deep").iterdir()) == []
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/macpo-run")):
        with pytest.raises(ConfigError, match="cannot write"):
            files.probe_writable(bad)


def test_require_free_names_needed_and_free(tmp_path: Path) -> None:
    files.require_free(tmp_path / "not" / "yet", 1, "a checkpoint")
    with pytest.raises(ResourceError, match=r"a checkpoint needs 1,152,921,504,606,846,976 bytes, [\d,]+ bytes free"):
        files.require_free(tmp_path, 1 << 60, "a checkpoint")


def test_jsonl_splits_on_newline_only_and_takes_bom_crlf_and_empty_lines(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\x85d\x0be\rf"
    raw = b"\xef\xbb\xbf" + json.dumps({"t": text}, ensure_ascii=False).encode() + b"\r\n\r\n" + b'{"t": 1}'
    assert rows(write(tmp_path / "a.jsonl", raw)) == [(1, {"t": text}), (3, {"t": 1})]


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        (b'{"a": }\n{"a": 1}\n', r"a.jsonl:2: invalid JSON at column 7"),
        (b'{"a": 1', r"a.jsonl:2: the last line is truncated at column 8"),
        (b"[1]\n", r":2: the row is a list, not an object"),
        (b'{"a": NaN}\n', r":2: unusable JSON: NaN"),
        (b'{"a": ' + b"[" * 100000 + b"\n", r":2: unusable JSON"),
        (b'{"a": "\xff"}\n', r":2: invalid UTF-8 at byte 20 of the file"),
        (b'{"a": "\xed\xa0\x80"}\n', r":2: invalid UTF-8 at byte 20 of the file"),
        (rb'{"a": "\ud800"}' + b"\n", r":2: lone surrogate \\ud800 at byte 20 of the file"),
        (rb'{"a": "\udc00\ud800"}' + b"\n", r":2: lone surrogate \\udc00 at byte 20"),
        (rb'{"a": "\ud83d\ude00 \ud83d x"}' + b"\n", r":2: lone surrogate \\ud83d at byte 33"),
    ],
)
def test_jsonl_names_the_line_and_the_place(tmp_path: Path, tail: bytes, message: str) -> None:
    path = write(tmp_path / "a.jsonl", b'{"ok": true}\n' + tail)
    with pytest.raises(DataError, match=message):
        rows(path)


def test_an_escaped_backslash_is_not_a_surrogate(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rb'{"a": "\\ud800", "b": "\ud83d\ude00"}')
    assert rows(path) == [(1, {"a": "\\ud800", "b": "😀"})]


def test_gzip_is_read_by_content_and_written_reproducibly(tmp_path: Path) -> None:
    data = [{"i": i} for i in range(100)]
    assert files.write_jsonl(tmp_path / "a.jsonl.gz", data) == 100
    files.write_jsonl(tmp_path / "b.jsonl.gz", data)
    raw = (tmp_path / "a.jsonl.gz").read_bytes()
    assert raw == (tmp_path / "b.jsonl.gz").read_bytes()
    assert gzip.decompress(raw).count(b"\n") == 100
    assert [row for _, row in files.read_jsonl(write(tmp_path / "c", raw))] == data
    for bad in (raw[:-9], raw[:40], raw[:2] + b"zzzz"):
        with pytest.raises(DataError, match="damaged gzip"):
            rows(write(tmp_path / "d", bad))


def test_missing_file_and_folder_are_config_errors(tmp_path: Path) -> None:
    for bad in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(ConfigError):
            rows(bad)
        with pytest.raises(ConfigError):
            files.read_json(bad)


def test_read_json_names_line_and_column(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.json:2: invalid JSON at column 1"):
        files.read_json(write(tmp_path / "a.json", b"{\n"))


def test_written_rows_must_be_finite_and_encodable(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    files.write_jsonl(path, [{"a": 1}])
    with pytest.raises(NumericsError, match=r"a.jsonl:2"):
        files.write_jsonl(path, [{"a": 1}, {"a": float("nan")}])
    with pytest.raises(DataError, match=r"U\+D800"):
        files.write_jsonl(path, [{"a": "\ud800"}])
    assert rows(path) == [(1, {"a": 1})]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.text(), JSON, max_size=3), max_size=4))
def test_any_rows_come_back(tmp_path_factory: pytest.TempPathFactory, data: list[dict]) -> None:
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    files.write_jsonl(path, data)
    assert [row for _, row in files.read_jsonl(path)] == data


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_give_rows_or_a_data_error(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = write(tmp_path_factory.mktemp("bytes") / "a.jsonl", b'{"a": "' + raw)
    try:
        assert all(isinstance(row, dict) for _, row in files.read_jsonl(path))
    except DataError as error:
        assert error.problems[0].line


@pytest.mark.parametrize("where", ["append-torn:2", "append-written:2", "append-synced:2"])
def test_a_killed_append_goes_on_to_the_same_file(tmp_path: Path, where: str) -> None:
    code = (
        "import sys; from macpo.engine.files import Appender\n"
        "log = Appender(sys.argv[1]); have = {r['id'] for r in log.rows}\n"
        "for i in range(4):\n"
        "    if i not in have: log.add([{'id': i, 'text': 'ü' * 50}])"
    )
    clean, killed = tmp_path / "clean.jsonl", tmp_path / "killed.jsonl"
    assert child(code, clean).returncode == 0
    assert child(code, killed, MACPO_KILL_AT=where).returncode == -9
    assert killed.read_bytes() != clean.read_bytes()
    assert child(code, killed).returncode == 0
    assert killed.read_bytes() == clean.read_bytes()


def test_a_torn_tail_longer_than_a_block_is_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"id": 1}\n' + b'{"id": "' + b"x" * 200_000)
    with files.Appender(path) as log:
        assert log.rows == [{"id": 1}]
    path = write(tmp_path / "b.jsonl", b"x" * 70_000)
    with files.Appender(path) as log:
        assert log.rows == [] and path.read_bytes() == b""


def test_delete_stays_inside_and_follows_no_link(tmp_path: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    (run / "stage").mkdir(parents=True)
    outside.mkdir()
    (outside / "precious").write_text("x")
    (run / "link").symlink_to(outside)
    (run / "stage" / "link").symlink_to(outside)
    removal.remove(run / "stage", run)
    removal.remove(run / "link", run)
    assert (outside / "precious").exists() and list(run.iterdir()) == []
    (run / "link").symlink_to(outside)
    for bad in (outside, run, run / ".." / "outside", run / "link" / "precious"):
        with pytest.raises(IntegrityError, match="refuses"):
            removal.remove(bad, run)
    assert (outside / "precious").exists()


def test_oserrors_map_to_exit_codes(tmp_path: Path) -> None:
    import errno

    for number, code in ((errno.ENOSPC, 4), (errno.EDQUOT, 4), (errno.EFBIG, 4), (errno.EACCES, 2), (errno.EROFS, 2)):
        error: MacpoError = files.explain(OSError(number, os.strerror(number), str(tmp_path / "x")))
        assert error.code == code and "Fix:" in str(error)


def test_every_fault_point_in_the_code_is_documented_and_the_hook_refuses_typos(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import re

    used = set()
    for source in (ROOT / "engine").rglob("*.py"):
        used |= set(re.findall(r'\bpoint\("([a-z-]+)"\)', source.read_text()))
    assert used <= set(faults.POINTS)
    with pytest.raises(KeyError):
        faults.point("no-such-point")
    monkeypatch.setenv("MACPO_KILL_AT", "no-such-point")
    with pytest.raises(ValueError, match="file-created"):
        faults.point("file-created")
