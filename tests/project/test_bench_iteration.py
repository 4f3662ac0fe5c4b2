"""The whole iteration beside today's pipeline: at toy sizes to its end, exact, and no round done twice after a kill."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from bench import bench_iteration as bench
from bench.peers.pipeline import PARTS, Job

SIZES = ["--student", "tiny", "--teachers", "tiny", "--prompts", "8", "--new-tokens", "6", "--context", "96"]


def rows(folder: Path) -> Path:
    """HH-RLHF's layout, both sides."""
    for side in ("harmless-base", "helpful-base"):
        (folder / side).mkdir(parents=True)
        with gzip.open(folder / side / "test.jsonl.gz", "wt", encoding="utf-8") as file:
            for n in range(60):
                prompt = f"\n\nHuman: what is {n} and {n * 7 % 13} of {side}?\n\nAssistant:"
                file.write(json.dumps({"chosen": f"{prompt} it is {n + 1}", "rejected": f"{prompt} no {n}"}) + "\n")
    return folder / "helpful-base" / "test.jsonl.gz"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_part_is_exact_and_a_round_that_is_done_is_not_done_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, work = rows(tmp_path / "hh"), tmp_path / "work"
    options = [*SIZES, "--batch", "4", "--threads", "1", "--rounds", "1", "--device", "cpu", "--data", str(data)]
    path = bench.main([*options, "--work", str(work), "--json-dir", str(tmp_path)])
    shown, body = capsys.readouterr().out, json.loads(path.read_text())
    assert path.name == "iteration-float32.json" and "differs" not in shown
    (counted,) = body["rounds"]
    assert set(counted["ours"]) == set(counted["theirs"]) == set(PARTS) == set(body["best"]) and not counted["differs"]
    assert all(f"| {part} |" in shown for part in (*PARTS, "the iteration"))
    assert bench.ratios(body["rounds"], None) == [
        pytest.approx(sum(counted["theirs"].values()) / sum(counted["ours"].values()))
    ]
    assert counted["command_seconds"] > sum(counted["ours"].values()) and min(counted["peak_bytes"]) > 1e8
    tried = {len(found["seconds"]) for part, found in body["tried"].items() if "training" in part}
    assert tried == {2}, "micro-batches of 2 and 4"

    nothing = Job("no such run", "float32", "cpu", 1, {})
    assert bench.theirs(nothing, work / "round-1") == json.loads((work / "round-1" / "found.json").read_text())
    made = work / "model-0"
    before = (made / "model.safetensors").stat().st_mtime_ns
    assert bench.make_model("tiny", made, data.parents[1], 0) == str(made)
    assert (made / "model.safetensors").stat().st_mtime_ns == before
