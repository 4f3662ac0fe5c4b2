"""Gzip that cannot fill the memory or never end: what a small file may hold, and how long its rows may be."""

from __future__ import annotations

import gzip
import io
import os
from typing import IO, Any, NamedTuple

from macpo.engine.errors import DataError


class Limits(NamedTuple):
    """What a file of rows may ask for; the `data.limits` of a recipe."""

    row_bytes: int = 64 * 2**20
    """Longest line of a JSON Lines file, and longest row of any other file."""
    blank_lines: int = 1_000_000
    """Most lines without a row in succession."""
    unpacked_bytes: int = 256 * 2**20
    """A packed file may always hold so many bytes, ..."""
    unpacked_ratio: int = 100
    """... and beyond that so many times its own size; text packs 2 to 20 times."""

    def unpacked(self, packed_bytes: int) -> int:
        """Return the bytes that a file of so many packed ones may hold."""
        return max(self.unpacked_bytes, self.unpacked_ratio * packed_bytes)


LIMITS = Limits()


def unpacked(file: IO[bytes], limits: Limits = LIMITS) -> IO[bytes]:
    """Return a file's bytes, unpacked where it is gzip; reading raises DataError beyond the limits."""
    magic = file.read(2)
    file.seek(0)
    return io.BufferedReader(_Unpacked(file, limits), 2**18) if magic == b"\x1f\x8b" else file


class _Unpacked(io.RawIOBase):
    """The content of a gzip file up to a plausible size."""

    def __init__(self, file: IO[bytes], limits: Limits) -> None:
        self._stream, self._name = gzip.GzipFile(fileobj=file, mode="rb"), file.name
        self._left = self._limit = limits.unpacked(os.fstat(file.fileno()).st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        self._left -= count
        if self._left < 0:
            problem = f"the packed file holds more than {self._limit:,} bytes, implausibly many for its size"
            raise DataError(
                problem,
                "unpack it and look; if it is data, give the unpacked file or raise data.limits",
                file=self._name,
            )
        return count
