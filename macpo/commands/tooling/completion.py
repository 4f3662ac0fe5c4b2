"""`macpo completion SHELL`: the shell's own completion of commands, options, files and recipes' names, by shtab."""

from __future__ import annotations

import argparse
from typing import Any

from macpo import bundled
from macpo.engine.errors import ConfigError
from macpo.engine.paths import argument as path_argument

_BASH = """
_macpo_recipes() {{
  compgen -W "{names}" -- "$1"
  compgen -f -- "$1"
}}
"""
_ZSH = """
_macpo_recipes() {{
  compadd {names}
  _files
}}
"""


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script to be read by `bash` or `zsh`. Raises ConfigError where shtab is not installed."""
    try:
        import shtab
    except ImportError as error:
        problem = "shell completion needs shtab, which is not installed"
        raise ConfigError(problem, "pip install 'macpo[completion]'") from error
    recipes = {"bash": "_macpo_recipes", "zsh": "_macpo_recipes"}
    for action in _actions(parser):
        if action.dest == "recipe":
            action.complete = recipes  # type: ignore[attr-defined]
        elif action.type is path_argument:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.dest == "like":
            action.choices = ["list", *bundled.names()]
    names = " ".join(bundled.names())
    preamble: Any = {"bash": _BASH.format(names=names), "zsh": _ZSH.format(names=names)}
    found: str = shtab.complete(parser, shell=shell, preamble=preamble)
    return found


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Every argument of a parser and of its commands."""
    found = list(parser._actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [inner for command in action.choices.values() for inner in _actions(command)]
    return found
