"""What a run's files are, whatever their paths: the identities that take the place of paths in the keys of stages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from macpo.data.rows import fingerprint
from macpo.data_settings import SourceSettings
from macpo.engine.config import microbatch_tokens
from macpo.engine.data.templates import TEMPLATES
from macpo.engine.errors import ConfigError, MacpoError
from macpo.engine.files import explained
from macpo.engine.model_folders import fingerprint_model
from macpo.engine.run.keys import UNKNOWN, is_unknown
from macpo.method.data_sets import Reader, held_out_source, num_prompts

D = TypeVar("D", bound=SourceSettings)

_IDENTITIES = ("files", "weights", "reference_weights")
"""Settings of stages that map each path to the identity of its content."""
_PLACES = {"path", "test_path", "model", "ready", "reference_model"}
"""Settings of stages that are paths; so are the values of `teachers`."""


def portable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's settings with the identity of its content in the place of each path.

    Settings of this version and of earlier ones' manifests become the same; doing it twice changes nothing.
    """
    known: dict[str, str] = {}
    for block in (settings, settings.get("policy")):
        for name in _IDENTITIES:
            known |= (block.get(name) or {}) if isinstance(block, Mapping) else {}
    found: dict[str, Any] = _without_paths(settings, (), known)
    if settings.get("corpus") is not None:  # the identity of the text file in `init`
        found["init"]["corpus"] = settings["corpus"]
    agent = (found.get("policy") or found).get("agent") or {}
    for block in (found, agent):
        if isinstance(block.get("template"), str):
            block["template"] = template_text(block["template"], must_exist=False)
    return found


def _without_paths(value: Any, at: tuple[str, ...], known: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {
            key: {} if key in _IDENTITIES else _without_paths(child, (*at, key), known) for key, child in value.items()
        }
    if at[-1:] == ("microbatch_tokens",):  # `auto` counts as the default before it: rounding is all that it changes
        return microbatch_tokens(value, "cuda")
    is_place = bool(at) and (at[-1] in _PLACES or at[-2:-1] == ("teachers",)) and "served" not in at
    return known.get(value, value) if is_place and isinstance(value, str) else value


def template_text(template: str, *, must_exist: bool = True) -> str:
    """The text of a template that is a file; a name or a template's own text as it is.

    `must_exist`: whether a missing file is an error; else it is unknown.

    Raises:
        ConfigError: no such file, or no jinja in it.
    """
    if template in ("auto", *TEMPLATES) or "{{" in template or "{%" in template or template.startswith(UNKNOWN):
        return template
    path = Path(template)
    if not path.is_file():
        if must_exist:
            known = ", ".join(["auto", *TEMPLATES])
            raise ConfigError(
                f"no template or file named {template!r}", f"use {known}, or a jinja file", field="template"
            )
        return UNKNOWN + template
    with explained(path):
        raw = path.read_bytes()
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"invalid UTF-8 at byte {error.start}", "save it as UTF-8", file=path) from None
    if "{{" not in text and "{%" not in text:
        raise ConfigError("the template has no jinja in it", "name a jinja file", file=path, field="template")
    return text


@functools.lru_cache(maxsize=16)
def _test_size(settings: str, identity: str, kind: type[SourceSettings], read: Reader) -> int:
    """The number of test prompts of data of this identity."""
    data = kind.model_validate_json(settings)
    source = held_out_source(data)
    enough = data.most_test_prompts * (10 if source is None else 1)
    return data.test_size(num_prompts(data, read, source, enough), apart=source is not None)


class Identities:
    """The identities of the files and folders that a recipe names; each is looked at once.

    Args:
        must_exist: whether what is missing is an error. Else it is noted in `unknown`, and a finished stage counts as
            made from it: `status`, `report` and `export` need neither data nor base models.

    Attributes:
        unknown: the paths that are not here.
    """

    def __init__(self, *, must_exist: bool = True) -> None:
        self.must_exist = must_exist
        self.unknown: list[str] = []
        self._found: dict[tuple[str, str], str] = {}

    def of_data(self, path: str) -> str:
        """The identity of a data file, folder or Hub data set."""
        return self._of("data", path, fingerprint)

    def of_model(self, path: str) -> str:
        """The identity of a model or adapter folder, or a Hub id's."""
        return self._of("model", path, fingerprint_model)

    def sized(self, data: D, read: Reader) -> D:
        """The data block with its number of test prompts, where it leaves that to data which can be read here."""
        if data.path is None or data.test_prompts is not None:
            return data
        identity = self.of_data(data.test_path or data.path)
        if is_unknown(identity):
            return data
        try:
            size = _test_size(data.model_dump_json(), identity, type(data), read)
        except MacpoError:  # the stage that reads it all will say so
            return data
        return data.model_copy(update={"test_prompts": size})

    def template(self, template: str) -> str:
        """The text of a template that is a file; a name stays."""
        found = template_text(template, must_exist=self.must_exist)
        if found.startswith(UNKNOWN) and template not in self.unknown:
            self.unknown.append(template)
        return found

    def _of(self, kind: str, path: str, look: Callable[[str], str]) -> str:
        key = kind, path
        if key not in self._found:
            try:
                self._found[key] = look(path)
            except ConfigError:
                if self.must_exist:
                    raise
                self.unknown.append(path)
                self._found[key] = UNKNOWN + path
        return self._found[key]
