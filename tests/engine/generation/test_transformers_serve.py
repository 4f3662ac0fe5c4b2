"""ServedGenerator against `transformers serve` on loopback: the same greedy responses as our own generator, offline."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_checks import character_tokenizer, teacher_forced
from standalone_runs import make_base
from tiny import tiny
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from macpo.commands.run import run as run_all
from macpo.engine.config import ServedSettings
from macpo.engine.data.chat import Chat
from macpo.engine.data.records import Prompt, Response, read_records
from macpo.engine.errors import ConfigError, PeerError
from macpo.engine.generation import Generator, Sample, SamplingParams, ServedGenerator, generate_waves
from macpo.engine.run.folder import folder_of

TEMPLATE = "{% for m in messages %}{{ m['role'][0] + m['content'] }}{% endfor %}{{ 'a' if add_generation_prompt }}"
NEW_TOKENS, TIE = 12, 1e-4
GREEDY = SamplingParams(temperature=0, max_new_tokens=NEW_TOKENS)
DIALOGUES = [[{"role": "user", "content": text}] for text in ("ab", "hello", "to be or not", "zzz", "q", "some words")]


class Serve:
    """The server as a process of its own; a port is kept when it is started again."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--device", "cpu"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(self.port)],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        limit = time.monotonic() + 60
        while True:
            assert self.process.poll() is None and time.monotonic() < limit, "transformers serve did not start"
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1).close()
                return
            time.sleep(0.1)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama whose tokenizer adds BOS and has a chat template; some of its responses end by themselves."""
    path = tmp_path_factory.mktemp("served") / "model"
    tokenizer = character_tokenizer(30)  # one token a letter
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=30, max_position_embeddings=128, initializer_range=0.3, **sizes, **special)
    )
    model.lm_head.weight.data[:2] = 0  # specials that only ids would show: the server's texts leave them out
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def server() -> Iterator[Serve]:
    serve = Serve()
    serve.start()
    yield serve
    serve.kill()


def served(server: Serve, folder: Path, tokenizer: Any, **options: Any) -> ServedGenerator:
    settings = {"base_url": server.url, "server": "transformers", "concurrency": 4, "max_retries": 0} | options
    return ServedGenerator(ServedSettings(**settings), str(folder), tokenizer)


def assert_same(model: Any, prompt: list[int], got: Sample, wanted: Sample, end: int) -> None:
    """The same text and reason, or at the first difference the two best logits are a tie.

    An end token that is the last one allowed counts as `length` there (its count holds the end token), `stop` here.
    """
    if got.text == wanted.text:
        at_limit = wanted.finish_reason == "stop" and len(wanted.token_ids) == NEW_TOKENS - 1
        assert got.finish_reason == ("length" if at_limit else wanted.finish_reason)
        assert got.token_ids == wanted.token_ids
        return
    ours, theirs = [*wanted.token_ids, end], [*got.token_ids, end]
    at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    best = teacher_forced(model, prompt, ours[:at])[at].topk(2).values
    assert float(best[0] - best[1]) < TIE, f"{got.text!r} instead of {wanted.text!r}"


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_greedy_responses_are_those_of_our_own_generator(server: Serve, folder: Path, api: str) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    chat = Chat(tokenizer)
    prompts = [chat.prompt_ids(dialogue) for dialogue in DIALOGUES]
    reasons = set()
    for changes in ({}, {"repetition_penalty": 1.6}, {"stop_token_ids": (2, 9)}, {"stop": ("e", "po")}):
        params = replace(GREEDY, **changes)
        theirs = served(server, folder, tokenizer, api=api).generate(
            prompts if api == "completions" else DIALOGUES, params
        )
        ours = Generator(model, tokenizer).generate(prompts, params)
        for prompt, got, wanted in zip(prompts, theirs, ours, strict=True):
            assert_same(model, prompt, got.samples[0], wanted.samples[0], end=2)
            assert got.samples[0].num_tokens <= NEW_TOKENS
            reasons.add(got.samples[0].finish_reason)
    assert reasons == {"stop", "length"}


def test_sampling_follows_its_seed_and_settings(server: Serve, folder: Path) -> None:
    """One request at a time: the server's noise is one stream. top_k 1 is greedy, which its own options cannot say."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [Chat(tokenizer).prompt_ids(dialogue) for dialogue in DIALOGUES[:3]]
    generator = served(server, folder, tokenizer, concurrency=1)
    texts = [
        [sample.text for output in generator.generate(prompts, params) for sample in output.samples]
        for params in (
            SamplingParams(n=2, seed=4, max_new_tokens=8), SamplingParams(n=2, seed=4, max_new_tokens=8),
            SamplingParams(n=2, seed=5, max_new_tokens=8), SamplingParams(n=2, top_k=1, max_new_tokens=8),
            replace(GREEDY, n=2, max_new_tokens=8),
        )
    ]  # fmt: skip
    assert texts[0] == texts[1] != texts[2] and texts[3] == texts[4] and texts[0][0] != texts[0][1]


