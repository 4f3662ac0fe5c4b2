"""Recipes: strict YAML, every problem at once with its line, overrides, dump and load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from macpo.engine.config import (
    ComputeSettings,
    FullSettings,
    InitSettings,
    LoraSettings,
    OptimSettings,
    PreferenceSettings,
    SamplingSettings,
    Settings,
    Tuning,
)
from macpo.engine.errors import ConfigError
from macpo.engine.recipe import dump, load, loads


class Agent(Settings):
    """One model that takes part."""

    name: str
    """How the agent is called."""
    tuning: Tuning = LoraSettings()
    """How it is trained."""
    second: Tuning | None = None
    notes: tuple[str, ...] = ()


class Recipe(Settings):
    """A recipe with every shape of field."""

    seed: int = 0
    ratio: Annotated[float, Field(gt=0)] = 0.5
    agents: tuple[Agent, ...] = ()
    optim: PreferenceSettings = PreferenceSettings()
    init: InitSettings = InitSettings()
    compute: ComputeSettings = ComputeSettings()
    sampling: SamplingSettings = SamplingSettings()
    counts: dict[str, int] = Field(default_factory=dict)
    mode: Literal["fast", "exact"] = "fast"
    output: Path = Path("runs")
    fresh: bool = False
    ranks: int = 1

    @model_validator(mode="after")
    def _batch_divides(self) -> Recipe:
        if self.optim.batch % self.ranks:
            raise ValueError(f"ranks must divide optim.batch={self.optim.batch}. Fix: set ranks to a divisor")
        return self


def problems(text: str, overrides: tuple[str, ...] = (), model: type[Settings] = Recipe, **more: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loads(text, model, overrides, file="r.yaml", **more)
    assert caught.value.code == 2
    return [str(problem) for problem in caught.value.problems]


def test_every_problem_is_reported_at_once_with_its_line() -> None:
    text = """\
seed: one
agents:
  - name: 12
  - nme: x
    tuning: {type: lora, rank: 0}
optim:
  beta: -1
  lerning_rate: 1
