"""Templates that loop, hold the interpreter or build gigabytes, also only for some dialogues: refused within limits."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from macpo.engine.data import template_worker
from macpo.engine.data.messages import Message
from macpo.engine.data.templates import SafeTemplate
from macpo.engine.errors import ConfigError

USER: Message = {"role": "user", "content": "x"}
LOOP = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
LATE = "{% if messages | length > 3 %}PART{% endif %}" + LOOP
"""Harmless for the two words that a template is probed with."""
NEVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
COUNTED = {
    "nested loops": NEVER,
    "loops over the dialogue": "{% for a in messages %}" * 9 + "x" + "{% endfor %}" * 9,
    "a macro that calls itself twice": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "a branching macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a namespace that doubles": "{% set ns = namespace(a='aa') %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}"
    "{% endfor %}{{ ns.a }}",
    "a chain of doublings": "{% set a = 'aaaaaaaa' %}" + "{% set a = a ~ a %}" * 60,
    "blocks that double": "{% set a = 'aaaaaaaa' %}" + "{% set a %}{{ a }}{{ a }}{% endset %}" * 60,
    "lists that double": "{% set a = ['a', 'b'] %}" + "{% set a = [a, a] %}" * 28 + "{{ a }}",
    "replace": "{% set a = 'aaaaaaaaaaaaaaaa' %}" + "{% set a = a.replace('a', a) %}" * 9,
    "join": "{% set a = 'aaaaaaaa' %}" + "{% set a = a.join(a | list) %}" * 9,
    "json of json": "{% set a = '\"\"' %}" + "{% set a = a | tojson %}" * 60,
    "slices": "{% set ns = namespace(a='a') %}{% for i in range(21) %}{% set ns.a = ns.a + ns.a %}{% endfor %}"
    + "".join(f"{{% set a{n} = ns.a[1:] %}}" for n in range(300)),
    "big integers": "{% set ns = namespace(a=9) %}{% for i in range(9999) %}{% for j in range(9999) %}"
    "{% set ns.a = ns.a + ns.a %}{% endfor %}{% endfor %}",
}
UNCOUNTABLE = {
    "repeated text": "{{ 'a' * 3000000000 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "a wide format": "{{ '%3000000000d' % 1 }}",
    "a wide format in a variable": "{% set f = '%3000000000d' %}{{ f % 1 }}",
    "str.format": "{{ '{:>3000000000}'.format(1) }}",
    "center": "{{ 'a' | center(3000000000) }}",
    "a method by its name": "{% set f = 'a'.center %}{{ f(3000000000) }}",
    "a filter by its name": "{{ ['a'] | map('center', 3000000000) | list }}",
    "a macro's name set anew": "{% macro f(n) %}{% endmacro %}{% set f = 'a'.center %}{{ f(3000000000) }}",
    "batch": "{{ ['a'] | batch(3000000000, 'x') | list }}",
    "indent": "{{ 'a\nb' | indent(3000000000) }}",
    "indented json": "{{ [[1]] | tojson(indent=2000000000) }}",
    "a recursive loop": "{% for m in [messages] recursive %}{{ loop([m]) }}{% endfor %}",
    "one long expression": "{{ (9 ** 4000000) % 7 }}",
}


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(template_worker, "SECONDS", 1.0)
    monkeypatch.setattr(template_worker.ask, "__defaults__", (1.0,))
    yield
    template_worker._WORKER.end()


def render(source: str, count: int = 1) -> str:
    return SafeTemplate(source).render({"messages": [USER] * count, "add_generation_prompt": True}, 40 * count)


@pytest.mark.parametrize("kind", COUNTED)
def test_what_is_counted_is_stopped(kind: str) -> None:
    began, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert SafeTemplate(COUNTED[kind]).is_counted
    with pytest.raises((ConfigError, ValueError, RecursionError)):
        render(COUNTED[kind], count=99)
    assert time.process_time() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300 * 1024  # KiB


@pytest.mark.parametrize("kind", UNCOUNTABLE)
def test_what_cannot_be_counted_is_rendered_with_limits_in_a_process(kind: str) -> None:
    began, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((ConfigError, ValueError)):
        render(UNCOUNTABLE[kind])
    assert time.monotonic() - began < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100 * 1024


@pytest.mark.parametrize("part", [NEVER, "{{ 'a' * 3000000000 }}", "{{ messages * 300000000 }}"])
def test_a_template_that_is_harmless_until_a_long_dialogue_comes(part: str) -> None:
    source = LATE.replace("PART", part)
    assert render(source, 3) == "xxx"
    with pytest.raises(ConfigError, match=r"does not end|memory"):
        render(source, 4)
    assert render(source, 3) == "xxx"  # the process is started again


def test_what_is_rendered_in_the_process_is_what_is_rendered_here() -> None:
    counted = LOOP + "{{ messages | tojson(indent=2) }}{{ [1, 'a'] | join('-') }}{{ 'abab'.replace('a', 'c', 1) }}"
    assert SafeTemplate(counted).is_counted
    foreign = counted + "{{ '' * 1 }}"
    assert not SafeTemplate(foreign).is_counted
    assert render(foreign, 3) == render(counted, 3)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_the_process_ends_with_its_parent_in_the_middle_of_an_expression(end: signal.Signals, tmp_path: Path) -> None:
    code = (
        "import threading, time\n"
        "from macpo.engine.data import template_worker as w\n"
        "from macpo.engine.data.templates import SafeTemplate\n"
        "w.SECONDS = 60\n"
        "SafeTemplate('{{ 1 * 1 }}').render({}, 1)\n"
        "print(w._WORKER.process.pid, flush=True)\n"
        "SafeTemplate('{{ (9 ** 9000000) % 7 }}').render({}, 1)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=tmp_path)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    time.sleep(0.2)
    parent.send_signal(end)
    parent.wait(5)
    assert _ends_within(worker, 5)


def _ends_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_killed_process_and_a_fork_are_no_matter() -> None:
    source = LOOP + "{{ '' * 1 }}"
    assert render(source) == "x"
    process = template_worker._WORKER.process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert render(source) == "x"
    pid = os.fork()
    if pid == 0:
        os._exit(0 if render(source, 2) == "xx" else 1)
    assert render(source, 3) == "xxx"
    assert os.waitpid(pid, 0)[1] == 0
