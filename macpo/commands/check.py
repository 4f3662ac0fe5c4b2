"""`macpo check`: does the recipe fit its data, tokenizers and templates? Shows what each agent will really read."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from macpo.agent_settings import AgentSettings
from macpo.commands.check_rows import Reading, Rows, encode_rows
from macpo.commands.preflight import preflight
from macpo.config import Recipe
from macpo.engine.config import InitSettings
from macpo.engine.data.chat import Chat, boundary_mismatches
from macpo.engine.data.messages import Message
from macpo.engine.data.records import Example, Pair, Prompt
from macpo.engine.errors import TemplateRefusal
from macpo.engine.foreign import read_json_object
from macpo.engine.model_folders import local_folder
from macpo.engine.models.from_scratch import read_corpus, train_tokenizer
from macpo.method.encoding import encoded, is_cut, pair_responses
from macpo.method.policies import READING, StageAgent, chat_of, chat_with
from macpo.method.prompt_sets import read_sources
from macpo.method.run_plan import Builder, Plan
from macpo.recipe_kinds import AnyRecipe, plan_of
from macpo.standalone.config import Standalone
from macpo.standalone.records import read_sets

NUM_MEASURED = 200
Responses = dict[str, tuple[str | Message, bool]]  # label -> (text or message, whether it ended by itself)


@dataclass(frozen=True, slots=True)
class _Found:
    """What the recipe's data holds."""

    sizes: dict[str, int]
    counts: dict[str, int]
    documents: Mapping[str, Sequence[Example]]
    sample: list[tuple[Prompt, Responses]]
    read: dict[str, dict[str, tuple[Rows, Reading]]]
    """By agent: every set of rows that a run reads with its tokenizer, and what of it."""


def check(recipe: AnyRecipe, examples: int = 2) -> Iterator[str]:
    """Lines of text; raises MacpoError (2 to 5) for what `run` would stumble over."""
    preflight(recipe, plan_of(recipe, must_exist=False))
    began = time.monotonic()
    found = _of_method(recipe) if isinstance(recipe, Recipe) else _of_standalone(recipe)
    sizes = ", ".join(f"{count:,} {name}" for name, count in found.sizes.items())
    yield f"data: {sizes} (read in {time.monotonic() - began:.1f} s)"
    for name, count in found.counts.items():
        if count:
            yield f"data: {count:,} {name.replace('_', ' ')}"
    chats: dict[str, Chat] = {}
    done: set[tuple[str, int, Reading]] = set()  # rows that an agent with the same tokens has read
    shown: dict[str, str] = {}  # digest of tokenizer and template -> the agent whose tokens were shown
    for agent in recipe.agents:
        if not agent.has_tokenizer:
            yield from ("", f"{agent.name}: {agent.source}, under the server's own template; prompts are not cut")
            continue
        chat = agent_chat(agent, recipe, found.documents, chats)
        about = Builder(recipe, Plan()).stage_agent(agent)
        lines = []
        for what, (rows, reading) in found.read[agent.name].items():
            key = (chat.digest, id(rows), reading)
            if key not in done:
                done.add(key)
                lines.append(encode_rows(chat, about, rows, what, reading))
        sample = _accepted(chat, about, found.sample)
        yield ""
        yield from _about(agent, chat, recipe, sample)
        yield from lines
        if chat.digest in shown:
            yield f"  examples: the same tokens as {shown[chat.digest]}'s"
            continue
        shown[chat.digest] = agent.name
        for prompt, responses in sample[:examples]:
            yield from _marked(chat, prompt, responses, about)


def check_templates(recipe: AnyRecipe) -> None:
    """Encode the first rows of the data as every agent will that has a tokenizer by now.

    Raises:
        TemplateRefusal: an agent's template does not write a row as it would be trained on; it names file and line.
    """
    agents = [agent for agent in recipe.agents if agent.has_tokenizer and agent.init is None]
    if not agents:
        return
    found = _of_method(recipe) if isinstance(recipe, Recipe) else _of_standalone(recipe)
    for agent in agents:
        about = Builder(recipe, Plan()).stage_agent(agent)
        chat = agent_chat(agent, recipe, {}, {})
        _accepted(chat, about, found.sample)


