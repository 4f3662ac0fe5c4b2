"""metrics.jsonl and timing.jsonl: what a row holds, what is cut at a resume, rates and MFU by hand, what people see."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import model_of, some_groups
from forks import ranks

from macpo.engine import hardware
from macpo.engine.config import LoraSettings, OptimSettings
from macpo.engine.data.groups import PrefixGroup
from macpo.engine.distributed.world import World
from macpo.engine.errors import IntegrityError, Stopped
from macpo.engine.hardware import GPUS
from macpo.engine.models.flops import ModelShape
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.tuning.lora import new_adapter
from macpo.engine.processes import StopFlag
from macpo.engine.training.metrics import MetricsLog, verify
from macpo.engine.training.objectives import sft
from macpo.engine.training.throughput import Meter, Work, peak_memory, reset_peak_memory, tuning_of
from macpo.engine.training.token_budget import TokenBudget
from macpo.engine.training.trackers import Trackers
from macpo.engine.training.trainer import train

CPU = torch.device("cpu")
PAIRS = [PrefixGroup([1, 2, 3], [[4, 5], [6, 7, 8]]), PrefixGroup([1], [[4], [6, 7]])]  # 8 and 4 tokens


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def row(step: int, loss: float = 1.0) -> dict[str, Any]:
    return {"step": step, "tokens": 10, "loss": loss}


# --- rows ---


@pytest.mark.parametrize(
    "damage", ["", '{"step": 1}\n', "flip", "[1]\n", '{"step": "x"}\n', "[" * 100_000 + "\n", None]
)
def test_a_log_that_lost_rows_of_saved_steps_is_found_at_the_resume(tmp_path: Path, damage: str | None) -> None:
    """Its rows are part of the result, and the checkpoint does not hold them; rows after the step do not matter."""
    path = tmp_path / "metrics.jsonl"
    good = "".join(json.dumps(row(step)) + "\n" for step in (1, 2))
    digest = hashlib.sha256(good.encode()).hexdigest()
    path.write_text(good + json.dumps(row(3)) + '\n{"st')
    verify(tmp_path, 2, digest)
    assert path.read_text() == good
    if damage is None:
        path.unlink()
    else:
        path.write_text(good.replace("1.0", "1.5") if damage == "flip" else damage)
    with pytest.raises(IntegrityError, match=f"not as it was when step 2 was saved. Fix: delete {tmp_path}"):
        verify(tmp_path, 2, digest)


@pytest.mark.parametrize("content", ["", "[]", '{"microbatch_tokens": "x"}', "[" * 100_000, None, '{"a": 1}'])
def test_a_note_about_memory_of_any_shape_is_ignored(tmp_path: Path, content: str | None) -> None:
    note = tmp_path / "microbatch.json"
    note.mkdir() if content is None else note.write_text(content)
    budget = TokenBudget(64, tmp_path, World())
    budget.recall()
    assert budget.tokens == 64


def test_a_step_has_a_row_in_each_file_and_only_one_of_them_holds_times(tmp_path: Path) -> None:
    for run in ("a", "b"):
        with MetricsLog(tmp_path / run, step=0, planned=3, meter=Meter(PAIRS, CPU)) as log:
            for step in (1, 2, 3):
                log.write(row(step) | ({"spike": 7.5} if step == 2 else {}), [0, 1])
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == (tmp_path / "b" / "metrics.jsonl").read_bytes()
    assert lines(tmp_path / "a" / "metrics.jsonl") == [row(1), row(2) | {"spike": 7.5}, row(3)]
    timing = lines(tmp_path / "a" / "timing.jsonl")
    assert [each["step"] for each in timing] == [1, 2, 3]
    assert set(timing[0]) == {"step", "seconds", "tokens_per_s", "pairs_per_s", "peak_memory_bytes"}, "no mfu on a CPU"


def test_rows_after_the_checkpoint_and_torn_ones_are_cut(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, step=0, planned=9) as log:
        for step in range(1, 6):
            log.write(row(step))
    with (tmp_path / "timing.jsonl").open("a") as file:
        file.write('{"step": 6, "sec')
    with MetricsLog(tmp_path, step=3, planned=9) as log:
        log.write(row(4, loss=2.0))
    assert lines(tmp_path / "metrics.jsonl") == [row(1), row(2), row(3), row(4, loss=2.0)]
    assert [each["step"] for each in lines(tmp_path / "timing.jsonl")] == [1, 2, 3, 4]


def test_the_time_of_a_checkpoint_is_not_that_of_a_step(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, step=0, planned=2) as log:
        log.write(row(1))
        with log.saving():
            time.sleep(0.3)
        log.write(row(2))
    first, second = lines(tmp_path / "timing.jsonl")
    assert "save_seconds" not in first
    assert second["save_seconds"] >= 0.3 and second["seconds"] < 0.3


def test_the_trainer_fills_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "of_device", lambda device: GPUS["H100"])
    documents = some_groups(num_responses=1, count=8)
    settings = OptimSettings(learning_rate=1e-3, batch=4, save_every_steps=1)
    policy = PolicyModule(model_of("llama"))
    train(policy, documents, sft(), settings, seed=1, workdir=tmp_path)
    assert {"step", "epoch", "lr", "loss", "grad_norm", "tokens"} <= set(lines(tmp_path / "metrics.jsonl")[0])
    tokens = [each["tokens"] for each in lines(tmp_path / "metrics.jsonl")]
    assert sum(tokens) == sum(group.num_tokens for group in documents)
    for count, each in zip(tokens, lines(tmp_path / "timing.jsonl"), strict=True):
        assert each["tokens_per_s"] == pytest.approx(count / each["seconds"], rel=0.01)
        assert each["sequences_per_s"] == pytest.approx(4 / each["seconds"], rel=0.01)
        assert 0 <= each["mfu"] < 0.01 and each["peak_memory_bytes"] > 10**7
    assert lines(tmp_path / "timing.jsonl")[1]["save_seconds"] > 0


# --- rates ---


def test_rates_by_hand() -> None:
    found = Meter(PAIRS, CPU).rates([0, 1, 0], seconds=2.0)
    assert found["tokens_per_s"] == 10.0 and found["pairs_per_s"] == 1.5
    assert Meter(some_groups(num_responses=1, count=4), CPU).rates([0, 1], 4.0)["sequences_per_s"] == 0.5


def test_mfu_by_hand() -> None:
    """Full tuning: 6 FLOP a weight and token, 12 · layers · width a pair of tokens that see each other."""
    config = model_of("llama").config
    hidden, layers, vocab = config.hidden_size, config.num_hidden_layers, config.vocab_size
    width = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    block = 2 * hidden * width + 2 * hidden * kv + 3 * hidden * config.intermediate_size
    tokens, rows = 8, 5
    attended = (1 + 2 + 3) + (4 + 5) + (4 + 5 + 6)  # the prompt, the chosen response, the rejected one
    flops = 6 * (layers * block * tokens + hidden * vocab * rows) + 12 * layers * width * attended
    work = Work(ModelShape.of(config), peak_flops=2 * 1e9, tuning="full")
    assert work.utilisation(PAIRS[:1], seconds=0.5) == pytest.approx(flops / 1e9, rel=1e-12)
    assert Meter(PAIRS, CPU, work).rates([0], 0.5)["mfu"] == round(flops / 1e9, 5)


def test_mfu_is_that_of_the_policy_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    full = PolicyModule(model_of("llama"))
    assert Meter.of(full, PAIRS, World()).work is None, "the peak of a CPU is not known"
    monkeypatch.setattr(hardware, "of_device", lambda device: GPUS["H200"])
    work = Meter.of(full, PAIRS, World(0, 4)).work
    assert work is not None and work.peak_flops == 4 * 989.4e12 and work.tuning == "full"
    settings = LoraSettings(rank=3, target_modules=("v_proj", "q_proj"))
    adapted = PolicyModule(new_adapter(model_of("llama"), settings, seed=0))
    assert tuning_of(adapted) == ("lora", 3, ["q_proj", "v_proj"])
    of_lora = Meter.of(adapted, PAIRS, World(0, 4)).work
    assert of_lora is not None
    assert of_lora.utilisation(PAIRS, 1.0) < work.utilisation(PAIRS, 1.0), "frozen weights take no gradient"


def test_gpus_are_known_by_the_name_that_torch_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hardware.of_device("cpu") is None
    for name, known in {"NVIDIA H200": "H200", "NVIDIA H100 PCIe": None, "NVIDIA A100-SXM4-80GB": "A100"}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        found = hardware.of_device("cuda:0")
        assert (found.name if found else None) == known


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be reset here")
def test_peak_memory_is_that_of_the_stage() -> None:
    reset_peak_memory(CPU)
    before = peak_memory(CPU)
    block = torch.ones(30_000_000)  # 120 MB
    high = peak_memory(CPU)
    assert 100e6 < high - before < 200e6
    del block
    assert peak_memory(CPU) == pytest.approx(high, abs=2e6)  # Linux counts pages in batches
    reset_peak_memory(CPU)
    assert peak_memory(CPU) < high - 100e6


# --- what people see ---


def test_without_a_terminal_a_short_training_says_one_plain_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with MetricsLog(tmp_path, step=0, planned=20, progress="07-student-sft") as log:
        for step in range(1, 21):
            log.write(row(step, loss=2.5))
    shown = capsys.readouterr().err
    assert re.fullmatch(r"07-student-sft: step 20/20, [\d,]+ tok/s, loss 2\.5000\n", shown), shown


def test_nothing_is_shown_where_nobody_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsLog(tmp_path, step=0, planned=1) as log:
        log.write(row(1))
    assert capsys.readouterr() == ("", "")


def test_only_the_main_rank_shows_writes_and_tracks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    documents = some_groups(num_responses=1, count=8)
    settings = OptimSettings(learning_rate=1e-3, batch=4)

    def body(world: World) -> None:
        folder = tmp_path / f"rank{world.rank}"
        trackers = Trackers(("fake_trackers:Recorder",), "sft", folder / "trackers")
        policy = PolicyModule(model_of("llama"))
        where = {"workdir": tmp_path / "work", "progress": "sft", "trackers": trackers}
        train(policy, documents, sft(), settings, seed=1, world=world, **where)  # type: ignore[arg-type]

    assert ranks(2, body) == [0, 0]
    assert capfd.readouterr().err.count("sft: step 2/2, ") == 1
    assert len(lines(tmp_path / "work" / "metrics.jsonl")) == len(lines(tmp_path / "work" / "timing.jsonl")) == 2
    assert [row.get("step") for row in lines(tmp_path / "rank0" / "trackers" / "seen.jsonl")] == [None, 1, 2, None]
    assert not (tmp_path / "rank1").exists()


def on_terminal(body: Callable[[], object], type_in: dict[str, bytes], term: str = "xterm-256color") -> str:
    """What a function shows on a terminal of its own; `type_in`: text to wait for -> keys to press then."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(TERM=term, COLUMNS="110", LINES="30")
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        try:
            body()
        except BaseException as error:
            print(f"ended by {type(error).__name__}", file=sys.stderr, flush=True)
        os._exit(0)
    shown = ""
    waiting = dict(type_in)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:  # the terminal's other end is closed
            break
        if not data:
            break
        shown += data.decode(errors="replace")
        for text in [text for text in waiting if text in shown]:
            os.write(terminal, waiting.pop(text))
    os.waitpid(child, 0)
    os.close(terminal)
    return shown


