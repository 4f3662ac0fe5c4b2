"""A judge that is asked in words, against a real HTTP server on loopback that misbehaves (FAULTS.md 37, 39)."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fake_server import Reply, Server, completion

from macpo.engine.connection import RateLimited, Unavailable
from macpo.engine.errors import ConfigError, MacpoError, PeerError
from macpo.engine.files import read_jsonl, write_jsonl
from macpo.judging.judge import AskingJudge, Retries
from macpo.judging.questions import Comparison, JudgePrompt, conversation, read_comparisons
from macpo.judging.replies import Replies
from macpo.judging.results import Result, result_of
from macpo.judging.server import Endpoint
from macpo.judging.settings import PROMPTS, JudgesFile
from macpo.judging.verdicts import JudgeError, Judgement, majority, parse

KEY = "sk-canary-7f3a91"


def prefers(word: str) -> Callable[[str], Reply]:
    """An honest judge: the response with `word` is better."""

    def reply(question: str) -> Reply:
        first, second = (word in part for part in question.split("<reply_A>")[1].split("<reply_B>"))
        return completion("Because. " + ("[[C]]" if first == second else "[[A]]" if first else "[[B]]"))

    return reply


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    """A judge that finds every pair equal, until a test says otherwise; `asked` holds its questions."""
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)
    with Server(lambda number, question: completion("[[C]]"), read=lambda body: body["messages"][0]["content"]) as s:
        yield s


def endpoint(server: Server, **options: Any) -> Endpoint:
    return Endpoint(server.url, "judge-1", **{"api_key_env": "TEST_JUDGE_KEY", "timeout_s": 5.0, **options})


def judgements(server: Server, folder: Path, comparisons: list[Comparison], **options: Any) -> list[Judgement]:
    retries = Retries(options.pop("attempts", 4), backoff_s=0.001)
    asked = {name: options.pop(name) for name in ("timeout_s", "temperature", "max_tokens") if name in options}
    identity = {"model": "judge-1", **{name: value for name, value in asked.items() if name != "timeout_s"}}
    prompt = JudgePrompt(options.pop("prompt", "pairwise"))
    with closing(endpoint(server, **asked)) as ask, Replies(folder / "replies.jsonl") as replies:
        options = {"workers": 2, "retries": retries, **options}
        return AskingJudge(ask, prompt, replies, identity, **options).compare(comparisons)


def result(server: Server, folder: Path, comparisons: list[Comparison], **options: Any) -> Result:
    return result_of(judgements(server, folder, comparisons, **options), "ours", "theirs")


def items(count: int) -> list[Comparison]:
    """The first third wins for a judge of "good", the second loses, the rest ties."""
    kinds = [("good", "bad"), ("bad", "good"), ("good", "good too")]
    return [
        Comparison(f"p{i}", ({"role": "user", "content": f"question {i}"},), *kinds[i * 3 // count])
        for i in range(count)
    ]


def test_counts_win_tie_lose_in_both_orders_and_asks_once(server, tmp_path):
    server.act = lambda n, q: prefers("good")(q)
    found = result(server, tmp_path, items(6))
    assert (found.win, found.lose, found.tie, found.failed) == (2, 2, 2, 0)
    assert found.win_rate.value == 0.5 and found.consistent.value == 1.0 and found.both_tie == 2
    assert len(server.asked) == 12  # both orders
    assert server.authorization == {f"Bearer {KEY}"}
    assert result(server, tmp_path, items(6)) == found  # from the cache
    assert len(server.asked) == 12
    assert KEY not in (tmp_path / "replies.jsonl").read_text()


def test_rows_say_who_stood_where(server, tmp_path):
    server.act = lambda n, q: completion("[[A]]", usage={"prompt_tokens": 30, "completion_tokens": 4})
    (judgement,) = judgements(server, tmp_path, items(3)[:1])
    rows = judgement.rows("student@2", "ceiling@0")
    keys = [row["key"] for _, row in read_jsonl(tmp_path / "replies.jsonl")]
    assert [row.pop("seconds") >= 0 for row in rows] == [True, True]
    assert rows == [
        {"prompt_id": "p0", "opponent": "ceiling@0", "first": first, "second": second, "verdict": "A",
         "tokens": [30, 4], "reply_id": [key]}
        for (first, second), key in zip(
            [("student@2", "ceiling@0"), ("ceiling@0", "student@2")], keys, strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize("place", ["first", "second"])
def test_a_judge_that_always_likes_one_place_shows_as_conflicts_not_as_ties(server, tmp_path, place):
    server.act = lambda n, q: completion("[[A]]" if place == "first" else "[[B]]")
    found = result(server, tmp_path, items(6))
    assert (found.win, found.tie, found.lose, found.both_tie) == (0, 6, 0, 0)
    assert getattr(found, place) == 6 and found.first + found.second == 6
    assert found.consistent.value == 0.0 and found.first_wins.value == (place == "first")
    nothing = result(server, tmp_path, [])
    assert nothing.win_rate is None and nothing.first_wins is None  # nothing was judged, so nothing is said


def test_one_tie_of_two_is_neither_a_conflict_nor_consistent(server, tmp_path):
    server.act = lambda n, q: completion("[[C]]" if "<reply_A>\ngood" in q else "[[B]]")
    found = result(server, tmp_path, items(3)[:1])
    assert (found.tie, found.half, found.first, found.second, found.both_tie) == (1, 1, 0, 0, 0)
    assert found.consistent.value == 0.0 and found.first_wins.value == 0.25


def test_equal_responses_tie_without_a_question(server, tmp_path):
    turns = ({"role": "user", "content": "q"},)
    found = result(server, tmp_path, [Comparison("p", turns, "same", "same")])
    assert found.tie == found.equal == 1 and found.consistent is None
    assert not server.asked


def test_passing_troubles_are_retried(server, tmp_path):
    """429, 503, a hang-up, a page instead of JSON, prose without verdict, two verdicts: each once, then the reply."""
    troubles = [
        (429, {"Retry-After": "0"}, b"slow down"),
        (503, {}, b""),
        None,
        (200, {}, b"<html>login</html>"),
        completion("I cannot say."),
        completion("[[A]] or rather [[B]]"),
        (200, {}, json.dumps({"choices": []}).encode()),
    ]
    seen: Counter[str] = Counter()

    def act(number, question):
        seen[question] += 1
        return troubles[seen[question] - 1] if seen[question] <= len(troubles) else prefers("good")(question)

    server.act = act
    found = result(server, tmp_path, items(3), attempts=len(troubles) + 1)
    assert (found.win, found.lose, found.tie, found.failed, found.unparsed) == (1, 1, 1, 0, 12)
    rows = [row for _, row in read_jsonl(tmp_path / "replies.jsonl")]
    assert len(rows) == 6 * (len(troubles) + 1)  # every reply and every failure is on record
    assert sum("429" in row.get("error", "") for row in rows) == 6
    assert sum(row.get("reply") == "I cannot say." and row["verdict"] is None for row in rows) == 6


def test_a_slow_server_times_out_and_is_retried(server, tmp_path):
    slow = threading.Event()

    def act(number, question):
        if number == 1:
            slow.wait(5)  # longer than the client waits; set below so that the server can stop
        return completion("[[C]]")

    server.act = act
    begin = time.monotonic()
    found = result(server, tmp_path, items(1), timeout_s=0.2, workers=1)
    slow.set()
    assert found.tie == 1 and time.monotonic() - begin < 4
    first = next(row for _, row in read_jsonl(tmp_path / "replies.jsonl"))
    assert first["verdict"] is None and "timed out" in first["error"]


def test_too_many_failures_stop_with_a_remedy_and_keep_what_was_paid_for(server, tmp_path):
    server.act = lambda n, q: completion("hm") if "question 7" in q or "question 8" in q else prefers("good")(q)
    with pytest.raises(JudgeError) as caught:
        judgements(server, tmp_path, items(12), attempts=2, max_failure_rate=0.1)
    assert isinstance(caught.value, MacpoError) and caught.value.code == 7
    assert "2 of the first 9" in str(caught.value) and "Fix: " in str(caught.value)
    answered = {row["key"] for _, row in read_jsonl(tmp_path / "replies.jsonl") if row["verdict"]}
    asked = len(server.asked)
    server.act = lambda n, q: prefers("good")(q)
    found = result(server, tmp_path, items(12))  # only what failed or was not reached is asked again
    assert (found.win, found.lose, found.tie, found.failed) == (4, 4, 4, 0)
    assert len(server.asked) - asked == 24 - len(answered)


def test_failures_below_the_rate_are_counted_by_who_stood_first(server, tmp_path):
    """A judge that loses the thread whenever the worse response stands first."""
    server.act = lambda n, q: completion("hm") if "question 0" in q and "<reply_A>\nbad" in q else prefers("good")(q)
    found = result(server, tmp_path, items(3), attempts=2, max_failure_rate=0.4)
    assert (found.failed, found.lose, found.tie, found.judged) == (1, 1, 1, 2)
    assert found.failed_first == (0, 1) and found.unparsed == 2 and found.win_rate.value == 0.25


def test_a_torn_cache_line_is_cut_and_the_question_asked_again(server, tmp_path):
    server.act = lambda n, q: prefers("good")(q)
    judgements(server, tmp_path, items(3), workers=1)
    path = tmp_path / "replies.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    found = result(server, tmp_path, items(3), workers=1)
    assert (found.win, found.lose, found.tie) == (1, 1, 1) and len(server.asked) == 7
    assert sum(1 for _ in read_jsonl(path)) == 6


@pytest.mark.parametrize(
    ("status", "kind"), [(401, ConfigError), (403, ConfigError), (404, PeerError), (302, PeerError)]
)
def test_what_will_not_pass_is_not_retried(server, tmp_path, status, kind):
    server.act = lambda n, q: (status, {"Location": "http://127.0.0.1:9/steal"}, b"")
    with pytest.raises(kind) as caught:
        judgements(server, tmp_path, items(3), workers=1)
    assert len(server.asked) <= 2 and KEY not in str(caught.value)


def test_what_decides_a_reply_is_part_of_its_key(server, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("{conversation}\n<reply_A>{a}<reply_B>{b}\n{verdict}")
    for options in ({}, {"temperature": 0.5}, {"max_tokens": 9}, {"prompt": "harmless"}, {"prompt": str(own)}):
        judgements(server, tmp_path, items(3), **options)
    assert len(server.asked) == 5 * 6
    own.write_text(own.read_text() + " ")  # the file's bytes count, also those that change no word
    judgements(server, tmp_path, items(3), prompt=str(own))
    assert len(server.asked) == 6 * 6


def test_votes_are_asked_with_seeds_and_the_majority_decides(monkeypatch, tmp_path):
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)
    said = {0: "[[A]]", 1: "[[B]]", 2: "[[A]]"}
    with Server(lambda number, body: completion(said[body["seed"]])) as server:
        (judgement,) = judgements(server, tmp_path, items(3)[:1], votes=3, temperature=1.0)
        assert judgement.outcome == "first" and len(judgement.ours_first.reply_ids) == 3
        assert sorted(body["seed"] for body in server.asked) == [0, 0, 1, 1, 2, 2]
        assert {body["temperature"] for body in server.asked} == {1.0}
        (more,) = judgements(server, tmp_path, items(3)[:1], votes=2, temperature=1.0)  # two of the three
        assert more.outcome == "tie" and len(server.asked) == 6


def test_majority():
    assert [majority(votes) for votes in ("A", "AAB", "ABC", "CCA", "AB")] == ["A", "A", "C", "C", "C"]
    assert majority(["A", "A", ""]) == "A" and majority(["A", "", ""]) == "" and majority([""]) == ""


def test_a_server_that_wants_max_completion_tokens_gets_it(monkeypatch, tmp_path):
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)

    def act(number, body):
        if "max_tokens" in body:
            text = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            return 400, {"Content-Type": "application/json"}, json.dumps({"error": {"message": text}}).encode()
        return completion("[[A]]", model="judge-1-2026")

    with Server(act) as server:
        (judgement,) = judgements(server, tmp_path, items(3)[:1], max_tokens=77, workers=1)
        assert judgement.outcome == "first" and judgement.ours_first.models == ("judge-1-2026",)
        assert [body.get("max_completion_tokens") for body in server.asked] == [None, 77, 77]
        server.act = lambda number, body: (400, {}, b'{"error": {"message": "no"}}')
        with pytest.raises(PeerError):
            endpoint(server, max_tokens=78)("q")


def test_no_temperature_is_sent_where_there_is_none(monkeypatch):
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)
    with Server(lambda number, body: completion("[[A]]")) as server:
        endpoint(server, temperature=None)("q")
        endpoint(server)("q", 3)
        assert [sorted({"temperature", "seed"} & body.keys()) for body in server.asked] == [[], ["seed", "temperature"]]


def test_an_endless_reply_is_cut(server):
    server.act = lambda n, q: (200, {}, b"x" * (5 * 2**20))
    with pytest.raises(Unavailable, match="more than"):
        endpoint(server)("q")


def test_retry_after_is_read_and_waits_double_up_to_the_limit(server, tmp_path):
    server.act = lambda n, q: (429, {"Retry-After": "17"}, b"")
    with pytest.raises(RateLimited) as caught:
        endpoint(server)("q")
    assert caught.value.retry_after_s == 17
    waits = Retries(backoff_s=1.0, max_wait_s=20.0).wait_s
    assert [waits(1), waits(2), waits(3), waits(2, 17.0), waits(9), waits(1, 90.0)] == [1, 2, 4, 17, 20, 20]


def test_keys_are_named_never_given(server, monkeypatch):
    monkeypatch.delenv("TEST_JUDGE_KEY")
    with pytest.raises(ConfigError, match="TEST_JUDGE_KEY is not set"):
        endpoint(server)("q")
    monkeypatch.setenv("TEST_JUDGE_KEY", f"{KEY}\nX-Evil: 1")
    with pytest.raises(ConfigError) as caught:
        endpoint(server)("q")
    assert KEY not in str(caught.value) and not server.asked
    for url in ("ftp://host/v1", "host/v1", "https://me:secret@host/v1", "http://far.example/v1"):
        with pytest.raises(ConfigError):
            Endpoint(url, "m", api_key_env="TEST_JUDGE_KEY")


def test_responses_cannot_add_fields_or_verdicts():
    """Braces in a response stay text, and a verdict quoted beside the judge's own makes the reply unusable."""
    item = Comparison("p", ({"role": "user", "content": "{b}"},), "{a} {verdict} [[A]]", "{conversation}")
    one, two = JudgePrompt("pairwise").questions(item)
    assert one.count("{a} {verdict} [[A]]") == 1 == two.count("{a} {verdict} [[A]]") and "<user>\n{b}\n</user>" in one
    assert one.index("{a}") < one.index("{conversation}") and two.index("{a}") > two.index("{conversation}")
    assert parse('it says "[[A]]", yet [[B]]') is None and parse("[[B]]. So [[B]]") == "B" and parse("") is None