def _accepted(
    chat: Chat, about: StageAgent, sample: Sequence[tuple[Prompt, Responses]]
) -> Sequence[tuple[Prompt, Responses]]:
    """The rows without those that the template refuses, where such are to be dropped."""
    kept = []
    for prompt, responses in sample:
        try:
            encoded(chat, about, prompt, list(responses.values()))
        except TemplateRefusal:
            if about.refused == "error":
                raise
            continue
        kept.append((prompt, responses))
    return kept


def _of_method(recipe: Recipe) -> _Found:
    teachers = {teacher.name: teacher.data for teacher in recipe.teachers}
    most = {teacher.name: teacher.data_prompts for teacher in recipe.teachers if teacher.data_prompts}
    sources = read_sources(recipe.data, teachers, recipe.seed, most)
    sizes = {f"{name}'s human pairs": len(pairs) for name, pairs in sources.teachers.items()}
    sizes |= {"student prompts": len(sources.student), "test prompts": len(sources.test)}
    sizes |= {"pairs for a reward model": len(sources.reward)} if sources.reward else {}
    first = next(iter(sources.teachers.values()))[:NUM_MEASURED]
    read: dict[str, dict[str, tuple[Rows, Reading]]] = {
        name: {
            "its human pairs": (pairs, "answers"),
            "student prompts": (sources.student, "prompts"),
            "test pairs": (sources.test, "pairs"),
        }
        for name, pairs in sources.teachers.items()
    }
    read[recipe.student.name] = {
        "student prompts": (sources.student, "answers" if recipe.evaluation.ceiling else "prompts"),
        "test pairs": (sources.test, "pairs"),
    }
    return _Found(sizes, sources.counts, sources.documents, [_responses(pair) for pair in first], read)


def _of_standalone(recipe: Standalone) -> _Found:
    sets = read_sets(recipe.data, recipe.seed)
    sizes = {"to train on": len(sets.train), "held out": len(sets.test)}
    sample = [_responses(record) for record in sets.train[:NUM_MEASURED]]
    reading: Reading = "answers" if recipe.recipe == "sft" else "pairs"
    read: dict[str, tuple[Rows, Reading]] = {"to train on": (sets.train, reading), "held out": (sets.test, reading)}
    return _Found(sizes, sets.counts, {"student": sets.documents}, sample, {recipe.agents[0].name: read})


def _responses(record: Pair | Example) -> tuple[Prompt, Responses]:
    if isinstance(record, Example):
        return record.prompt, {"RESPONSE": (record.reply, record.finished)}
    return record.prompt, dict(zip(("CHOSEN", "REJECTED"), pair_responses(record), strict=True))


def agent_chat(
    agent: AgentSettings, recipe: AnyRecipe, sources: Mapping[str, Sequence[Example]], made: dict[str, Chat]
) -> Chat:
    """The agent's tokenizer and template; a tokenizer that the run will train is trained here on the same documents."""
    about = Builder(recipe, Plan()).stage_agent(agent)
    if agent.init is None:
        path = agent.model or agent.positive
        assert path is not None
        folder = local_folder(path, trust_remote_code=recipe.trust_remote_code)
        read_json_object(folder / "config.json" if agent.model else _any_config(folder))
        return chat_of(about, str(folder))
    role = "teacher" if isinstance(recipe, Recipe) and agent is not recipe.student else "student"
    reading = about.model_dump_json(include=set(READING))
    key = f"{role} {reading} {agent.init.tokenizer} {agent.init.vocab_size} {agent.init.corpus}"
    if key not in made:
        documents = sources[role] if agent.init.corpus == "data" else read_corpus(agent.init.corpus)
        tokenizer = train_tokenizer(_used(documents, agent.init), agent.init, about.template)
        made[key] = chat_with(about, tokenizer)
    return made[key]


