"""Rows that an agent's chat template refuses, and errors that say which row they are about."""

from __future__ import annotations

from dataclasses import replace

from macpo.engine.data.chat import Chat
from macpo.engine.data.records import Prompt
from macpo.engine.errors import DataError


def is_refusal(error: DataError) -> bool:
    """Whether an error is a chat template's refusal of a dialogue."""
    return error.problems[0].field == "template"


def refuses(chat: Chat, prompt: Prompt) -> bool:
    """Whether the chat's template refuses a prompt. Raises DataError for anything else that is wrong with it."""
    try:
        chat.prompt_ids(prompt.messages)
    except DataError as error:
        if is_refusal(error):
            return True
        raise
    return False


def about(error: DataError, prompt: Prompt, file: str = "", line: int = 0) -> DataError:
    """Return an error of a row with the row's file and line, where they are known, and its prompt."""
    said = " ".join(str(prompt.messages[-1]["content"]).split())[:60] if prompt.messages else ""
    problems = [
        replace(
            p,
            message=f"{p.message.rstrip('.')} (prompt {prompt.id}: {said!r})",
            file=p.file or file,
            line=p.line or line,
        )
        for p in error.problems
    ]
    return type(error)(problems=problems)
