"""`macpo check`: does the recipe fit its data, tokenizers and templates? Shows what each agent will really read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from macpo.commands.preflight import preflight
from macpo.config import AgentSettings, Recipe
from macpo.engine.config import InitSettings
from macpo.engine.data.chat import Chat, boundary_mismatches, load_tokenizer
from macpo.engine.data.records import Example, Pair, Prompt
from macpo.engine.models.from_scratch import read_corpus, train_tokenizer
from macpo.engine.models.loading import local_folder, read_json_object
from macpo.method.prompt_sets import read_sources
from macpo.recipe_kinds import AnyRecipe, plan_of
from macpo.standalone.config import Standalone
from macpo.standalone.records import read_sets

NUM_MEASURED = 200
Answers = dict[str, tuple[str, bool]]  # label -> (text, whether it ended by itself)


@dataclass(frozen=True, slots=True)
class _Found:
    """What the recipe's data holds."""

    sizes: dict[str, int]
    counts: dict[str, int]
    documents: dict[str, list[Example]]
    sample: list[tuple[Prompt, Answers]]


def check(recipe: AnyRecipe, examples: int = 2) -> Iterator[str]:
    """Lines of text; raises MacpoError (2 to 5) for what `run` would stumble over."""
    preflight(recipe, plan_of(recipe, must_exist=False))
    found = _of_method(recipe) if isinstance(recipe, Recipe) else _of_standalone(recipe)
    yield "data: " + ", ".join(f"{count:,} {name}" for name, count in found.sizes.items())
    for name, count in found.counts.items():
        if count:
            yield f"data: {count:,} {name.replace('_', ' ')}"
    chats: dict[str, Chat] = {}
    shown: dict[str, str] = {}  # digest of tokenizer and template -> the agent whose tokens were shown
    for agent in recipe.agents:
        if not agent.has_tokenizer:
            yield from ("", f"{agent.name}: {agent.source}, under the server's own template; prompts are not cut")
            continue
        chat = agent_chat(agent, recipe, found.documents, chats)
        yield ""
        yield from _about(agent, chat, recipe, found.sample)
        if chat.digest in shown:
            yield f"  examples: the same tokens as {shown[chat.digest]}'s"
            continue
        shown[chat.digest] = agent.name
        for prompt, answers in found.sample[:examples]:
            yield from _marked(chat, prompt, answers, recipe)


def _of_method(recipe: Recipe) -> _Found:
    teachers = {teacher.name: teacher.data for teacher in recipe.teachers}
    sources = read_sources(recipe.data, teachers, recipe.seed)
    sizes = {f"{name}'s human pairs": len(pairs) for name, pairs in sources.teachers.items()}
    sizes |= {"student prompts": len(sources.student), "test prompts": len(sources.test)}
    first = next(iter(sources.teachers.values()))[:NUM_MEASURED]
    return _Found(sizes, sources.counts, sources.documents, [_answers(pair) for pair in first])


def _of_standalone(recipe: Standalone) -> _Found:
    sets = read_sets(recipe.data, recipe.seed)
    sizes = {"to train on": len(sets.train), "held out": len(sets.test)}
    sample = [_answers(record) for record in sets.train[:NUM_MEASURED]]
    return _Found(sizes, sets.counts, {"student": sets.documents}, sample)


def _answers(record: Pair | Example) -> tuple[Prompt, Answers]:
    if isinstance(record, Example):
        return record.prompt, {"ANSWER": (record.answer, record.finished)}
    chosen, rejected = (record.chosen, record.chosen_finished), (record.rejected, record.rejected_finished)
    return record.prompt, {"CHOSEN": chosen, "REJECTED": rejected}


def agent_chat(
    agent: AgentSettings, recipe: AnyRecipe, sources: dict[str, list[Example]], made: dict[str, Chat]
) -> Chat:
    """The agent's tokenizer and template; a tokenizer that the run will train is trained here on the same documents."""
    template = agent.template or recipe.template
    if agent.init is None:
        path = agent.model or agent.positive
        assert path is not None
        folder = local_folder(path, trust_remote_code=recipe.trust_remote_code)
        read_json_object(folder / "config.json" if agent.model else _any_config(folder))
        tokenizer = load_tokenizer(folder, trust_remote_code=recipe.trust_remote_code)
        return Chat(tokenizer, template, special_text=recipe.data.special_text, eos_token=agent.eos_token)
    role = "teacher" if isinstance(recipe, Recipe) and agent is not recipe.student else "student"
    key = f"{role} {template} {agent.init.tokenizer} {agent.init.vocab_size} {agent.init.corpus}"
    if key not in made:
        documents = sources[role] if agent.init.corpus == "data" else read_corpus(agent.init.corpus)
        tokenizer = train_tokenizer(_used(documents, agent.init), agent.init, template)
        made[key] = Chat(tokenizer, template, special_text=recipe.data.special_text, eos_token=agent.eos_token)
    return made[key]


def _used(documents: list[Example], init: InitSettings) -> list[Example]:
    return documents[: init.pretrain.max_documents]


def _any_config(folder: Path) -> Path:
    adapter = folder / "adapter_config.json"
    return adapter if adapter.exists() else folder / "config.json"


def _about(
    agent: AgentSettings, chat: Chat, recipe: AnyRecipe, sample: Sequence[tuple[Prompt, Answers]]
) -> Iterator[str]:
    yield f"{agent.name}: {agent.source}; {len(chat.tokenizer):,} tokens; stops at {_names(chat, chat.stop_ids)}"
    dialogues = [(prompt.messages, next(iter(answers.values()))[0]) for prompt, answers in sample]
    prompts = sorted(len(chat.prompt_ids(messages)) for messages, _ in dialogues)
    answers = sorted(len(chat.answer_ids(answer)) for _, answer in dialogues)
    limit = recipe.max_prompt_tokens
    long = sum(length > limit for length in prompts)
    half = len(prompts) // 2
    yield (
        f"  prompts: median {prompts[half]}, longest {prompts[-1]} tokens; {long} of {len(prompts)} are longer than "
        f"the {limit} that context_tokens leaves ({recipe.data.long_prompt})"
    )
    yield f"  answers: median {answers[half]}, longest {answers[-1]} tokens"
    rate = boundary_mismatches(chat, dialogues)
    yield f"  prompt and answer tokenise differently as one text in {rate:.1%} (we tokenise the parts, once)"


def _marked(chat: Chat, prompt: Prompt, answers: Answers, recipe: AnyRecipe) -> Iterator[str]:
    """One row as the agent reads it, between the marks of what is prompt and what is trained on."""
    group = chat.group(
        prompt.messages,
        list(answers.values()),
        max_tokens=recipe.context_tokens,
        max_prompt_tokens=recipe.max_prompt_tokens,
        long_prompt=recipe.data.long_prompt,
    )
    if group is None:
        yield f"  example {prompt.id}: dropped, the prompt is too long"
        return
    yield f"  example {prompt.id}:"
    for label, ids in zip(("PROMPT", *answers), (group.prompt_ids, *group.responses), strict=True):
        yield f"    [{label} {len(ids)}] {'|'.join(_names(chat, ids).split(' '))}"


def _names(chat: Chat, ids: Sequence[int]) -> str:
    return " ".join(str(token) for token in chat.tokenizer.convert_ids_to_tokens(list(ids)))