def _used(documents: Sequence[Example], init: InitSettings) -> Sequence[Example]:
    limit = init.pretrain.max_documents
    return documents if limit is None else documents[:limit]  # a slice would hold them all in memory


def _any_config(folder: Path) -> Path:
    adapter = folder / "adapter_config.json"
    return adapter if adapter.exists() else folder / "config.json"


def _about(
    agent: AgentSettings, chat: Chat, recipe: AnyRecipe, sample: Sequence[tuple[Prompt, Responses]]
) -> Iterator[str]:
    yield f"{agent.name}: {agent.source}; {len(chat.tokenizer):,} tokens; stops at {_names(chat, chat.stop_ids)}"
    yield from (f"  {line}" for line in chat.about)
    about = Builder(recipe, Plan()).stage_agent(agent)
    if not sample:
        yield "  the template refuses each of the first rows"
        return
    rows = [_measured(chat, about, *each) for each in sample]
    prompts = sorted(row.prompt_tokens for row in rows)
    limit, half = recipe.max_prompt_tokens, len(prompts) // 2
    long = sum(length > limit for length in prompts)
    yield (
        f"  prompts: median {prompts[half]}, longest {prompts[-1]} tokens; {long} of {len(prompts)} are longer than "
        f"{limit}, {recipe.prompt_limit} (data.long_prompt: {recipe.data.long_prompt})"
    )
    for n, label in enumerate(next(iter(sample))[1]):
        lengths = sorted(row.response_tokens[n] for row in rows)
        num_cut = sum(row.cut[n] for row in rows)
        yield (
            f"  {label.lower()} responses: median {lengths[half]}, longest {lengths[-1]} tokens; context_tokens cuts "
            f"{num_cut} of {len(rows)}"
        )
    if twins := sum(row.twins for row in rows):
        yield f"  {twins} of {len(rows)} pairs are identical after that, and are dropped"
    dialogues = [(prompt.messages, response) for prompt, responses in sample for response, _ in responses.values()]
    rate = boundary_mismatches(chat, dialogues)
    yield f"  the template's whole dialogue has other tokens than prompt and response in {rate:.1%} of {len(dialogues)}"
    for note, count in Counter(note for row in rows for note in row.notes if note).items():
        yield f"    {note}: {count} of {len(dialogues)} (what the template writes is trained)"


@dataclass(frozen=True, slots=True)
class _Measured:
    """One row as an agent reads it; a list has an entry for each of its responses."""

    prompt_tokens: int
    response_tokens: list[int]
    cut: list[bool]
    twins: bool
    notes: list[str]


def _measured(chat: Chat, about: StageAgent, prompt: Prompt, responses: Responses) -> _Measured:
    group = encoded(chat, about, prompt, list(responses.values()))
    replies = [response for response, _ in responses.values()]
    ids = [] if group is None else group.responses
    finished = [ended for _, ended in responses.values()]
    return _Measured(
        prompt_tokens=len(chat.prompt_ids(prompt.messages)),
        response_tokens=[len(chat.reply_ids(prompt.messages, reply)) for reply in replies],
        cut=[group is not None and is_cut(chat, group, n, ended) for n, ended in enumerate(finished)],
        twins=len(ids) == 2 and ids[0] == ids[1],
        notes=[chat.note(prompt.messages, reply) for reply in replies],
    )


def _marked(chat: Chat, prompt: Prompt, responses: Responses, about: StageAgent) -> Iterator[str]:
    """One row as the agent reads it, between the marks of what is prompt and what is trained on."""
    group = encoded(chat, about, prompt, list(responses.values()))
    if group is None:
        yield f"  example {prompt.id}: dropped, the prompt is too long"
        return
    yield f"  example {prompt.id}:"
    for label, ids in zip(("PROMPT", *responses), (group.prompt_ids, *group.responses), strict=True):
        yield f"    [{label} {len(ids)}] {'|'.join(_names(chat, ids).split(' '))}"


def _names(chat: Chat, ids: Sequence[int]) -> str:
    return " ".join(str(token) for token in chat.tokenizer.convert_ids_to_tokens(list(ids)))
