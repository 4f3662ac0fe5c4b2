"""Templates of published trainers: under a SentencePiece tokenizer the very ids that LLaMA-Factory trains on."""

from __future__ import annotations

from pathlib import Path

import pytest

from macpo.engine.data.chat import Chat, boundary_mismatches, load_tokenizer
from macpo.engine.data.messages import Message
from macpo.engine.data.templates import VICUNA_SYSTEM

STORIES = Path(__file__).parents[4] / "shared" / "models" / "stories260K"
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
# llmtuner 0.5.3, data/template.py: default_system, format_user, format_separator; the response and EOS follow bare
PUBLISHED = {
    "alpaca": (ALPACA, "### Instruction:\n{}\n\n### Response:\n", "\n\n"),
    "vicuna-system": (VICUNA_SYSTEM, "USER: {} ASSISTANT:", ""),
}


def user(*contents: str) -> list[Message]:
    """A dialogue of user and assistant turns in alternation."""
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def encoded_in_pieces(chat: Chat, template: str, turns: list[str]) -> list[int]:
    """Token ids as llmtuner 0.5.3 has them: every piece of the published text is encoded by itself."""
    system, asked, separator = PUBLISHED[template]

    def encoded(piece: str) -> list[int]:
        return chat.tokenizer.encode(piece, add_special_tokens=False) if piece else []

    ids = [chat.tokenizer.bos_token_id, *encoded(system)]
    for number, turn in enumerate(turns):
        if number % 2:
            ids += [*encoded(turn), chat.eos_id]
        else:
            ids += [*encoded(separator if number else ""), *encoded(asked.format(turn))]
    return ids


@pytest.mark.skipif(not STORIES.is_dir(), reason="the real model is not here")
@pytest.mark.parametrize("template", PUBLISHED)
def test_a_sentencepiece_tokenizer_gives_the_ids_of_llama_factory(template: str) -> None:
    chat = Chat(load_tokenizer(STORIES), template)
    turns = ["Why is\nit so?", "Because it is.", "And then?", "The  end"]
    ours = chat.prompt_ids(user(*turns[:3])) + chat.response_ids(turns[3])
    assert ours == encoded_in_pieces(chat, template, turns)
    assert boundary_mismatches(chat, [(user(*turns[:3]), turns[3])]) == 0
