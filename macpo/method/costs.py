"""What the stages of a run cost, estimated from the shapes of the models and a sample of the data.

The stages themselves are exact; each kind says beside its work what it costs (`MethodStage`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from macpo.engine.config import InitSettings, Tuning
from macpo.engine.run.stages import StageWork
from macpo.method.identities import portable

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from macpo.engine.planning.fitting import Workload

CHARS_PER_TOKEN = 4.0
ROW_BYTES, RESPONSE_BYTES = 80, 110
"""Of a row and of each response in it, the names, ids and log-probs beside the text."""
STEP_BYTES = 400
"""Of a training step in metrics.jsonl and timing.jsonl."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the estimates need to know of an agent's base model."""

    name: str
    num_parameters: int
    bytes_loaded: int
    bytes_policy: int
    """On disk: an adapter, or all weights in float32, and the tokenizer."""
    config: PretrainedConfig


def made_config(init: InitSettings, words: int | None) -> PretrainedConfig:
    """The configuration of a model that the run makes; its vocabulary is at most this large.

    Args:
        words: different words of the texts that its tokenizer is made of; None where they are not known.
    """
    from macpo.engine.models.from_scratch import llama_shape

    known = words if init.tokenizer == "word" and init.corpus == "data" else None
    return llama_shape(init, min(init.vocab_size, known or init.vocab_size))


@dataclass(frozen=True, slots=True)
class RunSize:
    """The sizes of a run that its stages' costs depend on."""

    teacher_prompts: int
    """Of a teacher without data of its own."""
    student_prompts: int
    test_prompts: int
    num_teachers: int
    documents: int
    """To pretrain a base model on, where the recipe has no limit of its own."""
    document_tokens: float
    """Mean."""
    prompt_tokens: float
    """Mean."""
    response_tokens: float
    """Mean."""
    max_new_tokens: int
    generation_batch: int
    shapes: Mapping[str, Shape]
    """The base model of every agent whose weights are here."""
    dev_prompts: int = 0
    words: int | None = None
    """Different words of the data's texts, where that is known before they are read."""
    reward_prompts: int = 0
    """With human pairs that a reward model alone learns from."""
    own_prompts: Mapping[str, int] = field(default_factory=dict)
    """Of each teacher with data of its own."""

    def labels_of(self, teacher: str) -> int:
        """Human pairs that a teacher sees."""
        return self.own_prompts.get(teacher, self.teacher_prompts)

    def prompts_of(self, file: str) -> int:
        """Rows of a file of the prompts' stage: `teacher-NAME.jsonl`, or the student half's."""
        name = file.removesuffix(".jsonl")
        return self.labels_of(name.removeprefix("teacher-")) if name.startswith("teacher-") else self.student_prompts

    def row_bytes(self, responses: int = 2, prompt: bool = True) -> float:
        """A prompt with responses as one row of JSON; without the prompt, its id stands for it."""
        tokens = self.prompt_tokens * prompt + responses * self.response_tokens
        return CHARS_PER_TOKEN * tokens + ROW_BYTES + RESPONSE_BYTES * responses

    def decode_steps(self, num_prompts: int) -> float:
        """Steps of decoding, each of which reads every weight once, to answer so many prompts.

        A response that has ended makes room for another; the last ones take as long as responses may get.
        """
        full = num_prompts / self.generation_batch * self.response_tokens
        return max(full, self.response_tokens) + self.max_new_tokens - self.response_tokens


@dataclass(frozen=True, slots=True)
class Cost:
    """What one stage computes. Of its tokens `decoded` come one by one, in so many steps, each of which reads every
    weight; the others go through the model together."""

    tokens: float = 0.0
    flop: float = 0.0
    decoded: float = 0.0
    decode_steps: float = 0.0


@dataclass(frozen=True, slots=True)
class TrainingCost:
    """One step of a stage that trains, and how many tokens go through such steps."""

    config: PretrainedConfig
    tuning: Tuning
    step: Workload
    tokens: float


class MethodStage(StageWork):
    """A kind of stage that can say what it costs."""

    def portable(self, settings: dict[str, Any]) -> dict[str, Any]:
        return portable(settings)

    def cost(self, run: RunSize) -> Cost:
        return Cost()

    def disk_bytes(self, run: RunSize) -> float:
        """What the stage leaves on disk; by default a pair for each prompt of the student half."""
        return run.student_prompts * run.row_bytes()

    def loads(self, run: RunSize) -> str | None:
        """The agent whose base model the stage needs in memory."""
        return None

    def training(self, run: RunSize) -> TrainingCost | None:
        """What a step of the stage needs, where it trains."""
        return None
