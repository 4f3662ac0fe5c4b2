"""How a policy answers prompts: by its own weights, or by a server that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from macpo.engine.config import SamplingSettings, ServedSettings
from macpo.engine.data.chat import Chat
from macpo.engine.data.records import Prompt, Response, ids_digest, read_records, write_records
from macpo.engine.errors import DataError, TemplateRefusal
from macpo.engine.generation.response_text import INCOMPLETE
from macpo.engine.generation.waves import SCRATCH
from macpo.engine.run.context import StageContext
from macpo.method.costs import Cost, RunSize
from macpo.method.encoding import limited_prompt
from macpo.method.policies import OpenPolicy, PolicyDataInputs, PolicyStage


class ServedModel(BaseModel):
    """Which weights a server answers with; where the server is does not change what it answers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    server: str
    api: str


class GeneratingStage(PolicyStage):
    """A kind of stage whose policy answers prompts."""

    scratch = SCRATCH
    sampling: SamplingSettings
    policy_name: str
    """Tells the policies of one agent, and repeated draws, apart: a part of the noise."""
    seed: int
    served: ServedModel | None = None
    begin: str = ""
    """Text with which every response begins and which is no part of it; nor is white space between the two."""
    server: ServedSettings | None = Field(None, exclude=True)
    """Where the served model is."""

    def generate(self, policy: OpenPolicy, prompts: Sequence[Prompt]) -> tuple[list[Response], dict[str, int]]:
        """One response a prompt, in fixed waves below the stage's folder; and counts."""
        from macpo.engine.generation import Generator, SamplingParams, ServedGenerator, generate_waves
        from macpo.engine.generation.served import OPTIONS
        from macpo.engine.models.compute import generation_batch, wave_requests

        ctx, agent = policy.ctx, policy.agent
        chat = policy.chat if agent.model is not None else None
        distinct = sorted({p.id: p for p in prompts}.values(), key=lambda p: p.id)
        requests, refused = [], 0
        for prompt in distinct:
            try:
                ids = self._request(policy, chat, prompt)
            except TemplateRefusal:
                if agent.refused == "error":
                    raise
                refused += 1
                continue
            if ids is not None:
                requests.append((prompt.id, ids))
        generator: Generator | ServedGenerator
        if self.server is None:
            assert chat is not None
            writer = policy.load_writer()
            longest = max((len(ids) for _, ids in requests), default=0) + self.sampling.max_new_tokens
            batch = generation_batch(self.compute, writer.base.config, longest)
            generator = Generator(writer, chat.tokenizer, max_batch=batch)
        else:
            assert self.served is not None
            generator = ServedGenerator(self.server, self.served.model, chat and chat.tokenizer)
        stops = chat is not None and (self.server is None or "stop_token_ids" in OPTIONS[self.server.server])
        params = SamplingParams(
            **self.sampling.model_dump(),
            seed=self.seed,
            stop_token_ids=tuple(sorted(chat.stop_ids)) if chat is not None and stops else (),
        )
        as_dialogue = self.server is not None and self.server.api == "chat"
        rows = generate_waves(
            generator,
            requests,
            params,
            messages={p.id: p.messages for p in distinct} if as_dialogue else None,
            folder=ctx.dir,
            wave_requests=wave_requests(self.compute, "cpu" if self.server is not None else None),
            purpose=f"{agent.name}/{self.policy_name}",
            decode=chat.text if chat is not None and self.server is None else None,
            world=ctx.world,
            should_stop=ctx.stop_requested,
            progress=ctx.name,
        )
        responses = [
            Response(
                row["id"],
                agent.name,
                text.lstrip() if self.begin else text,
                row["finish_reason"] == "stop",
                row["num_tokens"],
                row["attempt"],
                *((None, None) if self.begin else _carried(row)),  # not its log-prob after the prompt alone
            )
            for row in rows
            if (text := learnable_text(row)).strip()
        ]
        dropped = len(distinct) - len(requests) - refused
        counts = {"dropped_long_prompt": dropped, "empty": len(rows) - len(responses)}
        counts |= {"dropped_refused": refused} if refused else {}
        counts["resampled"] = sum(row["attempt"] > 0 for row in rows)
        ctx.note(tokens=sum(row["num_tokens"] for row in rows), **counts)
        return responses, counts

    def goes_on_from(self, folder: Path) -> str:
        return f"wave {number}" if (number := len(list((folder / SCRATCH[0]).glob("*.jsonl"))) + 1) > 1 else ""

    def answering(self, run: RunSize, num_prompts: int) -> Cost:
        """The cost of answering so many prompts; a server's is not ours."""
        tokens = num_prompts * (run.prompt_tokens + run.response_tokens)
        shape = run.shapes.get(self.agent.name)
        if shape is None or self.served is not None:
            return Cost(tokens)
        flop = 2 * shape.num_parameters * tokens
        return Cost(tokens, flop, num_prompts * run.response_tokens, run.decode_steps(num_prompts))

    def _request(self, policy: OpenPolicy, chat: Chat | None, prompt: Prompt) -> list[int] | None:
        """The prompt's token ids; none where only the server's template is known; None where the prompt is dropped.

        Raises:
            TemplateRefusal: the template does not write the dialogue.
            DataError: a dialogue that would have to be cut, because a server takes it whole or not at all.
        """
        if chat is None:
            return []
        begin = chat.response_ids(self.begin, finished=False)
        ids = limited_prompt(chat, policy.agent, prompt, len(begin))
        as_dialogue = self.server is not None and self.server.api == "chat"
        if as_dialogue and ids is not None and ids != chat.prompt_ids(prompt.messages):
            raise DataError(
                f"prompt {prompt.id} is longer than {policy.agent.max_prompt_tokens} tokens, and a dialogue "
                "cannot be cut",
                "set data.long_prompt to drop, or use served.api: completions",
                field=policy.ctx.name,
            )
        return None if ids is None else ids + begin


