"""The recipes of the paper's three data sets follow the authors' published scripts, but for what they say themselves.

The numbers are those of github.com/youganglyu/MACPO @3c76746, scripts/*/strong_students/{pos_initial,neg_initial,
pos_stage1,test}.sh: 8 GPUs x per_device_train_batch_size x gradient_accumulation_steps, and so on.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from macpo.config import Recipe
from macpo.engine import recipe as recipes
from macpo.engine.config import LoraSettings
from macpo.engine.recipe import dump
from macpo.method.identities import Identities
from macpo.methods.registry import build_plan

FOLDER = Path(__file__).parents[3] / "recipes"
# template of every script, file of test prompts, first SFT: 8 x 2 x accumulation
SCRIPTS = {
    "hh-helpful": ("vicuna", "helpful-base", 2000, 8 * 2 * 2),
    "hh-harmless": ("vicuna", "harmless-base", 2000, 8 * 2 * 1),
    "pku-saferlhf": ("alpaca", None, 1000, 8 * 2 * 2),
}
OURS = {"vicuna": "vicuna-system", "alpaca": "alpaca"}
"""Which of our templates is llmtuner's: its vicuna always writes the system sentence."""


@pytest.fixture(params=SCRIPTS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def recipe(name: str) -> Recipe:
    return recipes.load(FOLDER / f"{name}.yaml", Recipe)


def test_numbers_are_the_scripts(name: str, recipe: Recipe) -> None:
    template, subset, num_test, first_batch = SCRIPTS[name]
    assert recipe.template == OURS[template] and all(agent.template is None for agent in recipe.agents)
    student, teachers = recipe.student_training, recipe.teacher_training
    for training in (student, teachers):
        assert (training.positive.learning_rate, training.positive.epochs) == (5e-5, 3)
        assert (training.negative.learning_rate, training.negative.epochs, training.negative.batch) == (5e-5, 1, 32)
        preference = training.preference
        assert (preference.learning_rate, preference.epochs, preference.batch) == (1e-5, 1, 8 * 2 * 1)
        assert (preference.loss, preference.beta, preference.sft_weight) == ("sigmoid", 0.1, 0.2)
        assert preference.reference == "adapter-off" and preference.reference_model is None
        assert {each.schedule for each in (training.positive, training.negative, preference)} == {"cosine"}
    assert student.positive.batch == first_batch and teachers.positive.batch == 32
    for agent in recipe.agents:
        assert isinstance(agent.tuning, LoraSettings)
        assert (agent.tuning.rank, agent.tuning.alpha) == (8, 16)
        assert list(agent.tuning.target_modules) == ["q_proj", "v_proj"]
    sampling = recipe.sampling
    drawn = (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_new_tokens)
    assert drawn == (0.95, 0.7, 50, 512) and recipe.context_tokens == 1024 and recipe.iterations == 3
    data = recipe.data
    assert (data.subset, data.split, data.test_split, data.test_prompts) == (subset, "train", "test", num_test)
    assert (data.teacher_prompts, data.student_prompts, data.dev_prompts) == (5000, 5000, 200)


def test_what_differs_is_said_in_the_recipe(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text()
    head = re.sub(r"\n# ?", " ", text.split("\nseed:")[0])
    said = ["loses its beginning", "8 bits", "no --bf16", "without EOS", "teachers' scripts are not published"]
    said += ["Llama 3's prompts have a blank", "nobody trains on them", "adapter switched off", "llmtuner 0.5.3"]
    said += ["flattened into one turn"] if name.startswith("hh") else []  # PKU's prompts are single turns
    assert not [words for words in said if words not in head]


def test_the_published_pairs_of_a_round_are_scored_once_more(recipe: Recipe, tmp_path: Path) -> None:
    """The adapter-off reference is another model than the one that filters, so its log-probs are its own."""
    plan = build_plan(recipe, Identities(must_exist=False))
    work = plan.graph.stage("iter1-llama2-70b-train").work
    assert '"adapter-off"' in work.model_dump_json() and "reference: adapter-off" in dump(recipe)
    assert sorted(plan.development) == sorted(teacher.name for teacher in recipe.teachers)
