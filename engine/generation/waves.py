"""Generation that resumes after being killed: requests in fixed waves, each committed to disk as one file.

    folder/waves/0003.jsonl     one line per response, in request order; the last line holds a checksum of the others

A wave's content is a function of its requests alone, so a resumed run, or one with another number of processes,
writes the same bytes (on the same machine and with the same number of threads).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from macpo.engine.data.messages import Message
from macpo.engine.distributed.agree import agreed
from macpo.engine.errors import ConfigError, IntegrityError, Stopped
from macpo.engine.files import atomic_write, explained, read_bytes
from macpo.engine.generation.params import SamplingParams
from macpo.engine.generation.request import Request, Sample
from macpo.engine.progress import Count, counted
from macpo.engine.removal import is_file, make_way

if TYPE_CHECKING:
    from macpo.engine.distributed.world import World
    from macpo.engine.generation.generator import Generator
    from macpo.engine.generation.served import ServedGenerator

log = logging.getLogger(__name__)

WAVE_SCHEMA = 2
"""Part of a wave's digest; files of another schema are written again."""
SCRATCH = ("waves",)
"""What `generate_waves` resumes from in its folder, which can go once its records are kept elsewhere."""

ResponseRecord = dict[str, Any]
"""What a line of a wave's file holds; `generate_waves` lists its fields."""
Decode = Callable[[list[int]], str]


