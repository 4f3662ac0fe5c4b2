"""ServedGenerator against a server on loopback that answers as each test wants."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import Reply, Server, completion
from generation_checks import character_tokenizer

from macpo.engine.config import ServedSettings
from macpo.engine.errors import ConfigError, DataError, PeerError, Stopped
from macpo.engine.generation import Request, SamplingParams, ServedGenerator, generate_waves

KEY = "sk-canary-52d0c8"
PARAMS = SamplingParams(temperature=0.9, top_p=0.8, top_k=7, min_p=0.05, max_new_tokens=6, seed=3, stop_token_ids=(2,))
STANDARD = SamplingParams(temperature=0.9, top_p=0.8, max_new_tokens=6, seed=3)
ASKED = ({"role": "user", "content": "ab"},)
PROMPTS = [[4, 5], [6, 7, 8]]  # "ab", "cde"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(lambda number, body: completion("ok")) as server:
        yield server


def served(server: Server, kind: str = "vllm", tokenizer: Any = None, **options: Any) -> ServedGenerator:
    settings = ServedSettings(**{"base_url": server.url, "server": kind, "max_retries": 0, "timeout_s": 5.0} | options)
    return ServedGenerator(settings, "m", tokenizer)


# --- what is asked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_servers_that_read_tokens_get_them_and_every_option(server: Server, kind: str) -> None:
    served(server, kind).generate(PROMPTS, PARAMS)
    assert server.paths == {"/v1/completions"} and sorted(body["prompt"] for body in server.asked) == PROMPTS
    sent = {name: value for name, value in server.asked[0].items() if name not in ("prompt", "seed")}
    assert sent == {
        "model": "m", "temperature": 0.9, "top_p": 0.8, "max_tokens": 6, "top_k": 7, "min_p": 0.05,
        "repetition_penalty": 1.0, "stop_token_ids": [2], "ignore_eos": False, "return_token_ids": True,
    }  # fmt: skip
    served(server, kind).generate(PROMPTS[:1], SamplingParams(stop="x", ignore_eos=True))
    last = server.asked[-1]  # top-k off has a number of its own: without it the model's default would rule
    assert (last["top_k"], last["min_p"], last["stop"], last["ignore_eos"]) == (-1, 0.0, ["x"], True)


def test_transformers_serve_gets_text_and_a_whole_generation_config(server: Server) -> None:
    served(server, "transformers", character_tokenizer(30)).generate(PROMPTS[:1], PARAMS)
    (body,) = server.asked
    assert body["prompt"] == "ab" and json.loads(body["generation_config"]) == {
        "max_new_tokens": 6, "do_sample": True, "temperature": 0.9, "top_p": 0.8, "top_k": 7, "min_p": 0.05,
        "repetition_penalty": 1.0, "eos_token_id": [2], "pad_token_id": 2,
    }  # fmt: skip
    greedy = SamplingParams(temperature=0, max_new_tokens=3)
    served(server, "transformers", character_tokenizer(30)).generate(PROMPTS[:1], greedy)
    config = json.loads(server.asked[-1]["generation_config"])
    assert config == {"max_new_tokens": 3, "do_sample": False, "repetition_penalty": 1.0}


def test_chat_sends_the_dialogue(server: Server) -> None:
    (output,) = served(server, "openai", api="chat").generate([ASKED], STANDARD)
    assert server.paths == {"/v1/chat/completions"} and server.asked[0]["messages"] == list(ASKED)
    assert set(server.asked[0]) == {"messages", "model", "max_tokens", "temperature", "top_p", "seed"}
    assert output.samples[0].text == "ok"


def test_a_dialogue_with_more_than_text_is_not_sent_to_chat(server: Server) -> None:
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]}
    asked = [*ASKED, called, {"role": "user", "content": "so?"}]
    for dialogue, part in ((asked, "tool_calls"), ([{**ASKED[0], "tools": [{}]}, *ASKED[1:]], "tools")):
        with pytest.raises(DataError, match=f"the dialogue has {part}, and api: chat is sent roles and texts alone"):
            served(server, "openai", api="chat").generate([dialogue], STANDARD)
    assert not server.asked


def test_each_sample_has_a_seed_of_its_own_and_keeps_it(server: Server) -> None:
    params = SamplingParams(n=3, seed=1, max_new_tokens=4)
    generator = served(server)
    assert [len(output.samples) for output in generator.generate(PROMPTS, params)] == [3, 3]
    first = {(str(body["prompt"]), body["seed"]) for body in server.asked}
    assert len(first) == 6
    generator.generate(PROMPTS, params)
    assert {(str(body["prompt"]), body["seed"]) for body in server.asked[6:]} == first
    generator.generate(PROMPTS, SamplingParams(n=3, seed=2, max_new_tokens=4))
    assert not {body["seed"] for body in server.asked[12:]} & {seed for _, seed in first}


@pytest.mark.parametrize(
    ("kind", "params", "field"),
    [
        ("openai", {"top_k": 50}, "sampling.top_k"),
        ("openai", {"min_p": 0.1}, "sampling.min_p"),
        ("openai", {"repetition_penalty": 1.2}, "sampling.repetition_penalty"),
        ("openai", {"stop_token_ids": (2,)}, "sampling.stop_token_ids"),
        ("transformers", {"ignore_eos": True}, "sampling.ignore_eos"),
    ],
)
def test_what_a_server_does_not_know_is_refused_by_name(
    server: Server, kind: str, params: dict[str, Any], field: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        served(server, kind, character_tokenizer(30)).generate(PROMPTS, SamplingParams(**params))
    assert [problem.field for problem in caught.value.problems] == [field] and "Fix: set " in str(caught.value)
    assert not server.asked


def test_prompts_that_no_text_spells_are_refused(server: Server) -> None:
    """Token 34 spells "ae", which a server would read as two tokens."""
    with pytest.raises(DataError, match="request one"):
        served(server, "openai", character_tokenizer(40)).generate([[4, 34], [4]], STANDARD, request_ids=["one", "two"])
    with pytest.raises(ConfigError, match="no tokenizer"):
        served(server, "openai").generate(PROMPTS, STANDARD)
    assert not server.asked


# --- what comes back -------------------------------------------------------------------------------------------------


def test_samples_hold_ids_without_the_end_token_and_no_log_probs(server: Server) -> None:
    """Ids that the server sends are kept; else the text is tokenised again, else there is only the server's count."""
    server.act = lambda number, body: completion("ab", choice={"token_ids": [4, 5, 2]}, usage=usage(2, 3))
    sample = served(server, tokenizer=character_tokenizer(30)).generate(PROMPTS[:1], PARAMS)[0].samples[0]
    assert (sample.token_ids, sample.text, sample.finish_reason) == ([4, 5], "ab", "stop")
    assert sample.raw_logps is None and sample.logps is None and sample.num_tokens == 2
    server.act = lambda number, body: completion("abc", "length", usage=usage(2, 6))
    sample = served(server, tokenizer=character_tokenizer(30)).generate(PROMPTS[:1], PARAMS)[0].samples[0]
    assert (sample.token_ids, sample.finish_reason, sample.num_tokens) == ([4, 5, 6], "length", 3)
    sample = served(server).generate(PROMPTS[:1], PARAMS)[0].samples[0]
    assert (sample.token_ids, sample.num_tokens) == ([], 6)


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def test_stop_texts_and_withheld_responses(server: Server) -> None:
    server.act = lambda number, body: completion("abxcd", "length")
    params = SamplingParams(stop=("cd", "x"), max_new_tokens=6)
    sample = served(server, tokenizer=character_tokenizer(30)).generate(PROMPTS[:1], params)[0].samples[0]
    assert (sample.text, sample.token_ids, sample.finish_reason) == ("ab", [4, 5], "stop")
    server.act = lambda number, body: completion("half a se", "content_filter")
    sample = served(server).generate(PROMPTS[:1], PARAMS)[0].samples[0]
    assert (sample.text, sample.num_tokens) == ("", 0)


