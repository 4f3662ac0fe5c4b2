"""Files that survive a kill, a full disk and unusual text: atomic writes, strict JSON Lines, hashes.

A target keeps either its old content or all of the new: write a temporary file, fsync, rename, fsync the folder.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Self

from safetensors import SafetensorError

from macpo.engine.errors import ConfigError, DataError, MacpoError, NumericsError, ResourceError, one_line
from macpo.engine.faults import point
from macpo.engine.opening import open_regular
from macpo.engine.unpacking import LIMITS, Limits, unpacked

PART = ".part"  # ending of a file that is being written; after a kill it can be deleted

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_GONE_MEMORY = {errno.ENOMEM, errno.EMFILE, errno.ENFILE}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG}


def is_expected(error: OSError) -> bool:
    """Whether the environment is the cause (full disk, no permission, no memory) rather than a bug."""
    return error.errno in _FULL | _GONE_MEMORY | {errno.EACCES, errno.EPERM, errno.EROFS}


def explain(error: OSError, path: str | os.PathLike[str] | None = None, needed_bytes: int | None = None) -> MacpoError:
    """The one-line error for an OSError: a full disk is a ResourceError (4), an unusable path a ConfigError (2)."""
    path = path or error.filename or ""
    where = str(path)
    if error.errno in _FULL:
        needs = f", {needed_bytes:,} bytes needed" if needed_bytes is not None else ""
        free = free_bytes(Path(where)) if where else None
        has = f", {free:,} bytes free" if free is not None else ""
        fix = "free space or raise the quota, then run the same command again"
        return ResourceError(f"no space to write it ({error.strerror}){needs}{has}", fix, file=where)
    if error.errno in _GONE_MEMORY:
        return ResourceError(error.strerror or str(error), "close other programs or lower compute.jobs", file=where)
    if error.errno in _DENIED:
        return ConfigError(error.strerror or str(error), "check the path and its permissions", file=where)
    return ResourceError(f"{error.strerror or error}", "check the disk, then run the same command again", file=where)


@contextlib.contextmanager
def explained(path: str | os.PathLike[str] | None = None, needed_bytes: int | None = None) -> Iterator[None]:
    """Context that turns an OSError, also one wrapped by safetensors, into a MacpoError."""
    try:
        yield
    except OSError as error:
        raise explain(error, path, needed_bytes) from error
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        cause = OSError(int(number[1]), os.strerror(int(number[1])))
        raise explain(cause, path, needed_bytes) from error


def free_bytes(path: Path) -> int | None:
    """Bytes free on the file system of `path` or of its nearest existing parent; None if unknown."""
    for folder in (path, *path.absolute().parents):
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            continue  # does not exist yet: ask its parent
    return None


def require_free(path: Path, needed_bytes: int, what: str) -> None:
    """Raise ResourceError (4) with both numbers if `needed_bytes` do not fit on the file system of `path`."""
    free = free_bytes(path)
    if free is not None and free < needed_bytes:
        fix = "free space or choose another folder"
        raise ResourceError(f"{what} needs {needed_bytes:,} bytes, {free:,} bytes free", fix, file=path)


def fsync_dir(path: Path) -> None:
    """Make renames and new names inside the folder durable."""
    fsync_file(path, os.O_DIRECTORY)


def fsync_file(path: Path, flags: int = 0) -> None:
    """Make the content of a file that other code wrote durable."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Read a whole regular file. Raises: as `open_regular`, with OSErrors explained."""
    with explained(path), open_regular(path) as file:
        return file.read()


