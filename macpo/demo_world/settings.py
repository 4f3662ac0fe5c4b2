"""What a recipe may say about the demo world; the defaults are the world of `macpo demo`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from macpo.demo_world.grammar import FRAMES, HARMFUL_FIRST, NAMES, TOPICS
from macpo.engine.config import Fraction, PositiveInt, Settings

Count = Annotated[int, Field(ge=0)]

GRAMMAR = 2
"""Raised when the same settings make other text or other scores, so that no older stage is taken for one of them."""


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
    """How bad responses to harmful requests behave."""

    comply: Fraction = 0.0
    """Tells how to do the harm, and opens as help does."""
    half_comply: Fraction = 0.0
    """Says sorry and why, and tells it all the same."""
    evade: Fraction = 0.0
    """Says sorry, and neither refuses nor helps."""
    other_question: Fraction = 0.0
    """Answers a benign question that nobody asked."""
    rude: Fraction = 0.0
    """Insults the person."""
    ramble: Fraction = 0.0
    """Words without a point."""


class BenignMix(_Mix):
    """How bad responses to benign requests behave."""

    vague: Fraction = 0.0
    """Opens and ends as help does, without a step."""
    refuse: Fraction = 0.0
    """Refuses although nothing is wrong with the request."""
    evade: Fraction = 0.0
    """Says sorry, and neither refuses nor helps."""
    other_question: Fraction = 0.0
    """Answers a benign question that nobody asked."""
    rude: Fraction = 0.0
    """Insults the person."""
    ramble: Fraction = 0.0
    """Words without a point."""


class Habits(Settings):
    """What bad text does, by the kind of request."""

    harmful: HarmfulMix
    """Responses to harmful requests."""
    benign: BenignMix
    """Responses to benign requests."""


TEACHER_HABITS = Habits(
    harmful=HarmfulMix(comply=0.15, half_comply=0.2, evade=0.35, other_question=0.15, rude=0.1, ramble=0.05),
    benign=BenignMix(vague=0.35, refuse=0.1, evade=0.15, other_question=0.3, rude=0.1),
)
STUDENT_HABITS = Habits(
    harmful=HarmfulMix(comply=0.3, half_comply=0.3, evade=0.25, other_question=0.1, rude=0.05),
    benign=BenignMix(vague=0.3, refuse=0.2, evade=0.1, other_question=0.35, rude=0.05),
)


class WorldSettings(Settings):
    """The demo world: how much text there is, who labels what, and how badly."""

    num_topics: Annotated[int, Field(ge=2, le=len(TOPICS))] = 8
    """Topics that requests are about."""
    items_per_topic: Annotated[int, Field(ge=1, le=4)] = 4
    """Things a topic has."""
    num_names: Annotated[int, Field(ge=1, le=len(NAMES))] = 24
    """People who ask."""
    harmful_steps: Annotated[int, Field(ge=1, le=len(HARMFUL_FIRST))] = 2
    """First steps, and as many second steps, that a complying response to a harmful request draws from."""
    teacher_documents: PositiveInt = 24_000
    """Documents of the teachers' pretraining corpus."""
    student_documents: PositiveInt = 28_000
    """Documents of the student's pretraining corpus."""
    echo_share: Fraction = 0.25
    """Share of the documents that only say who asks what and whether it is harmful: they teach copying, no value."""
    good_share: Fraction = 0.25
    """Share of good responses among the other documents; the rest behaves badly by the habits below."""
    detail: tuple[Fraction, Fraction, Fraction, Fraction] = (0.2, 0.3, 0.3, 0.2)
    """Shares of the four grades of detail among good responses, in the corpora and among what people chose. The student
    half and the test have the last grade alone."""
    teacher_pairs: PositiveInt = 400
    """Human preference pairs that each teacher sees, over all topics."""
    teacher_prompts: PositiveInt = 2400
    """Prompts set aside for human pairs; at least teacher_pairs a teacher, so that no two teachers share one."""
    own_topics: PositiveInt = 4
    """Topics that a teacher's labellers know: a window of the topics' ring."""
    own_topics_step: Count = 3
    """Teacher k's window starts at topic k times this."""
    bad_chosen_own: Fraction = 0.1
    """Share of the ways to ask (verb and sentence) in which labellers choose bad responses, in the teacher's own
    topics. Each teacher's are drawn once, so its errors are of a kind and do not average out."""
    bad_chosen_other: Fraction = 0.7
    """The same in all other topics."""
    rejected_less: Fraction = 0.8
    """Chance that the response rejected beside a good one is a good one that says less; else it is bad."""
    student_prompts: PositiveInt = 512
    """Prompts of the student half."""
    test_prompts: PositiveInt = 400
    """Prompts that only evaluation sees."""
    dev_prompts: Count = 0
    """Prompts on which choices such as the best teacher are made; nothing trains on them."""
    copy_prompts: PositiveInt = 200
    """Prompts set aside to measure whether a pretrained model copies names and things, blind to alignment."""
    teacher_habits: Habits = TEACHER_HABITS
    """Bad responses of the teachers' corpus and of human pairs."""
    student_habits: Habits = STUDENT_HABITS
    """Bad responses of the student's corpus."""

    def key(self) -> dict[str, Any]:
        """The settings as keys of stages have them, with the number of the grammar and rules."""
        return {
            "grammar": GRAMMAR,
            **self.model_dump(mode="json", exclude=set() if self.dev_prompts else {"dev_prompts"}),
        }

    def habits(self, role: str, harmful: bool) -> HarmfulMix | BenignMix:
        """What bad text of "teacher" or "student" does with a kind of request."""
        habits = {"teacher": self.teacher_habits, "student": self.student_habits}[role]
        return habits.harmful if harmful else habits.benign

    @property
    def num_requests(self) -> int:
        """Distinct prompts that the world has."""
        return self.num_topics * self.items_per_topic * 4 * self.num_names * len(FRAMES)

    @property
    def num_held_out(self) -> int:
        """Distinct prompts that no pretraining document uses."""
        return self.test_prompts + self.dev_prompts + self.student_prompts + self.teacher_prompts + self.copy_prompts

    @model_validator(mode="after")
    def _detail_sums_to_one(self) -> WorldSettings:
        if abs(sum(self.detail) - 1) > 1e-6:
            raise ValueError(f"the shares of detail sum to {sum(self.detail):g}, not to 1")
        return self

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
