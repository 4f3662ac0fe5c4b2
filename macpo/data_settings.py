"""The `data` block of a recipe: where text comes from, which rows of it are read, and how it becomes tokens."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, JsonValue, NonNegativeInt, model_validator

from macpo.demo_world import WorldSettings
from macpo.engine.config import PositiveInt, Settings
from macpo.engine.paths import HubPath
from macpo.engine.run.keys import UNKNOWN
from macpo.engine.unpacking import LIMITS, Limits

TemplateArguments = dict[str, JsonValue]

_OF_TOKENS = ("long_prompt", "special_text", "refused")
"""Settings of the data block that are about tokens, not about rows."""


class LimitSettings(Settings):
    """What a data file may ask for before it is refused with exit code 3."""

    row_bytes: PositiveInt = LIMITS.row_bytes
    """Longest line of JSON Lines and CSV, and longest row of JSON."""
    blank_lines: PositiveInt = LIMITS.blank_lines
    """Most lines without a row in succession."""
    unpacked_bytes: PositiveInt = LIMITS.unpacked_bytes
    """A .gz or Parquet file may always hold so many bytes."""
    unpacked_ratio: PositiveInt = LIMITS.unpacked_ratio
    """Beyond that it may hold so many times its own size; text packs 2 to 20 times."""

    @property
    def limits(self) -> Limits:
        return Limits(**dict(self))


class SourceSettings(Settings):
    """Where text comes from, and how it becomes tokens.

    `format`, `columns`, `preference`, `empty`, `contradictions`, `subset` and `split` hold for every file that is read:
    this one, `test_path`, and a teacher's own. `subset` and `split` choose among the files of a folder; a teacher's own
    data that is a single file is read whole.
    """

    later: ClassVar[tuple[str, ...]] = ("empty", "contradictions")
    """Settings that keys leave out at their default."""
    most_test_prompts: ClassVar[int] = 2000
    """Prompts that are held out for evaluation by default where the data has ten times as many."""

    path: HubPath | None = None
    """A file, a folder in HH-RLHF's layout, or a Hub id."""
    world: WorldSettings | None = None
    """Instead of `path`: text made by the project, with an exact gold score."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Other names for `prompt`, `chosen`, `rejected`: {prompt: question}."""
    preference: Literal["better", "safer"] = "better"
    """PKU-SafeRLHF only: which label decides."""
    subset: str | None = None
    """One sub-folder of the data set, such as `harmless-base` of HH-RLHF; default all."""
    split: str = "train"
    """Which published split to read; another is never read in its place."""
    test_split: str | None = None
    """Published split to evaluate on, instead of a part of `split`; its prompts are left out of training."""
    test_path: HubPath | None = None
    """File, folder or Hub id to evaluate on, in the same layout; its prompts are left out of training."""
    empty: Literal["auto", "error", "drop"] = "auto"
    """Rows with a prompt or response of white space: an error, or dropped and counted; `auto` drops in the layouts of
    HH-RLHF and PKU-SafeRLHF, whose published files hold some, and is an error in the others."""
    contradictions: Literal["keep", "drop"] = "keep"
    """Pairs of one prompt that prefer the same two responses both ways: kept, or all dropped; counted either way."""
    refused: Literal["error", "drop"] = "error"
    """Rows that an agent's chat template refuses: an error, or dropped and counted wherever that agent reads them."""
    long_prompt: Literal["truncate", "drop", "error"] = "truncate"
    """What becomes of a prompt that leaves no room for a response; `truncate` keeps its end."""
    special_text: Literal["plain", "error"] = "plain"
    """Text of special tokens inside the data: encoded as plain text, or refused."""
    test_prompts: PositiveInt | None = None
    """Distinct prompts to evaluate on, never trained on; default a tenth of the data's, at most 2000, in recipes other
    than `macpo` 200. Of a test set of its own, all up to that number."""
    limits: LimitSettings = Field(default_factory=LimitSettings)
    """Bounds against files that would fill the memory or never end."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.path is None and self.world is None:
            raise ValueError("path is missing: there is no data Fix: give a file, a folder or a Hub id")
        if self.path is not None and self.world is not None:
            raise ValueError("path and `world` are two sources Fix: keep one of them")
        if self.world is not None:  # the world has sizes of its own
            for name, field in type(self).model_fields.items():
                both = name in ("path", "world", *_OF_TOKENS)
                both |= name == "test_prompts" and self.test_prompts == self.most_test_prompts  # as it once was dumped
                if not both and getattr(self, name) != field.get_default(call_default_factory=True, validated_data={}):
                    raise ValueError(f"{name} is for `path`; the world's settings are in `world` Fix: leave it out")
        if self.test_path is not None and self.test_split is not None:
            raise ValueError("test_split is for `path`; test_path is a data set of its own Fix: keep one of them")
        return self

    def test_size(self, num_prompts: int, *, apart: bool) -> int:
        """How many prompts are evaluated on, of so many distinct ones; `apart`: none of them could be trained on."""
        if self.test_prompts is not None:
            return self.test_prompts
        return min(self.most_test_prompts, num_prompts if apart else max(1, num_prompts // 10))

    def key(self) -> dict[str, Any]:
        """What decides which rows there are, as keys of stages have it.

        How prompts become tokens does not; settings that came later are left out at their default, so that runs that an
        earlier version finished stay finished.
        """
        found = self.model_dump(mode="json", exclude={*_OF_TOKENS, "limits"})
        if self.test_prompts is None:  # `method.data_sets.sized` gives the number where the data is here
            found["test_prompts"] = self.most_test_prompts if self.path is None else f"{UNKNOWN}a share of the data"
        for name in self.later:
            if found[name] == type(self).model_fields[name].default:
                del found[name]
        if self.world is not None:
            found["world"] = self.world.key()
        return found


class DataSettings(SourceSettings):
    """Preference data and its disjoint sets of prompts."""

    later: ClassVar[tuple[str, ...]] = (
        *SourceSettings.later,
        "test_split",
        "test_path",
        "dev_prompts",
        "reward_prompts",
    )

    format: Literal["auto", "hh", "pku", "pairs", "alpaca", "sharegpt"] = "auto"
    """Layout of the rows; `auto` goes by the keys of the first row."""
    teacher_prompts: PositiveInt = 5000
    """Prompts with human responses, for the teachers alone."""
    student_prompts: PositiveInt = 5000
    """Prompts whose human responses training never reads."""
    reward_prompts: NonNegativeInt = 0
    """Prompts whose human responses only a reward model that judges the agents learns from; disjoint from all else."""
    dev_prompts: NonNegativeInt = 0
    """Prompts of the training side that no agent trains on: choices such as the best teacher are made on these."""

    @property
    def num_dev_prompts(self) -> int:
        """Development prompts of the file or of the world."""
        return self.dev_prompts if self.world is None else self.world.dev_prompts
