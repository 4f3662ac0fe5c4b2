"""`macpo annotate`: people judge pairs of a run's responses, blind, on a page of their own machine."""

from __future__ import annotations

import argparse
import getpass
from typing import Any

from macpo.annotation.design import Pair
from macpo.annotation.exchange import FORMATS, LABELLING, export, import_label_studio
from macpo.annotation.judgements import NAME, Session
from macpo.annotation.results import table, write_result
from macpo.annotation.server import serve
from macpo.annotation.study import begin, open_study
from macpo.engine.console import say
from macpo.engine.errors import ConfigError
from macpo.engine.paths import expanded

DESIGN = ("pairs", "prompts", "annotators", "overlap", "repeats", "gold_checks", "seed")
"""Options that make the study; they are fixed when it is begun."""


def annotate(arguments: argparse.Namespace) -> None:
    """Show the page, or count (`--report`), export or import judgements.

    Raises:
        ConfigError (2), DataError (3), IntegrityError (5): see macpo/annotation/.
        Stopped (75): the person stopped before the end; the same command resumes.
    """
    given = {name: getattr(arguments, name) for name in DESIGN if getattr(arguments, name) is not None}
    if "pairs" in given:
        given["pairs"] = pairs_of(given["pairs"])
    asked = [name for name in ("report", "export_to", "import_from") if getattr(arguments, name)]
    if not asked:
        study = begin(arguments.run, given)
        say(study.extent())
        with Session(study, arguments.annotator or _login()) as session:
            serve(session, arguments.port or 0)
        return
    refused = ["annotator", "port"] + ([] if asked == ["export_to"] else list(DESIGN))
    for name in refused:
        if getattr(arguments, name) is not None:
            option, other = "--" + name.replace("_", "-"), "--" + asked[0].partition("_")[0]
            raise ConfigError(f"{option} does not go with {other}", "leave it out", field=option)
    if asked == ["export_to"]:
        _export(begin(arguments.run, given), *arguments.export_to)
    elif asked == ["import_from"]:
        for name, count in import_label_studio(open_study(arguments.run), expanded(arguments.import_from)).items():
            say(f"imported: {count} judgements as {name}", error=False)
    else:
        path, found = write_result(open_study(arguments.run))
        for line in table(found).splitlines():
            say(line, error=False)
        say(f"\nresult: {path}".strip(), error=False)


def _export(study: Any, form: str, path: str) -> None:
    if form not in FORMATS:
        raise ConfigError(f"got {form!r}", f"use {' or '.join(FORMATS)}", field="--export")
    count = export(study, form, expanded(path))
    say(f"exported: {count} pairs to {path}", error=False)
    if form == "label-studio":
        print(f"the project's labelling interface:\n{LABELLING}", end="")


def pairs_of(text: str) -> list[Pair]:
    """Return the pairs of "student@3:student@0,ceiling:student@3". Raises ConfigError for another form."""
    found = []
    for each in text.split(","):
        first, colon, second = each.strip().partition(":")
        if not (first and colon and second) or ":" in second:
            raise ConfigError(f"got {each!r}", "write two policies like student@3:student@0", field="--pairs")
        found.append((first.strip(), second.strip()))
    return found


def _login() -> str:
    """The name of the person's account, where it can be a file's name."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):
        name = ""
    return name if NAME.fullmatch(name) else "annotator"
