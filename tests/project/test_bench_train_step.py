"""The training benchmark: end to end at toy sizes, what its file holds, and that rivals that differ do not count."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from bench import bench_train_step as bench
from bench.inputs.hh import HH
from bench.inputs.pairs import EOS, load_pairs
from bench.peers.trainers import DEFAULTS, OURS, Outcome, Setup, Work, best, best_for, model_of

ROOT = Path(__file__).resolve().parents[2]

CPU = torch.device("cpu")
FULL, *_, ADAPTER = bench.CASES["small"]


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_every_rival_runs_and_agrees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Full and LoRA tuning, float32 and bfloat16; both of TRL's settings are checked, then timed."""
    options = ["--shapes", "small", "--device", "cpu", "--rounds", "2", "--data", "generated"]
    path = bench.main([*options, "--json-dir", str(tmp_path)])
    shown = capsys.readouterr().out
    body = json.loads(path.read_text())
    assert path.parent == tmp_path and body["device"].startswith("CPU ") and {"torch", "trl"} <= set(body["versions"])
    assert [case["name"] for case in body["cases"]] == [case.name for case in bench.CASES["small"]]
    for case in body["cases"]:
        assert case["name"] in shown and case["data"]["source"].startswith("generated")
        assert case["rounds"] == len(case["floor_s"]) == len(case["useful_tokens"]) == 2
        assert [result["rival"] for result in case["results"]] == [OURS.name, DEFAULTS.name, best(2).name]
        ours = case["results"][0]["seconds"]
        for result in case["results"]:
            assert (result["status"], result["reason"]) == ("ok", "")
            ratios = sorted(a / b for a, b in zip(result["seconds"], ours, strict=True))
            assert result["times_ours"] == pytest.approx(sum(ratios) / 2)
            assert ratios[0] <= result["times_ours_quartiles"][0] <= result["times_ours_quartiles"][1] <= ratios[1]
            assert result["first_loss"] == pytest.approx(0.693147, abs=1e-4)
            assert result["peak_bytes"] > 4 * case["model"]["parameters"] and 0 < result["share_of_floor"] < 1
            assert result["rival"] in shown and result["pairs_per_s"] > 0 < result["useful_tokens_per_s"]


def test_a_pretrained_model_takes_part_with_its_own_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "Model-1"
    data = load_pairs(None, 600, 64, 40)
    LlamaForCausalLM(FULL.config()).save_pretrained(folder)
    data.tokenizer.save_pretrained(folder)
    case = bench.pretrained(str(folder), torch.float32)
    assert (case.name, case.model["hidden_size"]) == ("Model-1 full fp32", 32) and case.folder == str(folder)
    assert bench.data_of(case, None).tokenizer.get_vocab() == data.tokenizer.get_vocab()
    options = ["--model", str(folder), "--device", "cpu", "--rounds", "1", "--rivals", "8 pairs", "--data", "generated"]
    path = bench.main([*options, "--json-dir", str(tmp_path)])
    assert path.name == "train_step-Model-1-float32.json"
    (entry,) = json.loads(path.read_text())["cases"]
    assert [(result["rival"], result["status"]) for result in entry["results"]] == [
        (OURS.name, "ok"), (best(8).name, "ok"),
    ]  # fmt: skip


def test_trl_is_given_every_micro_batch_that_divides_a_step() -> None:
    assert [rival.micro for rival in best_for(8)] == [2, 4, 8]
    assert [rival.micro for rival in best_for(6)] == [2]
    data = load_pairs(None, 600, 64, 40)
    setup = Setup(FULL.config(), "full", torch.float32, CPU, 4, data)
    found = [rival.run(setup, Work([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7])) for rival in best_for(4)]
    for outcome in found:
        assert outcome.losses == pytest.approx(found[0].losses, abs=1e-5) and len(outcome.losses) == 2


def test_a_round_has_the_same_pairs_for_all_sorted_and_shuffled() -> None:
    data = load_pairs(None, 600, bench.MAX_LENGTH, 200)
    case = dataclasses.replace(FULL, steps=4, pairs_per_step=8)
    rounds = [bench.draw(data, case, number) for number in range(3)]
    assert rounds[0] == bench.draw(data, case, 0) != rounds[1] != rounds[2]
    for work in rounds:
        assert sorted(work.shuffled) == sorted(work.by_length) and len(set(work.shuffled)) == 32
        lengths = [data.groups[i].max_length for i in work.by_length]
        assert lengths == sorted(lengths)
        spans = [max(part) - min(part) for part in (lengths[k : k + 8] for k in (0, 8, 16))]
        assert max(spans) < 40 < lengths[-1] - lengths[0]