def test_a_server_that_reads_other_tokens_is_found_out(server: Server) -> None:
    server.act = lambda number, body: completion("ok", usage=usage(9, 1))
    with pytest.raises(ConfigError, match="as 9 tokens, the agent's tokenizer and template make 2"):
        served(server).generate(PROMPTS[:1], PARAMS)


def test_it_works_where_a_loop_runs_already(server: Server) -> None:
    async def cell() -> str | None:
        return served(server).generate(PROMPTS[:1], PARAMS)[0].samples[0].text

    assert asyncio.run(cell()) == "ok"
    assert served(server).generate([], PARAMS) == []


# --- faults ----------------------------------------------------------------------------------------------------------


def test_passing_troubles_are_retried(server: Server) -> None:
    troubles: list[Reply | None] = [(429, {"Retry-After-Ms": "1"}, b""), (503, {"Retry-After-Ms": "1"}, b""), None]
    server.act = lambda number, body: troubles[number - 1] if number <= len(troubles) else completion("at last")
    (output,) = served(server, max_retries=3).generate(PROMPTS[:1], PARAMS)
    assert output.samples[0].text == "at last" and len(server.asked) == 4
    assert len({body["seed"] for body in server.asked}) == 1
    with pytest.raises(PeerError, match=r"HTTP 429.*Fix: .*finished waves are kept"):
        server.asked.clear()
        served(server, max_retries=0).generate(PROMPTS[:1], PARAMS)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "reply",
    [
        (200, {}, b"<html>login</html>"),
        (200, {"Content-Type": "application/json"}, b'{"choices": [{"tex'),
        (200, {"Content-Type": "application/json"}, b'{"choices": []}'),
        (200, {"Content-Type": "application/json"}, b"[1]"),
        completion("half", "abort"),
        (302, {"Location": "http://127.0.0.1:9/steal"}, b""),
        (404, {"Content-Type": "application/json"}, b'{"error": {"message": "no model m"}}'),
    ],
)
def test_what_is_no_response_is_an_error_of_one_line(server: Server, reply: Reply) -> None:
    server.act = lambda number, body: reply
    with pytest.raises(PeerError) as caught:
        served(server).generate(PROMPTS, PARAMS)
    assert str(caught.value).startswith("error: ") and "\n" not in str(caught.value) and server.url in str(caught.value)
    assert reply[0] != 404 or "no model m" in str(caught.value)