"""
    assert problems(text, ("optim.epochs=0", "mode=fats")) == [
        'error: r.yaml:1: seed: got "one", allowed: a whole number. Fix: use a whole number.',
        "error: r.yaml:3: agents.0.name: got 12, allowed: text. Fix: put it in quotes.",
        "error: r.yaml:4: agents.1.name: missing. Fix: rename 'nme' to 'name'.",
        "error: r.yaml:4: agents.1.nme: unknown key. Fix: did you mean 'name'.",
        "error: r.yaml:5: agents.1.tuning.rank: got 0, allowed: greater than or equal to 1. "
        "Fix: use a value greater than or equal to 1.",
        "error: r.yaml:7: optim.beta: got -1, allowed: greater than 0. Fix: use a value greater than 0.",
        "error: r.yaml:8: optim.lerning_rate: unknown key. Fix: did you mean 'learning_rate'.",
        "error: --set optim.epochs=0: got 0, allowed: greater than or equal to 1. "
        "Fix: use a value greater than or equal to 1.",
        "error: --set mode=fats: got \"fats\", allowed: 'fast' or 'exact'. Fix: did you mean 'fast'.",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sead: 1", "r.yaml:1: sead: unknown key. Fix: did you mean 'seed'"),
        ("\n\ndevice: cpu", "r.yaml:3: device: unknown key. Fix: move it to 'compute.device'"),
        ("zzz: 1", "zzz: unknown key. Fix: known keys: seed, ratio, agents"),
        ("seed: '1'", 'seed: got "1", allowed: a whole number. Fix: write the number without quotes'),
        ("seed: 1_000", "Fix: write the number without quotes or separators"),
        ("seed: 1.0", "seed: got 1.0, allowed: a whole number"),
        ("seed: true", "seed: got true, allowed: a whole number"),
        ("fresh: yes", 'fresh: got "yes", allowed: true or false. Fix: use true or false'),
        ("fresh: 1", "fresh: got 1, allowed: true or false"),
        ("ratio: .nan", "ratio: got NaN, allowed:"),
        ("ratio: .inf", "ratio: got Infinity, allowed: a finite number"),
        ("optim: 3", "r.yaml:1: optim: got 3, allowed: a mapping. Fix: write `key: value` lines"),
        ("agents: {}", "agents: got a mapping, allowed: a list. Fix: write a whole list"),
        ("optim:\n  adam_betas: [0.9]", "optim.adam_betas.1: missing"),
        ("optim:\n  adam_betas:\n  - 0.9\n  - 7", "r.yaml:4: optim.adam_betas.1: got 7, allowed: less than or equal"),
        ("counts: {a: x}", 'counts.a: got "x", allowed: a whole number'),
        ("counts:", "counts: got null, allowed: a mapping"),
    ],
)
def test_wrong_values_say_got_and_allowed(text: str, expected: str) -> None:
    (message,) = problems(text)
    assert expected in message and message.startswith("error: r.yaml:")


@pytest.mark.parametrize(
    ("tuning", "expected"),
    [
        ("{type: loro}", "agents.0.tuning.type: got \"loro\", allowed: 'lora', 'full'. Fix: did you mean 'lora'"),
        ("{rank: 3}", "agents.0.tuning.type: missing. Fix: add it: 'lora' or 'full'"),
        ("lora", 'agents.0.tuning: got "lora", allowed: a mapping'),
        ("{type: full, rank: 3}", "agents.0.tuning.rank: unknown key. Fix: known keys: type"),
        ("{type: lora, rnk: 3}", "agents.0.tuning.rnk: unknown key. Fix: did you mean 'rank'"),
        ("{type: lora, target_modules: 3}", "target_modules: got 3, allowed: a list or 'all-linear'"),
        ("{type: lora, target_modules: [q, 3]}", "agents.0.tuning.target_modules.1: got 3, allowed: text"),
    ],
)
@pytest.mark.parametrize("field", ["tuning", "second"])  # a tagged union, and one that may be null
def test_unions_report_the_field_without_the_tag(field: str, tuning: str, expected: str) -> None:
    (message,) = problems(f"agents:\n  - name: a\n    {field}: {tuning}")
    assert expected.replace("tuning", field) in message and message.startswith("error: r.yaml:3: ")


def test_validators_point_at_the_key_they_name_and_bring_their_own_fix() -> None:
    (message,) = problems("init:\n  num_heads: 4\n  hidden_size: 10")
    assert message.startswith("error: r.yaml:3: init.hidden_size must be num_heads times")
    (message,) = problems("optim: {batch: 16}\nranks: 3")
    assert message == "error: r.yaml:2: ranks must divide optim.batch=16. Fix: set ranks to a divisor."
    (message,) = problems("optim: {batch: 15}", ("ranks=2",))
    assert message.startswith("error: --set ranks=2: ranks must divide optim.batch=15")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nmode: fast\nseed: 2", "r.yaml:3: seed: the key is given again (first at line 1)"),
        ("optim:\n  beta: 1\n  beta: 1", "r.yaml:3: optim.beta: the key is given again (first at line 2)"),
        ("output: !!python/object/apply:os.system ['ls']", "r.yaml:1: output: the tag !!python/object/apply:os.system"),
        ("output: !!python/name:os.system", "the tag !!python/name:os.system is not allowed"),
        ("output: !env HOME", "the tag !env is not allowed"),
        ("output: !!binary aGk=", "the tag !!binary is not allowed"),
        ("agents: &a [{name: x}]\ncounts: *a", "r.yaml:2: counts: the alias *a is not allowed"),
        ("? [a]\n: 1", "a key is not plain text"),
        ("seed: 1\n---\nseed: 2", "r.yaml:2: a second document (---) begins here"),
        ("- 1", "a recipe is a mapping"),
        ("optim: [1", "not valid YAML"),
        ("seed: 1\n\tratio: 2", "r.yaml:2: not valid YAML at column 1"),
        ("seed: 1\nmode: \x01", "r.yaml:2: character U+0001 is not allowed in YAML"),
        ('output: "\\ud800"', "output: the text has a lone surrogate"),
        ("counts: " + "{a: " * 3000, "nested too deeply"),
        ("counts: " + "{a: " * 300 + "}" * 300, "nested too deeply"),
    ],
)
def test_what_yaml_may_not_contain(text: str, expected: str) -> None:
    (message,) = problems(text)
    assert expected in message


def test_yaml_problems_come_together_with_value_problems() -> None:
    found = problems("seed: x\nratio: !!python/none 1\nseed: 3\nratoi: 1")
    assert len(found) == 4  # duplicate, tag, wrong seed, unknown key; nothing about the tagged value itself


def test_a_crafted_tag_runs_nothing(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    problems(f"output: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{target}']]")
    assert not target.exists()


def test_the_environment_is_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "canary")
    recipe = loads("output: $SECRET/${SECRET}\ncounts: {'~': 1}", Recipe)
    assert recipe.output == Path("$SECRET/${SECRET}") and recipe.counts == {"~": 1}


def test_numbers_as_people_write_them() -> None:
    recipe = loads("optim: {learning_rate: 1e-5, beta: 1}\nratio: .5\nseed: 0x10", Recipe)
    assert (recipe.optim.learning_rate, recipe.optim.beta, recipe.ratio, recipe.seed) == (1e-5, 1.0, 0.5, 16)


def test_overrides_reach_lists_missing_blocks_and_whole_blocks() -> None:
    text = "agents:\n  - name: a\n  - name: b\n    tuning: {type: lora, rank: 2}"
    wishes = ["agents.1.tuning.rank=4", "agents.0.tuning={type: full}", "optim.learning_rate=1e-3", "mode=exact"]
    recipe = loads(text, Recipe, wishes)
    assert recipe.agents[1].tuning == LoraSettings(rank=4) and recipe.agents[0].tuning == FullSettings()
    assert recipe.optim.learning_rate == 1e-3 and recipe.mode == "exact"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.bta=1", "--set optim.bta=1: unknown key. Fix: did you mean 'beta'"),
        ("optm.beta=1", "--set optm.beta=1: optm: unknown key. Fix: did you mean 'optim'"),
        ("agents.0.nam=x", "--set agents.0.nam=x: unknown key. Fix: did you mean 'name'"),
        ("agents.5.name=x", "agents is a list of 1 items, '5' is not one. Fix: use an index from 0 to 0"),
        ("agents.first.name=x", "agents is a list of 1 items, 'first' is not one"),
        ("agents.0.name.x=1", 'agents.0.name is "a", it has no fields. Fix: set agents.0.name itself'),
        ("optim.adam_betas.0=0.5", "optim.adam_betas: got a mapping, allowed: a list. Fix: write a whole list"),
        ("seed", "--set seed: expected a.b.c=value"),
        ("=3", "expected a.b.c=value"),
        ("seed=", "--set seed=: got null, allowed: a whole number"),
        ("seed=null", "--set seed=null: got null, allowed: a whole number"),
        ("seed=[", "--set seed=[: not valid YAML"),
        ("seed=!!python/name:os.system", "--set seed=!!python/name:os.system: the tag"),
        ("optim={beta: 1, beta: 2}", "beta: the key is given again"),
    ],
)
def test_bad_overrides(override: str, expected: str) -> None:
    (message,) = problems("agents:\n  - name: a", (override,))
    assert expected in message


def test_defaults_lie_under_the_file_and_a_changed_type_replaces_the_block() -> None:
    defaults = {"seed": 7, "optim": {"beta": 0.3, "epochs": 2}, "agents": [{"name": "a"}]}
    recipe = loads("optim: {epochs: 5}", Recipe, defaults=defaults)
    assert (recipe.seed, recipe.optim.beta, recipe.optim.epochs, recipe.agents[0].name) == (7, 0.3, 5, "a")

    class Block(Settings):
        tuning: Tuning

    lora = {"tuning": {"type": "lora", "rank": 4}}
    assert loads("tuning: {type: full}", Block, defaults=lora).tuning == FullSettings()
    assert loads("tuning: {type: lora, alpha: 2}", Block, defaults=lora).tuning == LoraSettings(rank=4, alpha=2)
    assert problems("{}", model=Block, defaults={"tuning": {"type": "lora", "rank": 0}})[0].startswith(
        "error: defaults: tuning.rank: got 0"
    )


def test_an_empty_recipe_is_all_defaults_and_required_fields_are_named(tmp_path: Path) -> None:
    assert loads("", Recipe) == loads("# only a comment\n", Recipe) == Recipe()
    assert problems("", model=OptimSettings) == ["error: r.yaml: learning_rate: missing. Fix: add it."]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml: No such file"):
        load(tmp_path / "none.yaml", Recipe)
    (tmp_path / "latin.yaml").write_bytes(b"seed: 1\noutput: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin.yaml:2: invalid UTF-8 at byte 19"):
        load(tmp_path / "latin.yaml", Recipe)
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfseed: 1\r\noutput: caf\xc3\xa9\r\n")
    assert load(tmp_path / "bom.yaml", Recipe).output == Path("café")


def test_dump_has_comments_and_loads_back_here_and_elsewhere() -> None:
    recipe = Recipe(
        agents=(Agent(name="on", tuning=FullSettings(), notes=("a: b", "# c", "")), Agent(name="b")),
        optim=PreferenceSettings(learning_rate=1e-5),
        counts={"a b": 1, "null": 2, "3": 3},
    )
    text = dump(recipe, comments=True)
    assert "# How the agent is called." in text and "  # Strength of the pull towards" in text
    assert loads(text, Recipe) == loads(dump(recipe), Recipe) == recipe
    assert yaml.safe_load(text) == recipe.model_dump(mode="json")  # a YAML 1.1 reader sees the same values


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "",
        "~",
        "null",
        "1e-5",
        "0x1",
        "yes",
        "- a",
        "a: b",
        "a #b",
        " x ",
        "{",
        "*a",
        "!!x",
        "a\u2028b\x85\x7f",
        "😀",
        "<<",
    ]
)


@settings(max_examples=150, deadline=None)
@given(TEXT, st.dictionaries(TEXT, st.integers(), max_size=3), st.lists(TEXT, max_size=3), st.floats(1e-300, 1e300))
def test_any_text_and_number_survive_dump_and_load(name: str, counts: dict, notes: list, ratio: float) -> None:
    recipe = Recipe(agents=(Agent(name=name, notes=tuple(notes)),), counts=counts, ratio=ratio)
    assert loads(dump(recipe, comments=True), Recipe) == recipe


@settings(max_examples=150, deadline=None)
@given(st.text(st.sampled_from("sed:optim \n-[]{}\"'#&*!|>%@`,?~1e5.\t"), max_size=40))
def test_any_text_is_a_recipe_or_a_config_error(text: str) -> None:
    try:
        loads(text, Recipe)
    except ConfigError as error:
        assert all(problem.message for problem in error.problems)
