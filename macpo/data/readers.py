"""Files of rows: JSON Lines, JSON, CSV, TSV (all also gzipped), Parquet, and folders of `save_to_disk`.

Every reader holds a few rows at a time and gives up, with file and line or row group, on a file that would unpack to
implausibly much (macpo/engine/unpacking.py).
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from macpo.data.json_rows import json_rows, wrapped_rows
from macpo.engine.errors import ConfigError, DataError, MacpoError, one_line
from macpo.engine.files import explained, read_jsonl
from macpo.engine.opening import open_regular
from macpo.engine.unpacking import LIMITS, Limits, unpacked

Fields = dict[str, Any]

BATCH_ROWS = 64
"""Rows of Parquet or Arrow that are decoded at once."""
PLAIN_RATIO = 20
"""A Parquet column that unpacks to more times its size is decoded row by row: one value may fill the memory."""
_CHUNK_BYTES = 2**20
DELIMITERS = {".csv": ",", ".tsv": "\t"}


def file_rows(file: Path, split: str, limits: Limits = LIMITS) -> Iterator[tuple[int, Fields]]:
    """Yield (number, fields) of every row; the number is the line of JSON Lines and CSV, else counts rows from 1.

    `split` is the name under which a JSON object may hold the rows. Raises DataError for bad content, with the line.
    """
    if file.is_dir():
        return _saved_rows(file)
    suffix = Path(file.name.removesuffix(".gz")).suffix
    if suffix == ".parquet":
        return _parquet_rows(file, limits)
    if suffix in DELIMITERS:
        return _cell_rows(file, DELIMITERS[suffix], limits)
    return _json_file(file, split, limits) if suffix == ".json" else read_jsonl(file, limits)


@contextlib.contextmanager
def opened(file: Path, limits: Limits) -> Iterator[IO[bytes]]:
    """Open a file, unpacked where it is gzip; damaged gzip is a DataError."""
    with explained(file), open_regular(file) as plain:
        try:
            yield unpacked(plain, limits)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"damaged gzip: {error}", "fetch or pack it again", file=file) from None


def _json_file(file: Path, split: str, limits: Limits) -> Iterator[tuple[int, Fields]]:
    """Yield the rows of a JSON list, of a list below a key of a JSON object, or of one object a line."""
    with opened(file, limits) as stream:
        rows = json_rows(stream, str(file), limits)
        if rows is not None:
            yield from rows
            return
    with opened(file, limits) as stream:
        key = wrapped_rows(stream, str(file), split, limits)
    if key is None:
        yield from read_jsonl(file, limits)
        return
    with opened(file, limits) as stream:
        yield from json_rows(stream, str(file), limits, key) or ()


def _cell_rows(file: Path, delimiter: str, limits: Limits) -> Iterator[tuple[int, Fields]]:
    """Yield the rows of a CSV or TSV file with a header; every cell is text."""
    csv.field_size_limit(limits.row_bytes)
    with opened(file, limits) as stream:
        reader = csv.reader(_lines(stream, file, limits), delimiter=delimiter, strict=True)
        header: list[str] = []
        line = 1
        try:
            for cells in reader:
                line, begins = reader.line_num + 1, line
                if not cells:
                    continue
                if not header:
                    header = cells
                    if len(set(header)) < len(header):
                        problem = f"two columns have one name: {one_line(', '.join(header), 100)}"
                        raise DataError(problem, "name the columns in the first line", file=file, line=begins)
                    continue
                if len(cells) != len(header):
                    problem = f"{len(cells)} cells, and the first line names {len(header)} columns"
                    fix = "put cells that hold the delimiter, quotes or line ends in double quotes"
                    raise DataError(problem, fix, file=file, line=begins)
                yield begins, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            fix = "put cells that hold the delimiter, quotes or line ends in double quotes"
            raise DataError(f"not readable as CSV: {error}", fix, file=file, line=line) from None


def _lines(stream: IO[bytes], file: Path, limits: Limits) -> Iterator[str]:
    """Yield the lines of a CSV file with their ends, each of bounded length; a byte order mark is left out."""
    blank = 0
    number = 0
    while line := _read(lambda: stream.readline(limits.row_bytes + 1), number + 1):
        number += 1
        if len(line) > limits.row_bytes:
            problem = f"the line is longer than {limits.row_bytes:,} bytes"
            raise DataError(problem, "write one row a line", file=file, line=number)
        blank = 0 if line.strip() else blank + 1
        if blank > limits.blank_lines:
            raise DataError(f"{blank:,} blank lines in succession", "remove them", file=file, line=number)
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            problem = f"invalid UTF-8 at byte {error.start} of the line"
            raise DataError(problem, "save the file as UTF-8", file=file, line=number) from None


def _read(read: Callable[[], bytes], line: int) -> bytes:
    """Read on; what is wrong with the packed file is said of this line."""
    try:
        return read()
    except DataError as error:
        raise DataError(problems=[replace(error.problems[0], line=line)]) from None


def _parquet_rows(file: Path, limits: Limits) -> Iterator[tuple[int, Fields]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as problem:
        raise ConfigError("Parquet needs pyarrow", "pip install datasets", file=file) from problem
    limit = limits.unpacked(file.stat().st_size)
    number = decoded = 0
    try:
        with ParquetFile(file) as table:
            for group in range(table.metadata.num_row_groups):
                about = table.metadata.row_group(group)
                next(table.iter_batches(1, row_groups=[group]), None)  # broken metadata ends the process in `column`
                columns = [about.column(i) for i in range(about.num_columns)]
                dense = any(
                    c.total_uncompressed_size > max(_CHUNK_BYTES, PLAIN_RATIO * c.total_compressed_size)
                    for c in columns
                )
                if decoded + about.total_byte_size > limit:
                    raise _too_much(file, group, limit)
                for batch in table.iter_batches(1 if dense else BATCH_ROWS, row_groups=[group]):
                    decoded += batch.nbytes
                    if decoded > limit:
                        raise _too_much(file, group, limit)
                    for fields in batch.to_pylist():
                        number += 1
                        yield number, fields
    except MacpoError:
        raise
    except (ArrowException, OSError, ValueError, TypeError, ArithmeticError, RecursionError) as problem:
        said = one_line(problem, 150)
        raise DataError(f"not a readable Parquet file: {said}", "fetch it again", file=file) from problem


def _too_much(file: Path, group: int, limit: int) -> DataError:
    problem = f"row group {group} brings the file to more than {limit:,} bytes, implausibly many for its size"
    return DataError(
        problem, "look into the file; if it is data, give it as JSON Lines or raise data.limits", file=file
    )


def _saved_rows(folder: Path) -> Iterator[tuple[int, Fields]]:
    """Yield the rows of a folder that `Dataset.save_to_disk` wrote, in the order that its state says."""
    try:
        from datasets import load_from_disk
    except ImportError as problem:
        raise ConfigError("a saved data set needs `datasets`", "pip install datasets", file=folder) from problem
    try:
        table = load_from_disk(str(folder))
        batches = table.with_format(None).iter(batch_size=BATCH_ROWS)
        number = 0
        for columns in batches:
            for values in zip(*columns.values(), strict=True):
                number += 1
                yield number, dict(zip(columns, values, strict=True))
    except Exception as problem:  # datasets and pyarrow raise types of their own
        said = one_line(problem, 150)
        fix = "save it again with Dataset.save_to_disk, or give it as Parquet"
        raise DataError(f"not a readable saved data set: {said}", fix, file=folder) from problem