def test_silence_ends_at_the_time_limit(server: Server) -> None:
    silent = threading.Event()
    server.act = lambda number, body: completion("late") if silent.wait(10) else None
    begin = time.monotonic()
    with pytest.raises(PeerError, match=r"timed out after 0\.3 s"):
        served(server, timeout_s=0.3).generate(PROMPTS, PARAMS)
    assert time.monotonic() - begin < 5
    silent.set()


def test_a_stop_is_heard_while_the_server_is_silent(server: Server) -> None:
    silent = threading.Event()
    server.act = lambda number, body: completion("late") if silent.wait(10) else None
    begin, generator = time.monotonic(), served(server, timeout_s=60.0)
    requests = [request_of(i) for i in range(3)]
    with pytest.raises(Stopped):
        generator.run(requests, should_stop=lambda: len(server.asked) == 3)
    assert time.monotonic() - begin < 5
    silent.set()


def request_of(number: int) -> Request:
    return Request(f"p{number}", (4, 5), PARAMS)


def test_no_more_requests_at_once_than_said(server: Server) -> None:
    """Two arrive and wait for each other; a third comes only when one is answered."""
    both, lock = threading.Barrier(2), threading.Lock()
    inside, most = 0, 0

    def act(number: int, body: Any) -> Reply:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        both.wait(10)
        with lock:
            inside -= 1
        return completion("ok")

    server.act = act
    served(server, concurrency=2).run([request_of(i) for i in range(8)])
    assert most == 2


