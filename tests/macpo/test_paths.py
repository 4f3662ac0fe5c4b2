"""A path means the same however it is written and wherever a command is given; finished runs need nothing else."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from commands import macpo
from standalone_runs import WORLD, make_base, recipe_of
from tiny import tiny

from macpo import demo_world
from macpo.engine.files import read_json, sha256
from macpo.engine.model_folders import fingerprint_model
from macpo.engine.recipe import dump
from macpo.engine.run.folder import folder_of
from macpo.engine.run.keys import filled
from macpo.method.identities import portable
from macpo.recipe_kinds import load, plan_of

RUNS = Path(__file__).parents[1] / "data" / "finished-runs.tar.xz"
DONE = {"done"}


def make_inputs(top: Path) -> Path:
    """`model/`, `pairs.jsonl`, a template file and a recipe that names them as someone in that folder would."""
    top.mkdir(parents=True, exist_ok=True)
    make_base(top / "model")
    made = demo_world.build(demo_world.WorldSettings(**WORLD), 0, num_teachers=1)
    with open(top / "pairs.jsonl", "w", encoding="utf-8") as file:
        for pair in (*made.student, *made.test):
            messages = [dict(message) for message in pair.prompt.messages]
            file.write(json.dumps({"prompt": messages, "chosen": pair.chosen, "rejected": pair.rejected}) + "\n")
    (top / "mine.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    text = dump(recipe_of("preference", Path("M"), Path("R"), data={"path": "P.jsonl", "test_prompts": 10}))
    assert text.count(f"{Path.cwd()}/") == 2  # output and data; M could be a Hub id
    text = text.replace(f"{Path.cwd()}/R", "runs/first").replace(f"{Path.cwd()}/P.jsonl", "pairs.jsonl")
    text = text.replace("model: M", "model: model").replace("template: vicuna", "template: mine.jinja")
    (top / "recipe.yaml").write_text(text)
    return top


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the inputs, with a finished run in `runs/first`; tests leave it as it is."""
    top = make_inputs(tmp_path_factory.mktemp("paths") / "with blank ü")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(top)
        assert macpo("run", "recipe.yaml") == 0
    return top


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def states(capsys: pytest.CaptureFixture[str]) -> set[str]:
    return {line.split()[0] for line in capsys.readouterr().out.splitlines()}


def test_the_stored_recipe_has_no_relative_path(finished: Path) -> None:
    stored = load(finished / "runs/first")
    assert stored.output == str(finished / "runs/first") and stored.data.path == str(finished / "pairs.jsonl")
    assert stored.agents[0].model == str(finished / "model") and stored.template == str(finished / "mine.jinja")


@pytest.mark.parametrize("spelling", ["{}", "{}/", "{}/../first", "link"])
def test_status_and_run_from_another_folder(
    finished: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str], spelling: str
) -> None:
    (elsewhere / "link").symlink_to(finished / "runs/first")
    named = spelling.format(finished / "runs/first")
    assert macpo("status", named) == 0 and states(capsys) == DONE
    assert macpo("run", named) == 0
    assert "nothing to do" in capsys.readouterr().err and os.listdir(elsewhere) == ["link"]


def test_status_is_the_same_for_other_spellings_of_the_inputs(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished)
    monkeypatch.setenv("HOME", str(finished))
    copy = shutil.copytree(finished / "model", finished.parent / "copy", dirs_exist_ok=True)
    spelled = ["data.path=~/pairs.jsonl", "model=./model/", "template='~/mine.jinja'", "output=~/runs/first"]
    assert macpo("status", "~/recipe.yaml", *(f"--set={one}" for one in spelled)) == 0 and states(capsys) == DONE
    assert macpo("status", "recipe.yaml", f"--set=model={copy}") == 0 and states(capsys) == DONE


