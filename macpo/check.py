"""`macpo check`: does the recipe fit its data, tokenizers and templates? Shows what each agent will really read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from macpo.config import AgentSettings, Recipe
from macpo.engine.chat import Chat, boundary_mismatches, load_tokenizer
from macpo.engine.config import InitSettings
from macpo.engine.loading import local_folder, read_json_object
from macpo.engine.pretrain import read_corpus, train_tokenizer
from macpo.engine.records import Example, Pair
from macpo.prompts import Sources, read_sources

NUM_MEASURED = 200


def check(recipe: Recipe, examples: int = 2) -> Iterator[str]:
    """Lines of text; raises MacpoError (2 or 3) for what `run` would stumble over."""
    sources = read_sources(
        recipe.data.model_dump(mode="json"), {teacher.name: teacher.data for teacher in recipe.teachers}, recipe.seed
    )
    sizes = {f"{name}'s human pairs": len(pairs) for name, pairs in sources.teachers.items()}
    sizes |= {"student prompts": len(sources.student), "test prompts": len(sources.test)}
    yield "data: " + ", ".join(f"{count:,} {name}" for name, count in sizes.items())
    for name, count in sources.counts.items():
        if count:
            yield f"data: {count:,} {name.replace('_', ' ')}"
    sample = next(iter(sources.teachers.values()))[:NUM_MEASURED]
    chats: dict[str, Chat] = {}
    shown: dict[str, str] = {}  # digest of tokenizer and template -> the agent whose tokens were shown
    for agent in (*recipe.teachers, recipe.student):
        chat = agent_chat(agent, recipe, sources, chats)
        yield ""
        yield from _about(agent, chat, recipe, sample)
        if chat.digest in shown:
            yield f"  examples: the same tokens as {shown[chat.digest]}'s"
            continue
        shown[chat.digest] = agent.name
        for pair in sample[:examples]:
            yield from _marked(chat, pair, recipe)


def agent_chat(agent: AgentSettings, recipe: Recipe, sources: Sources, made: dict[str, Chat]) -> Chat:
    """The agent's tokenizer and template; a tokenizer that the run will train is trained here on the same documents."""
    template = agent.template or recipe.template
    if agent.init is None:
        path = agent.model or agent.positive
        assert path is not None
        folder = local_folder(path, trust_remote_code=recipe.trust_remote_code)
        read_json_object(folder / "config.json" if agent.model else _any_config(folder))
        tokenizer = load_tokenizer(folder, trust_remote_code=recipe.trust_remote_code)
        return Chat(tokenizer, template, special_text=recipe.data.special_text, eos_token=agent.eos_token)
    role = "student" if agent is recipe.student else "teacher"
    key = f"{role} {template} {agent.init.tokenizer} {agent.init.vocab_size} {agent.init.corpus}"
    if key not in made:
        documents = sources.documents[role] if agent.init.corpus == "data" else read_corpus(agent.init.corpus)
        tokenizer = train_tokenizer(_used(documents, agent.init), agent.init, template)
        made[key] = Chat(tokenizer, template, special_text=recipe.data.special_text, eos_token=agent.eos_token)
    return made[key]


def _used(documents: list[Example], init: InitSettings) -> list[Example]:
    return documents[: init.pretrain.max_documents]


def _any_config(folder: Path) -> Path:
    adapter = folder / "adapter_config.json"
    return adapter if adapter.exists() else folder / "config.json"


def _about(agent: AgentSettings, chat: Chat, recipe: Recipe, sample: Sequence[Pair]) -> Iterator[str]:
    source = agent.model or agent.positive or "made on the spot (init)"
    yield f"{agent.name}: {source}; {len(chat.tokenizer):,} tokens; stops at {_names(chat, chat.stop_ids)}"
    dialogues = [(pair.prompt.messages, pair.chosen) for pair in sample]
    prompts = sorted(len(chat.prompt_ids(messages)) for messages, _ in dialogues)
    answers = sorted(len(chat.answer_ids(answer)) for _, answer in dialogues)
    limit = recipe.context_tokens - recipe.sampling.max_new_tokens
    long = sum(length > limit for length in prompts)
    half = len(prompts) // 2
    yield (
        f"  prompts: median {prompts[half]}, longest {prompts[-1]} tokens; {long} of {len(prompts)} are longer than "
        f"the {limit} that context_tokens leaves ({recipe.data.long_prompt})"
    )
    yield f"  answers: median {answers[half]}, longest {answers[-1]} tokens"
    rate = boundary_mismatches(chat, dialogues)
    yield f"  prompt and answer tokenise differently as one text in {rate:.1%} (we tokenise the parts, once)"


def _marked(chat: Chat, pair: Pair, recipe: Recipe) -> Iterator[str]:
    """One pair as the agent reads it, between the marks of what is prompt and what is trained on."""
    group = chat.group(
        pair.prompt.messages,
        [(pair.chosen, pair.chosen_finished), (pair.rejected, pair.rejected_finished)],
        max_tokens=recipe.context_tokens,
        max_prompt_tokens=recipe.context_tokens - recipe.sampling.max_new_tokens,
        long_prompt=recipe.data.long_prompt,
    )
    if group is None:
        yield f"  example {pair.prompt.id}: dropped, the prompt is too long"
        return
    yield f"  example {pair.prompt.id}:"
    chosen, rejected = group.responses
    for label, ids in (("PROMPT", group.prompt_ids), ("CHOSEN", chosen), ("REJECTED", rejected)):
        yield f"    [{label} {len(ids)}] {'|'.join(_names(chat, ids).split(' '))}"


def _names(chat: Chat, ids: Sequence[int]) -> str:
    return " ".join(str(token) for token in chat.tokenizer.convert_ids_to_tokens(list(ids)))