def test_what_differs_from_ours_is_wrong() -> None:
    work = Work([3, 1, 0, 2], [0, 1, 2, 3])
    logps = torch.tensor([[-40.0, -50.0], [-41.0, -51.0], [-42.0, -52.0], [-43.0, -53.0]])
    ours = Outcome(losses=[0.6931, 0.5], ref_logps=logps)  # rows of the pairs 3, 1, 0, 2
    same = Outcome(losses=[0.6931, 0.9], ref_logps=logps[[2, 1, 3, 0]])
    assert bench.judge(FULL, best(2), ours, same, work) == "", "another order has other losses after the first step"
    assert "step 2" in bench.judge(FULL, DEFAULTS, ours, same, work)
    assert "step 1" in bench.judge(FULL, best(2), ours, Outcome(losses=[0.7, 0.5]), work)
    assert "step 1" in bench.judge(FULL, best(2), ours, Outcome(losses=[float("nan"), 0.5]), work)
    assert "1 losses" in bench.judge(FULL, DEFAULTS, ours, Outcome(losses=[0.6931]), work)
    unsorted = Outcome(losses=same.losses, ref_logps=logps)
    assert "log-probs" in bench.judge(FULL, best(2), ours, unsorted, work)


def test_a_rival_that_fails_or_differs_is_named_and_not_timed() -> None:
    data = load_pairs(None, 600, bench.MAX_LENGTH, 100)
    broken = dataclasses.replace(DEFAULTS, name="broken", trl={"max_length": -1, "optim": "none such"})
    wrong = dataclasses.replace(DEFAULTS, name="another loss", trl={"loss_type": ["ipo"]})
    case = dataclasses.replace(FULL, only=(OURS, broken, wrong))
    entry = bench.run_case(case, data, CPU, 1, 0.0, lambda _: None)
    status = {result["rival"]: result for result in entry["results"]}
    assert status["broken"]["status"] == "absent" and "none such" in status["broken"]["reason"]
    assert status["another loss"]["status"] == "wrong" and "step 1" in status["another loss"]["reason"]
    assert not status["broken"]["seconds"] and not status["another loss"]["seconds"]
    lines = "\n".join(bench.table(entry))
    assert "absent: " in lines and "wrong: loss" in lines


def test_models_are_those_that_the_targets_name() -> None:
    sizes = {}
    for shapes in ("issue", "gpu"):
        for case in bench.CASES[shapes]:
            sizes[case.name] = bench.ModelShape.of(case.config()).num_parameters
            assert case.pairs_per_step == {"issue": 8, "gpu": 16}[shapes]
    assert sizes["21M full fp32"] == sizes["21M full bf16"] == pytest.approx(21e6, rel=0.02)
    assert sizes["Llama-3-8B lora bf16"] == pytest.approx(8.03e9, rel=0.001)
    assert sizes["Llama-3-1B full bf16"] == pytest.approx(1.236e9, rel=0.001)


def test_a_model_starts_with_the_same_weights_every_time() -> None:
    data = load_pairs(None, 600, bench.MAX_LENGTH, 4)
    setup = Setup(ADAPTER.config(), "lora", torch.float32, CPU, 2, data)
    first, second = (model_of(setup, half_base=True).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any("lora_A" in name for name in first)


def test_pairs_of_files_are_read_split_and_tokenised(tmp_path: Path) -> None:
    def row(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
        return {name: f"{prompt}\n\nAssistant: {text}" for name, text in (("chosen", chosen), ("rejected", rejected))}

    rows = [
        row("\n\nHuman: why is the sky blue?", "because of air ", "it is not"),
        row("\n\nHuman: hello\n\nAssistant: hi\n\nHuman: bye", "good bye", "no"),
        row("\n\nHuman: same", "one", "one"),
        row("\n\nHuman: none", "one", " "),
        row("\n\nHuman: long" + " long" * 50, "one", "two"),
    ]
    for name in ("harmless-base", "helpful-base"):
        (tmp_path / name).mkdir()
        with gzip.open(tmp_path / name / "test.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(each) + "\n" for each in rows)
    data = load_pairs(tmp_path, 400, 48, 0)
    assert [pair.chosen for pair in data.pairs] == [" because of air", " good bye"], "equal, empty and long ones go"
    for pair, group in zip(data.pairs, data.groups, strict=True):
        text = [data.tokenizer.decode(ids) for ids in (group.prompt_ids, *group.responses)]
        assert text == [pair.prompt, pair.chosen + EOS, pair.rejected + EOS]
        assert group.max_length <= 48


@pytest.mark.skipif(not HH.exists(), reason="the HH-RLHF files are not beside the checkout")
def test_generated_lengths_are_those_of_real_pairs() -> None:
    real, generated = (load_pairs(folder, 32000, 1024, 1600).describe() for folder in (HH, None))
    assert real["pairs"] > 1500 and "HH-RLHF" in real["source"]
    for name in ("mean_prompt_tokens", "mean_response_tokens", "unshared_over_shared_tokens"):
        assert generated[name] == pytest.approx(real[name], rel=0.05), name