def test_another_content_at_the_same_path_is_stale(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The template's text counts too, not its name."""
    top = shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(top)
    assert macpo("status", "recipe.yaml") == 0 and states(capsys) == DONE
    (top / "mine.jinja").write_text((top / "mine.jinja").read_text().replace("': '", "'> '"))
    assert macpo("status", "recipe.yaml") == 0
    said = capsys.readouterr().out
    assert "stale" in said and "agent.template" in said and said.splitlines()[0].startswith("done")
    (top / "pairs.jsonl").write_text((top / "pairs.jsonl").read_text().partition("\n")[2])
    assert macpo("status", "recipe.yaml") == 0
    assert "data.path: " in capsys.readouterr().out.splitlines()[0]


def test_a_moved_run_needs_neither_data_nor_base_model(
    finished: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    top = shutil.copytree(finished, elsewhere / "before")
    moved = shutil.copytree(finished / "runs/first", elsewhere / "moved ü")
    text = (moved / "recipe.yaml").read_text().replace(str(finished), str(top / "gone"))
    (moved / "recipe.yaml").write_text(text)
    assert macpo("status", moved) == 0
    said = capsys.readouterr()
    assert {line.split()[0] for line in said.out.splitlines()} == DONE
    assert "gone/model is not here" in said.err and "gone/pairs.jsonl is not here" in said.err
    assert macpo("run", moved) == 0 and "nothing to do" in capsys.readouterr().err
    assert macpo("report", moved) == 0 and "preference accuracy" in capsys.readouterr().out
    assert macpo("export", moved, "--out", elsewhere / "out") == 0
    assert "its logits are not compared" in capsys.readouterr().out
    policy = folder_of(moved, "train-policy") / "policy"
    assert all(
        sha256(policy / path.name) == sha256(path) for path in (elsewhere / "out").iterdir() if path.stem != "README"
    )
    assert macpo("export", moved, "--merge", "--out", elsewhere / "merged") == 2
    assert "put the model back, or export the adapter without --merge" in capsys.readouterr().err
    assert macpo("run", moved, "--set", "training.epochs=2", "--rerun-stale") == 2  # there is work, so they are needed
    assert "gone/pairs.jsonl" in capsys.readouterr().err


def test_runs_of_earlier_versions_with_relative_paths(
    elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their `output` is relative: the folder that is named is the run's, moved or not."""
    with tarfile.open(RUNS) as archive:
        archive.extractall(tmp_path / "runs", filter="data", members=(m for m in archive if m.name.startswith("sft")))
    assert macpo("status", "../runs/sft") == 0 and states(capsys) == DONE
    shutil.move(tmp_path / "runs/sft", tmp_path / "other")
    assert macpo("status", tmp_path / "other/") == 0 and states(capsys) == DONE
    assert macpo("run", tmp_path / "other") == 0 and "nothing to do" in capsys.readouterr().err
    assert os.listdir(elsewhere) == []


def test_manifests_of_earlier_versions_say_the_same(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They name paths as they were written, and their identities beside them."""
    monkeypatch.chdir(finished)
    stage = plan_of(load(finished / "recipe.yaml")).graph.stage("train-policy")
    written = json.loads(json.dumps(stage.settings))
    written["agent"] |= {"model": "model", "template": "mine.jinja"}
    written["weights"] = {"model": fingerprint_model("model")}
    assert portable(written) == stage.settings == portable(stage.settings)
    data = {"data": {"path": "a.jsonl"}, "teachers": {"a.jsonl": "b.jsonl"}, "files": {"a.jsonl": "1", "b.jsonl": "2"}}
    assert portable(data) == {"data": {"path": "1"}, "teachers": {"a.jsonl": "2"}, "files": {}}
    served = {"served": {"model": "m"}, "agent": {"name": "m", "model": "m"}, "weights": {"m": "1"}}
    assert portable(served)["served"] == {"model": "m"} and portable(served)["agent"] == {"name": "m", "model": "1"}


def test_arms_and_every_other_path_field_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("m", "pos", "neg"):
        (tmp_path / name).mkdir()
    text = dump(tiny(tmp_path / "run"))
    (tmp_path / "recipe.yaml").write_text(text)
    changes = {
        "data": "{path: ~/d.jsonl, teacher_prompts: 3}",
        "teachers.0": "{name: t, model: m, positive: ./pos, negative: neg/, data: d.jsonl, template: ~/t.jinja}",
        "student.init.corpus": "corpus.txt",
        "student_training.preference.reference_model": "owner/name",
        "compute.cache": "~/cache",
        "ablations": "{x: {student.init.corpus: other.txt, use_teachers: [t]}, y: {student_training: "
        "{preference: {reference_model: m}}}}",
    }
    made = load(tmp_path / "recipe.yaml", [f"{name}={value}" for name, value in changes.items()])
    assert made.recipe == "macpo"
    home, teacher = tmp_path / "home", made.teachers[0]
    assert made.data.path == f"{home}/d.jsonl" and made.compute.cache == f"{home}/cache"
    assert (teacher.model, teacher.positive, teacher.negative) == tuple(f"{tmp_path}/{n}" for n in ("m", "pos", "neg"))
    assert (teacher.data, teacher.template) == (f"{tmp_path}/d.jsonl", f"{home}/t.jinja")
    assert made.student.init is not None and made.student.init.corpus == f"{tmp_path}/corpus.txt"
    assert made.student_training.preference.reference_model == "owner/name"
    assert made.ablations["x"] == {"student.init.corpus": f"{tmp_path}/other.txt", "use_teachers": ["t"]}
    assert made.ablations["y"] == {"student_training": {"preference": {"reference_model": f"{tmp_path}/m"}}}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("data.path=file:///x/y%20z.jsonl", "a URL in the place of a path. Fix: write '/x/y z.jsonl'"),
        ("output=s3://bucket/run", "Fix: download it and give its path, or name a Hub id"),
        ("data.test_path=hf://datasets/a/b", "Fix: write the Hub id, owner/name"),
        ("model=https://huggingface.co/a/b", "a URL in the place of a path"),
        ("output=''", "got an empty path"),
        ("compute.cache=~nobody-here/x", "that user has no home folder here"),
    ],
)
def test_what_is_no_path_is_refused_by_name(
    finished: Path, capsys: pytest.CaptureFixture[str], setting: str, said: str
) -> None:
    assert macpo("status", finished / "recipe.yaml", "--set", setting) == 2
    error = capsys.readouterr().err
    assert said in error and setting.partition("=")[0] in error


def test_a_report_that_cannot_be_written_still_prints(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished / "runs/first", tmp_path / "run")
    (run / "report.html").unlink()
    (run / "report.html").mkdir()  # root may write into folders without permission, but not replace this
    assert macpo("report", run) == 2
    said = capsys.readouterr()
    assert "preference accuracy" in said.out and "name another file with --out" in said.err
    assert macpo("report", run, "--out", tmp_path / "r.html") == 0 and (tmp_path / "r.html").stat().st_size > 10_000
    assert read_json(run / "summary.json")["agents"]


@pytest.mark.parametrize("date", ["", "{{ strftime_now('%d %b %Y') }}"])
def test_a_date_is_unknown_where_its_template_is(date: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is not here may have a template that writes a date: what the stage recorded holds."""
    top = make_inputs(tmp_path / "top")
    (top / "model/chat_template.jinja").write_text(date + (top / "mine.jinja").read_text())
    monkeypatch.chdir(top)
    recipe = load(top / "recipe.yaml", ["template=auto"])
    before = plan_of(recipe).graph.stage("train-policy").settings
    assert ("template_date" in before["agent"]) == bool(date)
    (top / "model").rename(tmp_path / "away")
    now = plan_of(recipe, must_exist=False).graph.stage("train-policy").settings
    assert now != before and filled(now, before) == filled(before, now)
