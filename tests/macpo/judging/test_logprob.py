"""A local judge against a brute force in float64: the whole dialogue through the model, softmax of its last row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import save_byte_model
from forks import ranks
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM

from macpo.engine.config import ComputeSettings
from macpo.engine.distributed.world import World
from macpo.engine.errors import ConfigError, Stopped
from macpo.engine.files import read_jsonl
from macpo.judging.logprob import LogprobJudge, VerdictModel
from macpo.judging.questions import Comparison, JudgePrompt
from macpo.judging.replies import Replies
from macpo.judging.settings import LocalJudge
from macpo.judging.verdicts import JudgeError, Judgement

COMPUTE = ComputeSettings(device="cpu", threads=1, score_tokens=512)
POSITIONS = 320
SEED = 9
"""Of a model that says A to some questions and B to others."""
ITEMS = [
    Comparison(f"p{i}", ({"role": "user", "content": f"say {i}"},), "yes " * (i % 3), "no " + "x" * i) for i in range(7)
] + [Comparison("same", ({"role": "user", "content": "say"},), "one", "one")]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def save_judge(folder: Path, *, merged: bool = False, seed: int = 0) -> Path:
    return save_byte_model(folder, verdict_tokens=merged, positions=POSITIONS, seed=seed)


def prompt_file(folder: Path) -> Path:
    path = folder / "prompt.txt"
    if not path.exists():
        path.write_text("{conversation}\n1 {a}\n2 {b}\n[[A]] or [[B]]?")
    return path


def judge_of(folder: Path, replies: Replies | None, world: World | None = None, **options: Any) -> LogprobJudge:
    settings = LocalJudge(
        name="local", mode="logprob", model=str(folder / "judge"), template="plain", dtype="float32", **options
    )
    prompt = JudgePrompt(str(prompt_file(folder)), "at once")
    return LogprobJudge(VerdictModel(settings, COMPUTE), prompt, replies, world or World())


def judged(folder: Path, items: list[Comparison] = ITEMS, **options: Any) -> list[Judgement]:
    with Replies(folder / "replies.jsonl") as replies:
        return judge_of(folder, replies, **options).compare(items)


def brute_force(folder: Path, questions: list[str]) -> list[tuple[float, float]]:
    """Log-probs of A and B behind each question and `[[`, by transformers in float64, each in a pass of its own."""
    chat = judge_of(folder, None).model.chat
    model = AutoModelForCausalLM.from_pretrained(folder / "judge", dtype=torch.float64).eval()
    found = []
    for question in questions:
        prompt = chat.prompt_ids([{"role": "user", "content": question}])
        both = []
        for letter in "AB":
            ids = chat.tokenizer.encode(f"[[{letter}]]", add_special_tokens=False)
            at = len(ids) - 3  # `[[A ] ]` or `[[ A ] ]`: where the letter stands
            with torch.no_grad():
                rows = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
            both.append(float(rows[len(prompt) + at - 1, ids[at]]))
        found.append((both[0], both[1]))
    return found


@pytest.mark.parametrize("merged", [False, True])  # the letter a token of its own, or one with what stands before it
def test_verdicts_are_those_of_float64(tmp_path, merged):
    save_judge(tmp_path / "judge", merged=merged, seed=SEED)
    found = judged(tmp_path)
    prompt = JudgePrompt(str(prompt_file(tmp_path)), "at once")
    rows = {row["key"]: row for _, row in read_jsonl(tmp_path / "replies.jsonl")}
    assert len(rows) == 2 * 7 and not found[-1].asked
    questions = [question for item in ITEMS[:7] for question in prompt.questions(item)]
    orders = [order for each in found[:7] for order in (each.ours_first, each.theirs_first)]
    for (a, b), order in zip(brute_force(tmp_path, questions), orders, strict=True):
        row = rows[order.reply_ids[0]]["logps"]
        assert (row["A"], row["B"]) == pytest.approx((a, b), abs=1e-4)
        assert order.verdict == ("A" if a > b else "B")
    assert {order.verdict for order in orders} == {"A", "B"}
    wide = judged(tmp_path, margin=100.0)  # the same log-probs under another margin
    assert {each.outcome for each in wide} == {"tie"}
    assert sum(1 for _ in read_jsonl(tmp_path / "replies.jsonl")) == 14


def test_it_resumes_behind_its_last_wave(tmp_path, monkeypatch):
    save_judge(tmp_path / "judge")
    monkeypatch.setattr("macpo.judging.logprob.WAVE", 4)
    whole = judged(tmp_path)
    keys = [row["key"] for _, row in read_jsonl(tmp_path / "replies.jsonl")]
    (tmp_path / "replies.jsonl").unlink()
    with Replies(tmp_path / "replies.jsonl") as replies:
        judge = judge_of(tmp_path, replies)
        waves: list[int] = []
        judge.count = lambda responses=0, tokens=0: waves.append(responses)
        judge.should_stop = lambda: len(waves) == 2
        with pytest.raises(Stopped):
            judge.compare(ITEMS)
    assert sum(1 for _ in read_jsonl(tmp_path / "replies.jsonl")) == 8
    resumed = judged(tmp_path)
    assert [each.outcome for each in resumed] == [each.outcome for each in whole]
    assert [row["key"] for _, row in read_jsonl(tmp_path / "replies.jsonl")] == keys


def test_other_weights_or_another_template_are_asked_again(tmp_path):
    save_judge(tmp_path / "judge")
    first = judge_of(tmp_path, None).keyed(ITEMS)
    assert first == judge_of(tmp_path, None, margin=3.0).keyed(ITEMS) and len({key for key, _ in first}) == 14
    save_judge(tmp_path / "judge", seed=1)
    second = judge_of(tmp_path, None)
    assert not {key for key, _ in first} & {key for key, _ in second.keyed(ITEMS)}
    settings = second.model.settings.model_copy(update={"template": "vicuna"})
    other = LogprobJudge(VerdictModel(settings, COMPUTE), second.prompt, None)
    assert not {key for key, _ in second.keyed(ITEMS)} & {key for key, _ in other.keyed(ITEMS)}


def test_a_question_beyond_the_positions_fails_and_is_not_cut(tmp_path):
    save_judge(tmp_path / "judge")
    long = [Comparison("long", ({"role": "user", "content": "x" * POSITIONS},), "a", "b")]
    with pytest.raises(JudgeError, match="1 of the first 8"):
        judged(tmp_path, ITEMS[:7] + long)
    found = judged(tmp_path, ITEMS[:7] + long, max_failure_rate=0.2)
    assert [each.outcome == "failed" for each in found] == [False] * 7 + [True]
    errors = [row["error"] for _, row in read_jsonl(tmp_path / "replies.jsonl") if "error" in row]
    assert errors and all(f"{POSITIONS} fit" in error for error in errors)


def test_two_ranks_judge_as_one(tmp_path):
    save_judge(tmp_path / "judge")
    (tmp_path / "two").mkdir()
    alone = [each.outcome for each in judged(tmp_path)]

    def body(world: World) -> None:
        replies = Replies(tmp_path / "two" / "replies.jsonl") if world.is_main else None
        assert [each.outcome for each in judge_of(tmp_path, replies, world).compare(ITEMS)] == alone

    assert ranks(2, body) == [0, 0]
    rows = [
        {row["key"]: row["logps"] for _, row in read_jsonl(folder / "replies.jsonl")}
        for folder in (tmp_path, tmp_path / "two")
    ]
    assert rows[0].keys() == rows[1].keys()
    assert all(rows[0][key]["A"] == pytest.approx(rows[1][key]["A"], abs=1e-5) for key in rows[0])


def test_verdicts_of_several_tokens_are_refused(tmp_path):
    """A tokenizer for which `A]]` is one token and `B]]` is two."""
    save_judge(tmp_path / "judge")
    path = tmp_path / "judge" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    vocab = tokenizer.get_vocab()
    merges = [("[", "["), ("]", "]"), ("A", "]]")]
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges[1:])}
    raw = Tokenizer(models.BPE(vocab, merges))
    raw.pre_tokenizer, raw.decoder = tokenizer.pre_tokenizer, tokenizer.decoder
    raw.save(str(path))
    with pytest.raises(ConfigError, match="differ by more than one token"):
        judge_of(tmp_path, None)