def test_keys_go_into_the_header_alone(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    served(server).generate(PROMPTS[:1], PARAMS)  # a server without a key must not get that one
    assert not any(KEY in str(header) for header in server.authorization)
    monkeypatch.setenv("MY_KEY", KEY)
    served(server, api_key_env="MY_KEY").generate(PROMPTS[:1], PARAMS)
    assert f"Bearer {KEY}" in server.authorization and KEY not in json.dumps(server.asked)
    for status, kind in ((401, ConfigError), (403, ConfigError), (400, PeerError)):
        said = json.dumps({"error": {"message": f"your key is {KEY}"}}).encode()
        server.act = lambda number, body, s=status, b=said: (s, {"Content-Type": "application/json"}, b)  # type: ignore[misc]
        with pytest.raises(kind) as caught:
            served(server, api_key_env="MY_KEY").generate(PROMPTS[:1], PARAMS)
        assert KEY not in str(caught.value)
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(ConfigError, match="MY_KEY is not set"):
        served(server, api_key_env="MY_KEY").generate(PROMPTS[:1], PARAMS)


def test_without_the_package_the_error_says_what_to_install(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ConfigError, match=r"pip install 'macpo\[served\]'"):
        served(server).generate(PROMPTS, PARAMS)


# --- waves -----------------------------------------------------------------------------------------------------------


def test_waves_are_kept_when_the_server_goes_and_not_asked_again(server: Server, tmp_path: Path) -> None:
    options: dict[str, Any] = {"folder": tmp_path, "wave_requests": 2, "purpose": "test"}
    requests = [(f"p{i}", [4 + i]) for i in range(6)]
    server.act = lambda number, body: completion(f"response {body['prompt'][0]}") if number <= 4 else None
    with pytest.raises(PeerError, match="no answer"):
        generate_waves(served(server, concurrency=1), requests, PARAMS, **options)
    kept = sorted(path.name for path in (tmp_path / "waves").iterdir())
    assert kept in (["0000.jsonl", "0001.jsonl"], ["0001.jsonl", "0002.jsonl"], ["0000.jsonl", "0002.jsonl"])
    server.asked.clear()
    server.act = lambda number, body: completion(f"response {body['prompt'][0]}", usage=usage(1, 3))
    rows = generate_waves(served(server), requests, PARAMS, **options)
    assert [row["text"] for row in rows] == [f"response {4 + i}" for i in range(6)] and len(server.asked) == 2
    assert all(row["sum_logp"] is None and row["token_ids"] == [] for row in rows)
    server.asked.clear()
    changed = [(id_, [9]) for id_, _ in requests]
    generate_waves(served(server), changed, PARAMS, **options)
    assert len(server.asked) == 6


def test_waves_of_dialogues_are_known_by_their_words(server: Server, tmp_path: Path) -> None:
    options: dict[str, Any] = {"folder": tmp_path, "wave_requests": 2}
    generator = served(server, api="chat")
    for words in ("one", "two", "two"):
        messages = {"p": [{"role": "user", "content": words}]}
        generate_waves(generator, [("p", [])], PARAMS, messages=messages, **options)
    assert [body["messages"][0]["content"] for body in server.asked] == ["one", "two"]


def test_an_empty_response_is_asked_for_again_with_another_seed(server: Server, tmp_path: Path) -> None:
    server.act = lambda number, body: completion(" \n" if number == 1 else "words")
    (row,) = generate_waves(served(server), [("p", [4])], PARAMS, folder=tmp_path, wave_requests=1)
    assert (row["text"], row["attempt"], row["empty"]) == ("words", 1, False)
    assert len({body["seed"] for body in server.asked}) == 2