def endless(folder: Path, *, obedient: bool) -> None:
    """Trains until Ctrl-C (obedient), or until the second one."""
    with StopFlag() as stop, MetricsLog(folder, step=0, planned=10_000, progress="07-student-sft") as log:
        for step in range(1, 10_000):
            log.write(row(step, loss=2.5))
            time.sleep(0.02)
            if step == 10:
                print("a warning in between", file=sys.stderr)
            if stop.requested and obedient:
                raise Stopped("stopped", "go on")


def test_a_terminal_gets_a_live_bar_and_is_clean_after_ctrl_c(tmp_path: Path) -> None:
    shown = on_terminal(lambda: endless(tmp_path / "a", obedient=True), {"in between": b"\x03"})
    assert "07-student-sft" in shown and "loss 2.5000" in shown and "tok/s" in shown and " left" in shown
    assert "a warning in between\r\n" in shown and "stopping at the next safe point" in shown
    assert shown.rstrip().endswith("ended by Stopped") and "\x1b[?" not in shown, "no mode of the terminal is touched"
    shown = on_terminal(
        lambda: endless(tmp_path / "b", obedient=False), {"in between": b"\x03", "stopping at the next": b"\x03"}
    )
    assert shown.rstrip().endswith("ended by KeyboardInterrupt") and "\x1b[?" not in shown


def test_a_dumb_terminal_gets_plain_lines(tmp_path: Path) -> None:
    def body() -> None:
        with MetricsLog(tmp_path, step=0, planned=1, progress="sft") as log:
            log.write(row(1))

    shown = on_terminal(body, {}, term="dumb")
    assert shown.startswith("sft: step 1/1, ") and "\x1b" not in shown