def generate_waves(
    generator: Generator | ServedGenerator,
    requests: Sequence[tuple[str, Sequence[int]]],
    params: SamplingParams,
    *,
    messages: Mapping[str, Sequence[Message]] | None = None,
    folder: Path,
    wave_requests: int,
    purpose: str = "",
    decode: Decode | None = None,
    world: World | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: bool | str = False,
) -> list[ResponseRecord]:
    """Responds to all requests wave by wave, skipping waves that `folder/waves` already holds.

    Args:
        requests: (id, prompt token ids) with unique ids; they are split into waves in the order of their ids.
        params: sampling params of all requests.
        messages: the dialogue of each id, for a served model with `api: chat`.
        folder: shared by all ranks; waves are assigned beforehand, longest first, to ranks or tensor-parallel groups.
        wave_requests: number of requests per wave.
        purpose: keeps this call's noise apart from others with the same ids and seed.
        decode: turns a response's token ids into text; default: the generator's own text, which is also used with stop
            texts.
        should_stop: called between decode steps; the wave in progress is then dropped.
        progress: whether to show responses, tokens/s and time left of rank 0's share; a text is its label.

    Returns:
        On every rank all records, by id and sample:
        {"id", "sample", "attempt", "token_ids", "end_token", "text", "sum_logp", "end_logp", "num_tokens",
        "finish_reason", "empty"}.
        end_token: the token that ended it, or null. end_logp: its raw log-prob.
        sum_logp: sum of the raw log-probs in nats without the end token; null where a server gives none.
        text: null without a tokenizer.
        empty: only white space, even after a second draw (attempt 1; greedy decoding draws once).

    Raises:
        ConfigError, DataError: bad requests, before any work. Stopped: asked to stop; committed waves stay.
    """
    from macpo.engine.distributed.world import World

    if wave_requests < 1:
        raise ConfigError(f"got {wave_requests}", "wave_requests must be at least 1", field="wave_requests")
    world, team = world or World.current(), generator.team
    if world.size % team.size:
        fix = "give the world that the model is split in"
        raise ConfigError(f"{world.size} ranks do not divide into tensor-parallel groups of {team.size}", fix)
    asked = team.any_of(should_stop or (lambda: False))
    samples = tuple(range(params.n))
    all_requests = [
        Request(id_, tuple(prompt), params, samples, purpose=purpose, messages=tuple((messages or {}).get(id_, ())))
        for id_, prompt in sorted(requests, key=lambda item: item[0])
    ]
    generator.check(all_requests)
    waves = [all_requests[start : start + wave_requests] for start in range(0, len(all_requests), wave_requests)]
    with explained(folder):
        (folder / "waves").mkdir(parents=True, exist_ok=True)
    stopped = False
    shares = world.size // team.size
    mine = assigned([_cost(wave) for wave in waves], World(world.rank // team.size, shares))
    digests = {number: _digest(waves[number]) for number in mine}
    todo = team.broadcast([n for n in mine if read_wave(_path(folder, n), digests[n]) is None])
    left, total = (sum(len(waves[n]) * params.n for n in numbers) for numbers in (todo, mine))
    unit = "responses" if shares == 1 else f"responses, share 1 of {shares}"
    with counted(progress if left and world.is_main else False, total, total - left, unit) as count:
        for number in todo:
            try:
                if asked():
                    raise Stopped("stopped between two waves", "run the same command again")
                rows = _respond(generator, waves[number], decode, asked, count)
            except Stopped:
                stopped = True
                break
            with agreed(team):
                if team.is_main:
                    make_way(_path(folder, number), folder, log.warning)
                    atomic_write(_path(folder, number), _encode(rows, digests[number]))
    if any(world.gather(stopped)):
        raise Stopped("stopped while generating; the finished waves are kept", "run the same command again")
    rows = [row for number, wave in enumerate(waves) for row in _committed(_path(folder, number), _digest(wave))]
    world.barrier()  # no rank leaves, and removes the folder, while another still reads it
    return rows


def read_wave(path: Path, digest: str) -> list[ResponseRecord] | None:
    """The records of a committed wave; None where it is missing, torn, damaged or of other requests."""
    if not os.path.lexists(path):
        return None
    body, seal = _split(read_bytes(path)) if is_file(path) else (b"", None)
    if seal != _seal(body, digest):
        why = "torn or damaged" if seal is None or seal.get("requests") == digest else "of other requests"
        log.warning("%s is %s and is written again", path.name, why)
        return None
    return [json.loads(line) for line in body.splitlines()]


def _committed(path: Path, digest: str) -> list[ResponseRecord]:
    rows = read_wave(path, digest)
    if rows is None:
        raise IntegrityError("a wave that was just written does not verify", "check the disk, run again", file=path)
    return rows


def _split(raw: bytes) -> tuple[bytes, dict[str, Any] | None]:
    """(lines of records, parsed last line); None where the last line is torn."""
    at = raw.rfind(b"\n", 0, -1) + 1
    try:
        seal = json.loads(raw[at:]) if raw.endswith(b"\n") else None
    except (ValueError, RecursionError):  # bad JSON or bad UTF-8: the tail was torn
        seal = None
    return raw[:at], seal if isinstance(seal, dict) else None


def _encode(rows: Sequence[ResponseRecord], digest: str) -> bytes:
    body = b"".join(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n" for row in rows)
    return body + json.dumps(_seal(body, digest)).encode() + b"\n"


def _seal(body: bytes, digest: str) -> dict[str, Any]:
    return {"rows": body.count(b"\n"), "requests": digest, "sha256": hashlib.sha256(body).hexdigest()}


def _path(folder: Path, number: int) -> Path:
    return folder / "waves" / f"{number:04d}.jsonl"


def _digest(wave: Sequence[Request]) -> str:
    """SHA-256 of everything that determines the wave's responses, except the model."""
    params = wave[0].params
    facts = [WAVE_SCHEMA, wave[0].purpose, {name: getattr(params, name) for name in params.__slots__}]
    asked = [[request.id, request.prompt_ids, *([request.messages] if request.messages else [])] for request in wave]
    return hashlib.sha256(json.dumps([facts, asked]).encode()).hexdigest()


def _cost(wave: Sequence[Request]) -> int:
    return sum(len(request.prompt_ids or request.messages) + request.params.max_new_tokens for request in wave)


def assigned(costs: Sequence[int], world: World) -> list[int]:
    """This rank's waves, given their costs: the longest first, each to the rank with the smallest load."""
    loads = [0] * world.size
    mine: list[int] = []
    for number in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = loads.index(min(loads))
        loads[rank] += costs[number]
        if rank == world.rank:
            mine.append(number)
    return mine


def _respond(
    generator: Generator | ServedGenerator,
    wave: Sequence[Request],
    decode: Decode | None,
    should_stop: Callable[[], bool],
    count: Count,
) -> list[ResponseRecord]:
    """Records of one wave; empty responses are drawn once more."""
    outputs = generator.run(wave, progress=count, should_stop=should_stop)
    rows = [
        _record(request, index, sample, decode)
        for request, output in zip(wave, outputs, strict=True)
        for index, sample in zip(request.samples, output.samples, strict=True)
    ]
    if wave[0].params.temperature == 0 or not any(row["empty"] for row in rows):
        return rows
    empty = {(row["id"], row["sample"]): at for at, row in enumerate(rows) if row["empty"]}
    again = [
        replace(request, samples=samples, attempt=1)
        for request in wave
        if (samples := tuple(i for i in request.samples if (request.id, i) in empty))
    ]
    for request, output in zip(again, generator.run(again, should_stop=should_stop), strict=True):
        for index, sample in zip(request.samples, output.samples, strict=True):
            rows[empty[request.id, index]] = _record(request, index, sample, decode)
    return rows


def _record(request: Request, index: int, sample: Sample, decode: Decode | None) -> ResponseRecord:
    text = sample.text if decode is None or request.params.stop else decode(sample.token_ids)
    return {
        "id": request.id,
        "sample": index,
        "attempt": request.attempt,
        "token_ids": sample.token_ids,
        "end_token": sample.end_token,
        "text": text,
        "sum_logp": None if sample.raw_logps is None else math.fsum(sample.raw_logps),
        "end_logp": sample.end_logp,
        "num_tokens": sample.num_tokens,
        "finish_reason": sample.finish_reason,
        "empty": not (sample.token_ids if text is None else text.strip()),
    }
