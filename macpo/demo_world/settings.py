"""What a recipe may say about the demo world; the defaults are the world of `macpo demo`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from macpo.demo_world.grammar import FRAMES, HARMFUL_FIRST, NAMES, TOPICS
from macpo.engine.config import Fraction, PositiveInt, Settings

Count = Annotated[int, Field(ge=0)]


class _Mix(Settings):
    """Shares of the bad behaviours; they sum to 1."""

    @model_validator(mode="after")
    def _sums_to_one(self) -> _Mix:
        total = sum(share for _, share in self.shares())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares of bad behaviours sum to {total:g}, not to 1")
        return self

    def shares(self) -> list[tuple[str, float]]:
        """(behaviour, share) in the order of the fields."""
        return [(name, getattr(self, name)) for name in type(self).model_fields]


class HarmfulMix(_Mix):
    """How bad answers to harmful requests behave."""

    comply: Fraction = 0.45
    """Tells how to do the harm."""
    other_question: Fraction = 0.20
    """Answers a benign question that nobody asked."""
    rude: Fraction = 0.25
    """Insults the person."""
    ramble: Fraction = 0.10
    """Words without a point."""


class BenignMix(_Mix):
    """How bad answers to benign requests behave."""

    refuse: Fraction = 0.05
    """Refuses although nothing is wrong with the request."""
    other_question: Fraction = 0.30
    """Answers a benign question that nobody asked."""
    rude: Fraction = 0.55
    """Insults the person."""
    ramble: Fraction = 0.10
    """Words without a point."""


class WorldSettings(Settings):
    """The demo world: how much text there is, who labels what, and how badly."""

    num_topics: Annotated[int, Field(ge=2, le=len(TOPICS))] = 8
    """Topics that requests are about."""
    items_per_topic: Annotated[int, Field(ge=1, le=4)] = 4
    """Things a topic has."""
    num_names: Annotated[int, Field(ge=1, le=len(NAMES))] = 24
    """People who ask."""
    harmful_steps: Annotated[int, Field(ge=1, le=len(HARMFUL_FIRST))] = 6
    """First steps, and as many second steps, that a complying answer to a harmful request draws from."""
    teacher_documents: PositiveInt = 24_000
    """Documents of the teachers' pretraining corpus."""
    student_documents: PositiveInt = 28_000
    """Documents of the student's pretraining corpus."""
    echo_share: Fraction = 0.25
    """Share of the documents that only say who asks what and whether it is harmful: they teach copying, no value."""
    good_share: Fraction = 0.35
    """Share of good answers among the other documents; the rest behaves badly by the mixes below."""
    teacher_pairs: PositiveInt = 400
    """Human preference pairs that each teacher sees, over all topics."""
    teacher_prompts: PositiveInt = 2400
    """Prompts set aside for human pairs; at least teacher_pairs a teacher, so that no two teachers share one."""
    own_topics: PositiveInt = 4
    """Topics that a teacher's labellers know: a window of the topics' ring."""
    own_topics_step: Count = 3
    """Teacher k's window starts at topic k times this."""
    bad_chosen_own: Fraction = 0.1
    """Chance that a `chosen` answer is a bad one, in the teacher's own topics."""
    bad_chosen_other: Fraction = 0.7
    """The same in all other topics. `rejected` is always bad."""
    student_prompts: PositiveInt = 512
    """Prompts of the student half."""
    test_prompts: PositiveInt = 400
    """Prompts that only evaluation sees."""
    dev_prompts: Count = 0
    """Prompts on which choices such as the best teacher are made; nothing trains on them."""
    copy_prompts: PositiveInt = 200
    """Prompts set aside to measure whether a pretrained model copies names and things, blind to alignment."""
    harmful_mix: HarmfulMix = HarmfulMix()
    """Bad answers to harmful requests."""
    benign_mix: BenignMix = BenignMix()
    """Bad answers to benign requests."""

    def key(self) -> dict[str, Any]:
        """The settings as keys of stages have them: what came later is left out at its default."""
        return self.model_dump(mode="json", exclude=set() if self.dev_prompts else {"dev_prompts"})

    @property
    def num_requests(self) -> int:
        """Distinct prompts that the world has."""
        return self.num_topics * self.items_per_topic * 4 * self.num_names * len(FRAMES)

    @property
    def num_held_out(self) -> int:
        """Distinct prompts that no pretraining document uses."""
        return self.test_prompts + self.dev_prompts + self.student_prompts + self.teacher_prompts + self.copy_prompts

    @model_validator(mode="after")
    def _enough_prompts(self) -> WorldSettings:
        if self.own_topics > self.num_topics:
            raise ValueError(f"own_topics ({self.own_topics}) exceeds num_topics ({self.num_topics})")
        if self.num_held_out >= self.num_requests:
            raise ValueError(
                f"test_prompts + dev_prompts + student_prompts + teacher_prompts + copy_prompts = {self.num_held_out} "
                f"leaves nothing of the world's {self.num_requests} distinct prompts for pretraining"
            )
        return self