@contextlib.contextmanager
def atomic_open(path: str | os.PathLike[str], needed_bytes: int | None = None) -> Iterator[IO[bytes]]:
    """A binary file that replaces `path` if the block succeeds; else the old file stays and no temporary is left.

    `needed_bytes`: the final size if it is known, for the message about a full disk.

    Raises: ResourceError on a full disk, ConfigError if the path cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    try:
        with open(part, "wb") as file:
            point("file-created")
            yield file
            file.flush()
            point("file-written")
            os.fsync(file.fileno())
        point("file-synced")
        os.replace(part, path)
        point("file-renamed")
        fsync_dir(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the first error is the one to report
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise explain(error, path, needed_bytes) from error
        raise


def atomic_write(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Replace the file's content atomically; text is written as UTF-8, newlines unchanged."""
    raw = _utf8(data, str(path)) if isinstance(data, str) else data
    with atomic_open(path, len(raw)) as file:
        file.write(raw)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write one JSON value atomically, indented, with keys in the given order."""
    atomic_write(path, _dumps(value, str(path), None, indent=2) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read one JSON value. Raises: ConfigError for an unreadable file, DataError with line and column for bad JSON."""
    path = Path(path)
    try:
        return json.loads(read_bytes(path).decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        problem = f"invalid JSON at column {error.colno}: {error.msg}"
        raise DataError(problem, "repair the file", file=path, line=error.lineno) from None
    except UnicodeDecodeError as error:
        raise DataError(f"invalid UTF-8 at byte {error.start}", "save it as UTF-8", file=path) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, absurd nesting
        raise DataError(f"unusable JSON: {error}", "repair the file", file=path) from None


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object per line atomically, in UTF-8 with `\\n`, with reproducible gzip if the name ends in .gz.

    Returns: the number of rows. Raises: NumericsError for NaN or infinity, DataError for a lone surrogate.
    """
    count = 0
    with atomic_open(path) as file:
        packed = gzip.GzipFile("", "wb", 6, file, mtime=0) if str(path).endswith(".gz") else None
        for count, row in enumerate(rows, 1):
            (packed or file).write(_utf8(_dumps(row, str(path), count), str(path), count) + b"\n")
        if packed:
            packed.close()
    return count


def read_jsonl(path: str | os.PathLike[str], limits: Limits = LIMITS) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object). Lines end at `\\n` only, so U+2028, NEL and CR inside text are harmless.

    A BOM, CRLF ends, empty lines and gzip are accepted. Byte offsets count from the start of the (unpacked) file.
    Raises: ConfigError if the file cannot be opened; DataError with the line and column or byte offset for bad JSON,
    a truncated last line, a row that is not an object, invalid UTF-8, a lone surrogate, NaN, and for a line, blank
    lines or an unpacked size beyond the limits.
    """
    name = str(path)
    with explained(name), open_regular(path) as plain:
        stream = unpacked(plain, limits)
        start, number, blank = 0, 0, 0
        while True:
            try:
                line = stream.readline(limits.row_bytes + 1)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                fix = "fetch or pack it again"
                raise DataError(f"damaged gzip: {error}", fix, file=name, line=number + 1) from None
            except DataError as error:
                raise DataError(problems=[replace(error.problems[0], line=number + 1)]) from None
            if not line:
                return
            number += 1
            if len(line) > limits.row_bytes:
                fix = "write one JSON object a line, and shorter ones"
                raise DataError(f"the line is longer than {limits.row_bytes:,} bytes", fix, file=name, line=number)
            skip = 3 if number == 1 and line.startswith(codecs.BOM_UTF8) else 0
            if line[skip:].strip(b" \t\r\n"):
                yield number, _parse_line(line[skip:], name, number, start + skip)
                blank = 0
            elif (blank := blank + 1) > limits.blank_lines:
                raise DataError(f"{blank:,} blank lines in succession", "remove them", file=name, line=number)
            start += len(line)


def _parse_line(raw: bytes, name: str, number: int, start: int) -> dict[str, Any]:
    def fail(problem: str, fix: str) -> DataError:
        return DataError(problem, fix, file=name, line=number)

    try:
        text = raw.decode()
        row = _DECODER.decode(text)
    except UnicodeDecodeError as error:
        offset = start + error.start
        raise fail(f"invalid UTF-8 at byte {offset} of the file", "save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        if not raw.endswith(b"\n"):
            why = f"the last line is truncated at column {len(text) + 1}"
            raise fail(why, "fetch the file again or delete that line") from None
        raise fail(f"invalid JSON at column {error.colno}: {error.msg}", "write one JSON object a line") from None
    except (ValueError, RecursionError) as error:  # NaN, a number of thousands of digits, absurd nesting
        raise fail(f"unusable JSON: {one_line(error, 100)}", "write finite numbers and plain objects") from None
    if not isinstance(row, dict):
        raise fail(f"the row is {_kind(row)}, not an object", 'write {"field": value, …} on every line')
    if b"\\u" in raw and (at := _lone_surrogate(raw)) is not None:
        raise fail(f"lone surrogate {raw[at : at + 6].decode()} at byte {start + at} of the file", "remove or pair it")
    return row


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number")


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)  # made once: `json.loads` would make one a line

_ESCAPE = re.compile(rb"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)


def _lone_surrogate(raw: bytes) -> int | None:
    """Byte position of the first `\\uD8xx` … `\\uDFxx` escape without its partner."""
    high: int | None = None
    for match in _ESCAPE.finditer(raw):
        code = int(match[1], 16) if match[1] else 0
        if high is not None:
            if 0xDC00 <= code < 0xE000 and match.start() == high + 6:
                high = None
                continue
            return high
        if 0xDC00 <= code < 0xE000:
            return match.start()
        high = match.start() if 0xD800 <= code < 0xDC00 else None
    return high


# Made once: `json.dumps` would make one a row.
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False)


def _dumps(value: Any, name: str, line: int | None, indent: int | None = None) -> str:
    try:
        if indent is None:
            return _ENCODER.encode(value)
        return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    except ValueError as error:
        fix = "find the step that made it"
        raise NumericsError(f"a value is not a finite number ({error})", fix, file=name, line=line) from None


def _utf8(text: str, name: str, line: int | None = None) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        problem = f"lone surrogate U+{ord(text[error.start]):04X} in the text"
        raise DataError(problem, "remove it", file=name, line=line) from None


class Appender:
    """An append-only JSON Lines file: rows are durable when `add` returns; opening cuts a tail torn by a kill.

    `rows` are those found on opening, so a stage knows which ids it has and continues with the others.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with explained(self.path):
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 - lives as long as the object
            fsync_dir(self.path.parent)
            self._file.seek(0)
            self._file.truncate(_whole_lines(self._file))
        self.rows: list[dict[str, Any]] = [row for _, row in read_jsonl(self.path)]

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        name = str(self.path)
        raw = b"".join(_utf8(_dumps(row, name, None), name) + b"\n" for row in rows)
        half = len(raw) // 2
        start = os.fstat(self._file.fileno()).st_size
        try:
            _write_all(self._file, raw[:half])
            point("append-torn")
            _write_all(self._file, raw[half:])
            point("append-written")
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(start)
            raise explain(error, self.path, len(raw)) from error
        point("append-synced")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _write_all(file: io.FileIO | IO[bytes], raw: bytes) -> None:
    view = memoryview(raw)
    while view:
        view = view[file.write(view) :]


def _whole_lines(file: IO[bytes]) -> int:
    """Length up to and including the last `\\n`."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 65536)
        file.seek(start)
        at = file.read(end - start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of the file's content."""
    with explained(path), open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def probe_writable(folder: str | os.PathLike[str]) -> None:
    """Create the folder and write, sync and delete a file in it, so that an unusable folder fails before any work.

    Raises: ConfigError (2) if that is impossible, ResourceError (4) on a full disk.
    """
    folder = Path(folder)
    probe = folder / f".probe.{os.getpid()}{PART}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(probe, "wb") as file:
            file.write(b"macpo\n" * 512)
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as error:
        if error.errno in _FULL:
            raise explain(error, folder, 3072) from error
        fix = "choose a folder that can be written"
        raise ConfigError(f"cannot write into the output folder: {error.strerror}", fix, file=folder) from error