def test_what_the_server_refuses_is_said_in_one_line(server: Serve, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.raises((PeerError, ConfigError)) as caught:
        served(server, folder / "other", tokenizer).generate([[1, 4, 5]], GREEDY)
    assert str(caught.value).startswith(f"error: served: {server.url}") and "\n" not in str(caught.value)


def test_a_killed_server_ends_the_run_and_a_new_one_goes_on_with_it(
    server: Serve, folder: Path, tmp_path: Path
) -> None:
    """Killed after the first wave; the rows of both attempts together are those of our own generator."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    chat = Chat(tokenizer)
    requests = [(f"p{i}", chat.prompt_ids(dialogue)) for i, dialogue in enumerate(DIALOGUES)]
    options: dict[str, Any] = {"folder": tmp_path, "wave_requests": 2}

    def kill_after_the_first() -> bool:
        if any((tmp_path / "waves").glob("*.jsonl")) and server.process.poll() is None:
            server.kill()
        return False

    generator = served(server, folder, tokenizer)
    with pytest.raises(PeerError) as caught:
        generate_waves(generator, requests, GREEDY, should_stop=kill_after_the_first, **options)
    said = str(caught.value)
    assert said.startswith(f"error: served: {server.url}: no answer") and "Fix: " in said and "\n" not in said
    kept = {path: path.read_bytes() for path in (tmp_path / "waves").glob("*.jsonl")}
    assert len(kept) == 1
    server.start()
    rows = generate_waves(generator, requests, GREEDY, **options)
    assert all(path.read_bytes() == data for path, data in kept.items())
    ours = Generator(model, tokenizer).generate([prompt for _, prompt in requests], GREEDY)
    for (_, prompt), row, wanted in zip(requests, rows, ours, strict=True):
        got = Sample(row["token_ids"], None, None, row["finish_reason"], row["text"])
        assert_same(model, prompt, got, wanted.samples[0], end=2)


def test_a_served_teacher_responses_as_the_same_weights_do_here(server: Serve, tmp_path: Path) -> None:
    """The first stages of a run with one teacher, a folder behind the server; and our own generator on that folder."""
    base = str(make_base(tmp_path / "base"))
    teacher = {"base_url": server.url, "server": "transformers", "positive": base, "negative": base}
    changes = {"teachers": [{"model": base, "train": False, "served": teacher}], "iterations": 0}
    sampling = {"temperature": 0.0, "max_new_tokens": NEW_TOKENS}
    run_dir = run_all(tiny(tmp_path / "run", sampling=sampling, evaluation={"ceiling": False}, **changes))
    found = read_records(folder_of(run_dir, "init-teacher0-answer") / "responses.jsonl", Response)
    prompts = {p.id: p for p in read_records(folder_of(run_dir, "data") / "student.jsonl", Prompt)}
    assert len(found) == len(prompts) == 20
    chat = Chat(AutoTokenizer.from_pretrained(base), "vicuna")
    asked = [chat.limited_prompt_ids(prompts[r.prompt_id].messages, 64 - NEW_TOKENS) or [] for r in found]
    model = AutoModelForCausalLM.from_pretrained(base)
    outputs = Generator(model, chat.tokenizer).generate(asked, replace(GREEDY, stop_token_ids=chat.stop_ids))
    for response, output in zip(found, outputs, strict=True):
        ours = output.samples[0]
        assert response.text == chat.text(ours.token_ids)
        assert ours.num_tokens == NEW_TOKENS - 1 or response.finished == (ours.finish_reason == "stop")
