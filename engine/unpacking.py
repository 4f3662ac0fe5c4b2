"""Gzip that cannot fill the memory or never end: what a small file may hold, and how long its lines may be."""

from __future__ import annotations

import gzip
import io
import os
from typing import IO, Any

from macpo.engine.errors import DataError

MAX_LINE_BYTES = 64 * 2**20
"""Longest line of a JSON Lines file, and longest row of any other file of data."""
MAX_BLANK_LINES = 1_000_000
"""Most lines without a row in succession."""
UNPACKED_BYTES, UNPACKED_RATIO = 256 * 2**20, 100
"""A packed file may always hold so many bytes, and beyond that so many times its own size; text packs 2 to 20 times."""


def unpacked(file: IO[bytes]) -> IO[bytes]:
    """Return a file's bytes, unpacked where it is gzip; reading raises DataError beyond the limits above."""
    magic = file.read(2)
    file.seek(0)
    return io.BufferedReader(_Unpacked(file), 2**18) if magic == b"\x1f\x8b" else file


class _Unpacked(io.RawIOBase):
    """The content of a gzip file up to a plausible size."""

    def __init__(self, file: IO[bytes]) -> None:
        self._stream, self._name = gzip.GzipFile(fileobj=file, mode="rb"), file.name
        self._left = self._limit = max(UNPACKED_BYTES, UNPACKED_RATIO * os.fstat(file.fileno()).st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        self._left -= count
        if self._left < 0:
            problem = f"the packed file holds more than {self._limit:,} bytes, implausibly many for its size"
            raise DataError(problem, "unpack it and look; if it is data, give the unpacked file", file=self._name)
        return count
