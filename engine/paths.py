"""Paths that people write, resolved once: `~` and relative paths become absolute where a recipe is read.

    class Block(Settings):
        output: LocalPath
        model: HubPath

A relative path is relative to the working folder, or to `base` in pydantic's validation context. What is stored, shown
and handed to stages is the absolute path, so that it means the same from every working folder.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, ValidationInfo

from macpo.engine.errors import ConfigError, beginning

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_FILE_ENDINGS = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt", ".gz", ".jinja", ".safetensors", ".yaml")
_NAME_BYTES, _PATH_BYTES = 255, 4095
FIX = " Fix: "  # what separates problem and remedy in a ValueError of a setting


def absolute(text: str, base: Path | None = None) -> str:
    """The absolute path of `text`, which need not exist: `~` expanded, relative to `base` (default: working folder).

    Links are kept as they are written, except where `..` has to be resolved.

    Raises:
        ValueError: a URL, an empty path, a NUL byte, a name longer than any, or `~` of an unknown user; ends with
            ` Fix: remedy`.
    """
    if _URL.match(text):
        raise ValueError(f"got {_shown(text)}, a URL in the place of a path{FIX}{_instead_of_url(text)}")
    if not text.strip():
        raise ValueError(f"got an empty path{FIX}write the path, or leave the setting out")
    if "\0" in text:
        raise ValueError(f"got {_shown(text)}, and no path has a NUL byte{FIX}remove it")
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"got {_shown(text)}, and that user has no home folder here{FIX}write the path out") from None
    path = (base or Path.cwd()) / path
    if _is_too_long(path):
        raise ValueError(f"got {_shown(text)}, longer than any path{FIX}write the path of a file, or a known name")
    return str(path.resolve() if ".." in path.parts else path)


def absolute_or_hub(text: str, base: Path | None = None) -> str:
    """The absolute path of what exists at `text`; a name that nothing here has and the Hub could have stays as it is.

    Raises:
        ValueError: as `absolute` does.
    """
    found = absolute(text, base)
    could_be_hub = _HUB_ID.fullmatch(text) and not text.endswith(_FILE_ENDINGS)
    return text if could_be_hub and not os.path.exists(found) else found


def expanded(path: str | Path) -> Path:
    """The path with `~` expanded, outside of recipes. Raises ConfigError for `~` of nobody, or a long name."""
    try:
        found = Path(path).expanduser()
    except RuntimeError:
        problem = f"got {_shown(str(path))}, and that user has no home folder here"
        raise ConfigError(problem, "write the path out") from None
    if _is_too_long(found):
        raise ConfigError(f"got {_shown(str(path))}, longer than any path", "write the path of a file or folder")
    return found


def _is_too_long(path: Path) -> bool:
    """Whether systems refuse to look for the path at all."""
    sizes = [len(part.encode(errors="replace")) for part in path.parts]
    return max(sizes, default=0) > _NAME_BYTES or sum(sizes) + len(sizes) > _PATH_BYTES


def _shown(text: str) -> str:
    return beginning(ascii(text), 80)


def _instead_of_url(text: str) -> str:
    scheme = text.partition(":")[0].lower()
    if scheme == "file":
        return f"write {_shown(unquote(urlsplit(text).path) or '/the/path')}"
    if scheme == "hf":
        return "write the Hub id, owner/name"
    return "download it and give its path, or name a Hub id, owner/name"


def relative_to(info: ValidationInfo) -> Path | None:
    """The folder that relative paths of a validated setting are relative to; None is the working folder."""
    found = (info.context or {}).get("base")
    return found if isinstance(found, Path) else None


def _local(text: str, info: ValidationInfo) -> str:
    return absolute(text, relative_to(info))


def _hub(text: str, info: ValidationInfo) -> str:
    return absolute_or_hub(text, relative_to(info))


def _optional_hub(text: str, info: ValidationInfo) -> str:
    return absolute_or_hub(text, relative_to(info)) if text else text


LocalPath = Annotated[str, AfterValidator(_local)]
"""A setting that is a path of this machine; it becomes absolute."""
HubPath = Annotated[str, AfterValidator(_hub)]
"""A setting that is a path of this machine, which becomes absolute, or a Hub id, which stays."""
OptionalHubPath = Annotated[str, AfterValidator(_optional_hub)]
"""`HubPath`, in which empty text means none."""


def argument(text: str) -> Path:
    """A path of the command line with `~` expanded, for argparse's `type`.

    Raises:
        argparse.ArgumentTypeError: as `absolute` raises ValueError.
    """
    try:
        absolute(text)
    except ValueError as error:
        problem, _, fix = str(error).partition(FIX)
        raise argparse.ArgumentTypeError(f"{problem}; {fix}") from None
    return Path(text).expanduser()
