"""TODO."""

from __future__ import annotations

import shutil

from macpo.engine.config import ComputeSettings, InitSettings
from macpo.engine.data.chat import Chat
from macpo.engine.data.records import Example, read_records
from macpo.engine.errors import DataError
from macpo.engine.models.from_scratch import build_model, document_groups, read_corpus, save_base, train_tokenizer
from macpo.engine.models.policy import PolicyModule
from macpo.engine.run.context import StageContext
from macpo.engine.training.objectives import sft
from macpo.engine.training.trackers import Trackers
from macpo.engine.training.trainer import train


def pretrain_base(compute: ComputeSettings, ctx: StageContext) -> None:
    """Train a tokenizer and a small Llama from scratch on documents; writes the Hugging Face folder `model/`."""
    s = ctx.settings
    init = InitSettings.model_validate(s["init"])
    if init.corpus == "data":
        documents = read_records(ctx.input("data") / f"documents-{s['role']}.jsonl", Example)
    else:
        documents = read_corpus(init.corpus)
    documents = documents[: init.pretrain.max_documents]
    if not documents:
        raise DataError(
            "no document is left to pretrain on: the three sets of prompts use up the data",
            "lower data.teacher_prompts or data.student_prompts, or name a text file in init.corpus",
            field=f"{s['role']}.init.corpus",
        )
    tokenizer = train_tokenizer(documents, init, s["template"])
    chat = Chat(tokenizer, s["template"], special_text=s["special_text"])
    model = build_model(init, tokenizer, s["seed"])
    groups = document_groups(chat, documents, init.context, init.learn)
    result = train(
        PolicyModule(model),
        groups,
        sft(),
        init.pretrain,
        seed=s["seed"],
        workdir=ctx.dir,
        world=ctx.world,
        should_stop=ctx.stop_requested,
        progress=ctx.name,
        trackers=Trackers(compute.trackers, ctx.name, ctx.dir.parent / "trackers"),
    )
    if ctx.world.is_main:
        save_base(model, tokenizer, ctx.dir / "model")
        shutil.rmtree(ctx.dir / "checkpoint", ignore_errors=True)
    ctx.note(tokens=result.tokens, documents=len(documents), steps=result.steps)
