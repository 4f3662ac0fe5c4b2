"""An agent's policies: where they lie, what they read, how likely they find an answer, and how they answer.

A policy is a folder `policy/` of the stage that made it: a peft adapter, or a whole Hugging Face model.
What a stage depends on stands in its settings and inputs; `ComputeSettings` only says where it runs.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from macpo.engine.config import (
    ComputeSettings,
    SamplingSettings,
    ServedSettings,
)
from macpo.engine.data.chat import Chat
from macpo.engine.data.records import Prompt, Response, ids_digest, read_records, write_records
from macpo.engine.errors import DataError
from macpo.engine.generation import Generator, SamplingParams, ServedGenerator, generate_waves
from macpo.engine.generation.served import OPTIONS
from macpo.engine.run.context import StageContext
from macpo.method.encoding import limited_prompt
from macpo.method.policies import agent_chat, load_writer


def generate_answers(
    compute: ComputeSettings, ctx: StageContext, prompts: Sequence[Prompt], served: ServedSettings | None = None
) -> tuple[list[Response], dict[str, int]]:
    """One answer a prompt by the stage's policy, in fixed waves below the stage's folder; and counts.

    `served`: the server that generates, for an agent whose settings name the model there.
    """
    agent = ctx.settings["agent"]
    chat = agent_chat(ctx) if agent["model"] is not None else None
    distinct = sorted({p.id: p for p in prompts}.values(), key=lambda p: p.id)
    requests = [(prompt.id, ids) for prompt in distinct if (ids := _asked(ctx, chat, prompt, served)) is not None]
    generator: Generator | ServedGenerator
    if served is None:
        assert chat is not None
        generator = Generator(load_writer(compute, ctx), chat.tokenizer, max_batch=compute.generation_batch)
    else:
        generator = ServedGenerator(served, ctx.settings["served"]["model"], chat and chat.tokenizer)
    sampling = SamplingSettings.model_validate(ctx.settings["sampling"])
    stops = chat is not None and (served is None or "stop_token_ids" in OPTIONS[served.server])
    params = SamplingParams(
        **sampling.model_dump(),
        seed=ctx.settings["seed"],
        stop_token_ids=tuple(sorted(chat.stop_ids)) if chat is not None and stops else (),
    )
    rows = generate_waves(
        generator,
        requests,
        params,
        messages={p.id: p.messages for p in distinct} if served is not None and served.api == "chat" else None,
        folder=ctx.dir,
        wave_requests=compute.wave_requests,
        purpose=f"{agent['name']}/{ctx.settings['policy_name']}",
        decode=chat.text if chat is not None and served is None else None,
        world=ctx.world,
        should_stop=ctx.stop_requested,
        progress=ctx.name,
    )
    responses = [
        Response(
            row["id"],
            agent["name"],
            text,
            row["finish_reason"] == "stop",
            row["num_tokens"],
            row["attempt"],
            *_carried(row),
        )
        for row in rows
        if (text := row["text"].strip())
    ]
    counts = {"dropped_long_prompt": len(distinct) - len(requests), "empty": len(rows) - len(responses)}
    counts["resampled"] = sum(row["attempt"] > 0 for row in rows)
    ctx.note(tokens=sum(row["num_tokens"] for row in rows), **counts)
    return responses, counts


def _carried(row: dict[str, Any]) -> tuple[float | None, str | None]:
    """`sum_logp` and `ids_digest` of an answer; none where a server or a stop text ended it."""
    ended = row["end_token"] is not None
    if row["sum_logp"] is None or (row["finish_reason"] == "stop" and not ended):
        return None, None
    if not ended:
        return row["sum_logp"], ids_digest(row["token_ids"])
    return row["sum_logp"] + row["end_logp"], ids_digest([*row["token_ids"], row["end_token"]])


def _asked(ctx: StageContext, chat: Chat | None, prompt: Prompt, served: ServedSettings | None) -> list[int] | None:
    """The prompt's token ids; none where only the server's template is known; None where the prompt is dropped.

    Raises DataError for a dialogue that would have to be cut: a server takes it whole or not at all.
    """
    if chat is None:
        return []
    ids = limited_prompt(ctx, chat, prompt.messages)
    if served is not None and served.api == "chat" and ids is not None and ids != chat.prompt_ids(prompt.messages):
        raise DataError(
            f"prompt {prompt.id} is longer than {ctx.settings['agent']['max_prompt_tokens']} tokens, and a dialogue "
            "cannot be cut",
            "set data.long_prompt to drop, or use served.api: completions",
            field=ctx.name,
        )
    return ids


def answer(compute: ComputeSettings, ctx: StageContext, served: ServedSettings | None = None) -> None:
    """The stage's policy answers every prompt of the student half."""
    prompts = read_records(ctx.input("data") / "student.jsonl", Prompt)
    responses, _ = generate_answers(compute, ctx, prompts, served)
    if ctx.world.is_main:
        write_records(ctx.dir / "responses.jsonl", responses)
        shutil.rmtree(ctx.dir / "waves")


def read_answers(folder: Path) -> dict[str, Response]:
    """The answers of one stage by prompt id."""
    return {response.prompt_id: response for response in read_records(folder / "responses.jsonl", Response)}
