"""Base models that a run trains from scratch: a tokenizer and a small Llama on documents."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from macpo.engine.config import ComputeSettings, FullSettings, InitSettings
from macpo.engine.data.chat import Chat
from macpo.engine.data.records import Example, read_records
from macpo.engine.errors import ConfigError, DataError, TemplateRefusal
from macpo.engine.run.context import StageContext
from macpo.engine.run.stages import StageInputs
from macpo.engine.training.leftovers import CONTINUED, SCRATCH, goes_on_from
from macpo.engine.training.trackers import Trackers
from macpo.method.costs import (
    STEP_BYTES,
    Cost,
    MethodStage,
    RunSize,
    TrainingCost,
    made_config,
)

DOCUMENTS = "documents.jsonl"
"""What the sets of prompts leave over, for every agent that is pretrained on it; the demo world has a file a role."""


class DataInputs(StageInputs):
    data: str
    """Wrote the run's sets of prompts."""


class PretrainBase(MethodStage):
    """Train a tokenizer and a small Llama from scratch on documents; writes the Hugging Face folder `model/`."""

    name = "pretrain_base"
    doing = "pretrains"
    weight = 30.0
    scratch, continued = SCRATCH, CONTINUED

    init: InitSettings
    corpus: str | None
    """Identity of the text file in `init.corpus`; None where the documents are the run's own."""
    role: str
    """Whose documents."""
    template: str
    special_text: str
    template_arguments: dict[str, Any] = Field({})
    template_date: datetime.date | None = None
    refused: str = "error"
    seed: int
    inputs: DataInputs
    compute: ComputeSettings = Field(exclude=True)

    def run(self, ctx: StageContext) -> None:
        from macpo.engine.models.from_scratch import (
            build_model,
            document_groups,
            read_corpus,
            save_base,
            train_tokenizer,
        )
        from macpo.engine.models.policy import PolicyModule
        from macpo.engine.training.objectives import sft
        from macpo.engine.training.trainer import train

        init = self.init
        if init.corpus == "data":
            documents = _left_over(ctx.input(self.inputs.data), self.role)
        else:
            documents = read_corpus(init.corpus)
        documents = documents[: init.pretrain.max_documents]
        if not documents:
            raise DataError(
                "no document is left to pretrain on: the three sets of prompts use up the data",
                "lower data.teacher_prompts or data.student_prompts, or name a text file in init.corpus",
                field=f"{self.role}.init.corpus",
            )
        tokenizer = train_tokenizer(documents, init, self.template)
        chat = Chat(
            tokenizer,
            self.template,
            special_text=self.special_text,
            arguments=self.template_arguments,
            date=self.template_date,
        )
        if self.refused == "drop":
            kept = [document for document in documents if not _refuses(chat, document)]
            ctx.note(dropped_refused=len(documents) - len(kept))
            documents = kept
        model = build_model(init, tokenizer, self.seed)
        result = train(
            PolicyModule(model),
            document_groups(chat, documents, init.context, init.learn),
            sft(),
            init.pretrain,
            seed=self.seed,
            workdir=ctx.dir,
            world=ctx.world,
            should_stop=ctx.stop_requested,
            progress=ctx.name,
            trackers=Trackers(self.compute.trackers, ctx.name, ctx.dir.parent / "trackers"),
        )
        if ctx.world.is_main:
            save_base(model, tokenizer, ctx.dir / "model")
        ctx.note(tokens=result.tokens, documents=len(documents), steps=result.steps)

    def goes_on_from(self, folder: Path) -> str:
        return goes_on_from(folder)

    def duration(self) -> float:
        init, small = self.init, 64 * 64 * 2  # weights of the blocks, beside those of two blocks of width 64
        return self.weight * init.hidden_size * init.hidden_size * init.num_layers / small

    def cost(self, run: RunSize) -> Cost:
        settings = self.init.pretrain
        tokens = (settings.max_documents or run.documents) * run.document_tokens * settings.epochs
        return Cost(tokens, 6 * self._num_parameters(run) * tokens)

    def _num_parameters(self, run: RunSize) -> int:
        from macpo.engine.models.flops import ModelShape

        return ModelShape.of(made_config(self.init, run.words)).num_parameters

    def disk_bytes(self, run: RunSize) -> float:
        settings = self.init.pretrain
        steps = (settings.max_documents or run.documents) * settings.epochs / settings.batch
        return 4 * self._num_parameters(run) + STEP_BYTES * steps

    def training(self, run: RunSize) -> TrainingCost:
        from macpo.engine.planning.fitting import Workload

        settings = self.init.pretrain
        length = max(1, round(run.document_tokens) - 1)
        step = Workload(settings.batch, 1, length, settings.microbatch_tokens, responses=1)
        return TrainingCost(made_config(self.init, run.words), FullSettings(), step, self.cost(run).tokens)


def _refuses(chat: Chat, document: Example) -> bool:
    """Whether the template refuses a dialogue; text that is none needs no template."""
    try:
        chat.document_ids(document.prompt.messages, document.reply, document.finished)
    except TemplateRefusal:
        return True
    return False


def _left_over(data: Path, role: str) -> list[Example]:
    """Read the documents that the stage of the data wrote."""
    paths = [data / f"documents-{role}.jsonl", data / DOCUMENTS]
    found = next((path for path in paths if path.exists()), None)
    if found is None:
        problem = "the data was split for agents that are not pretrained on it, so its left-over rows were not written"
        raise ConfigError(problem, "run the recipe again with --from data", field=f"{role}.init.corpus")
    return read_records(found, Example)