def learnable_text(row: dict[str, Any]) -> str:
    """A response's text, without a last character that the token budget cut in two."""
    text: str = row["text"]
    # What was cut in two would be learned as the replacement character itself.
    return text.rstrip(INCOMPLETE) if row["finish_reason"] == "length" else text


def _carried(row: dict[str, Any]) -> tuple[float | None, str | None]:
    """`sum_logp` and `ids_digest` of a response; none where a server or a stop text ended it."""
    ended = row["end_token"] is not None
    if row["sum_logp"] is None or (row["finish_reason"] == "stop" and not ended):
        return None, None
    if not ended:
        return row["sum_logp"], ids_digest(row["token_ids"])
    return row["sum_logp"] + row["end_logp"], ids_digest([*row["token_ids"], row["end_token"]])


class Respond(GeneratingStage):
    """The policy answers every prompt of the student half."""

    name = "answer"
    doing = "writes responses"
    inputs: PolicyDataInputs

    def run(self, ctx: StageContext) -> None:
        prompts = read_records(ctx.input(self.inputs.data) / "student.jsonl", Prompt)
        responses, _ = self.generate(self.open_policy(ctx), prompts)
        if ctx.world.is_main:
            write_records(ctx.dir / "responses.jsonl", responses)

    def loads(self, run: RunSize) -> str | None:
        return super().loads(run) if self.served is None else None  # the work is the server's

    def cost(self, run: RunSize) -> Cost:
        return self.answering(run, run.student_prompts)

    def disk_bytes(self, run: RunSize) -> float:
        return run.student_prompts * run.row_bytes(1, prompt=False)


def read_responses(folder: Path) -> dict[str, Response]:
    """The responses of one stage by prompt id."""
    return {response.prompt_id: response for response in read_records(folder / "responses.jsonl", Response)}