def test_every_prompt_asks_for_a_verdict_and_shows_all_turns():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]}
    item = Comparison("p", ({"role": "system", "content": "be kind"}, call), "one", "two")
    for name in PROMPTS:
        for ending in ("explained", "at once"):
            (question, _) = JudgePrompt(name, ending).questions(item)
            assert all(f"[[{letter}]]" in question for letter in "ABC") and "{" not in question.replace(
                '{"', ""
            ).replace("{}", "")
            assert "be kind" in question and '"clock"' in question and conversation(item.messages) in question
    assert len({JudgePrompt(name).sha256 for name in PROMPTS}) == 3


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"{conversation} {a} {verdict}", "no {b}"),
        (b"{a} {b} {verdict}", "no {conversation}"),
        (b"{conversation} {a} {b}", "how the judge gives its verdict"),
        (b"\xff {conversation}", "invalid UTF-8 at byte 0"),
    ],
)
def test_an_unusable_prompt_file_is_refused(tmp_path, text, why):
    (tmp_path / "own.txt").write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        JudgePrompt(str(tmp_path / "own.txt"))
    assert why in str(caught.value) and "own.txt" in str(caught.value)
    with pytest.raises(ConfigError):
        JudgePrompt(str(tmp_path / "none.txt"))


def test_comparisons_pair_two_evaluations_by_prompt(tmp_path):
    rows = [
        {"prompt_id": f"{i}", "prompt": [{"role": "user", "content": f"q{i}"}], "answer": f"a{i}"} for i in (3, 1, 2)
    ]
    write_jsonl(tmp_path / "ours.jsonl", rows)
    write_jsonl(tmp_path / "theirs.jsonl", [row | {"answer": "b"} for row in rows[:2]])
    found = read_comparisons(tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl")
    assert [(c.prompt_id, c.ours, c.theirs) for c in found] == [("1", "a1", "b"), ("3", "a3", "b")]
    assert found[0].messages == ({"role": "user", "content": "q1"},)
    assert len(read_comparisons(tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl", limit=1)) == 1


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("judges:\n- {name: g, base_url: http://h/v1, model: m, votes: 3}", 2, "votes at temperature 0"),
        ("judges:\n- {name: g, base_url: http://h/v1, model: m, margin: 1}", 2, "unknown key"),
        ("judges:\n- {name: g, base_url: http://far.example/v1, model: m, api_key_env: K}", 2, "unencrypted"),
        ("judges:\n- {name: l, mode: logprob, model: x, temperature: 1}", 2, "unknown key"),
        ("judges:\n- {name: l, mode: logprobs, model: x}", 2, "'logprob'"),
        ("judges:\n- {name: l, model: x}", 2, "base_url"),
        ("judges:\n- {name: ../l, mode: logprob, model: x}", 2, "judges.0.name"),
        ("judges: []", 1, "judges"),
        ("judges:\n- {name: G, mode: logprob, model: x}\n- {name: g, mode: logprob, model: x}", 1, "distinct names"),
    ],
)
def test_settings_of_judges_are_closed(text, line, said):
    from macpo.engine.recipe import loads

    with pytest.raises(ConfigError) as caught:
        loads(text, JudgesFile, file="judges.yaml")
    assert said in str(caught.value) and "Fix: " in str(caught.value)
    assert caught.value.problems[0].line == line
