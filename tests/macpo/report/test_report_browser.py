"""The browser of responses in headless Chromium: opened from a file, searched, filtered, stepped through, printed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.support.wait import WebDriverWait

from macpo.engine.data.records import Pair
from macpo.report.page import write_report

Pairs = tuple[list[Pair], list[Pair]]

HOSTILE = (
    '<img src=x onerror="document.title=1"></script><script>document.title=2</script><!--<script>'
    '<style>*{display:none}</style> <iframe src="javascript:parent.document.title=3"></iframe> {{ 7 * 7 }} &lt;b&gt;'
    " \u202egnol\u2066 \u2028 \x00\x1b[31m \u200b\ufeff"
)
CONTRAST = """
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgba = (colour) => {
      canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
      return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const over = (top, below) => top.slice(0, 3).map((c, i) => (c * top[3] + below[i] * (255 - top[3])) / 255);
    const behind = (e) => {
      if (!e) return [255, 255, 255];
      const own = rgba(getComputedStyle(e).backgroundColor);
      return own[3] === 255 ? own.slice(0, 3) : over(own, behind(e.parentElement));
    };
    const light = (rgb) => rgb.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
      .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const found = [];
    for (const e of document.querySelectorAll("body *")) {
      const said = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
      if (!said || e.closest("svg, script, noscript") || e.disabled || !e.checkVisibility()) continue;
      const [a, b] = [light(over(rgba(getComputedStyle(e).color), behind(e))), light(behind(e))];
      const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      if (ratio < 4.5) found.push(`${e.tagName} ${e.className} ${e.textContent.slice(0, 30)}: ${ratio.toFixed(2)}`);
    }
    return found;
"""


class Shown:
    """The page in the browser."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path, fragment: str = "", width: int = 1200) -> None:
        self.size(width)
        self.driver.get("about:blank")
        self.driver.get(page.as_uri() + fragment)
        whole = "return document.readyState === 'complete' && location.protocol === 'file:'"
        WebDriverWait(self.driver, 60).until(lambda _: self.run(whole))  # get() may return earlier on a busy machine

    def size(self, width: int) -> None:
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def text(self, name: str) -> str:
        found: str = self.run(f"return document.querySelector('[data-control={name}]').innerText")
        return found

    def set(self, name: str, value: Any) -> None:
        """Set a control as a person does, and wait until the page has followed."""
        script = """
            const [name, value, done] = arguments;
            const e = document.querySelector(`[data-control=${name}]`);
            if (e.type === "checkbox") e.checked = value; else e.value = value;
            e.dispatchEvent(new Event("input", { bubbles: true }));
            setTimeout(done, name === "query" ? 300 : 0);
        """
        self.driver.execute_async_script(script, name, value)

    def click(self, name: str) -> None:
        self.run(f"document.querySelector('[data-control={name}]').click()")

    def press(self, keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(keys)

    def overflows(self) -> bool:
        found: bool = self.run("return document.documentElement.scrollWidth > innerWidth")
        return found

    def rows(self) -> list[list[str]]:
        found: list[list[str]] = self.run(
            "return [...document.querySelectorAll('.responses tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
        )
        return found


@pytest.fixture(scope="module")
def shown(chromium: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    driver = chromium(tmp_path_factory.mktemp("chromium"))
    yield Shown(driver)
    driver.quit()


@pytest.fixture(scope="module")
def page(response_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(response_run(tmp_path_factory.mktemp("responses") / "run", hostile=HOSTILE))


def test_search_filters_and_steps(shown: Shown, page: Path, pairs: Pairs) -> None:
    _, test = pairs
    shown.open(page)
    assert shown.text("hits") == "60 prompts" and shown.text("count") == "Prompt 1 of 60"
    assert [row[0].split("\n")[0] for row in shown.rows()] == [
        *["student"] * 2,
        "teacher0",
        "student",
        "human chosen",
        "human rejected",
    ]
    assert shown.run("return document.querySelector('[data-control=previous]').disabled")

    prompts = {pair.prompt.id: pair.prompt.messages[-1]["content"] for pair in test}
    first, second = sorted(prompts)[:2]
    shown.click("next")
    assert shown.text("count") == "Prompt 2 of 60" and prompts[second] in shown.text("prompt")
    assert shown.run("return location.hash") == f"#prompt/test/{second}"
    assert shown.run("return document.querySelectorAll('[aria-current]').length") == 1
    shown.click("previous")
    assert prompts[first] in shown.text("prompt")

    word = max(set(prompts[second].split()), key=len)
    expected = [
        pair.prompt.id
        for pair in test
        if any(word in text for text in (prompts[pair.prompt.id], pair.chosen, pair.rejected))
    ]
    shown.set("query", word.upper())
    assert 0 < len(expected) < 60 and shown.text("hits") == f"{len(expected)} of 60 prompts match"
    assert word in shown.run("return [...document.querySelectorAll('mark')].map(m => m.textContent)")
    shown.set("query", "no such (text [at all")
    assert shown.text("hits") == "0 of 60 prompts match" and shown.text("count") == "No prompt matches."
    shown.click("clear")
    assert shown.text("hits") == "60 prompts"

    shown.set("agent", "student")
    shown.set("iteration", "1")
    assert [row[0] for row in shown.rows()] == ["student\niteration 1"] * 2
    shown.set("arm", "arm:other")
    assert len(shown.rows()) == 1 and "5 more responses are hidden" in shown.text("prompt")
    shown.click("clear")
    shown.set("kind", "rejected")
    assert [row[0] for row in shown.rows()] == ["human rejected"]
    shown.click("clear")
    shown.set("least", "1.01")
    assert shown.text("count") == "No prompt matches."
    shown.set("least", "0.6")
    assert all(float(row[1]) >= 0.6 for row in shown.rows())


def test_where_perplexity_keeps_a_worse_response(shown: Shown, page: Path) -> None:
    shown.open(page)
    shown.set("set", "train")
    assert shown.text("hits") == "80 prompts" and shown.text("page") == "page 1 of 2"
    shown.click("forth")
    assert shown.run("return document.querySelector('[data-control=list]').start") == 51
    shown.set("worse", True)
    assert shown.text("hits") == "27 of 80 prompts match"  # of 80, every third from the first
    for _ in range(27):
        kept, lost = (next(row for row in shown.rows() if row[0].startswith(name)) for name in ("teacher1", "teacher0"))
        assert kept[0] == "teacher1 kept scores worse" and lost[0] == "teacher0 not kept scores higher"
        assert float(kept[1]) < float(lost[1]) and float(kept[2]) == 8.5 and float(lost[2]) == 9.0
        shown.click("next")
    text = shown.run("return document.getElementById('selection').innerText")
    assert re.search(r"pairs of student, iteration 1\s+27 of 80\s+34%", text)
    shown.set("kind", "lost")
    assert [row[0] for row in shown.rows()] == ["teacher0 not kept scores higher"]


def test_the_keyboard_alone_and_a_link_to_one_prompt(shown: Shown, page: Path, pairs: Pairs) -> None:
    _, test = pairs
    ids = sorted(pair.prompt.id for pair in test)
    shown.open(page, f"#prompt/test/{ids[40]}")
    assert shown.text("count") == "Prompt 41 of 60"
    shown.run("document.querySelector('[data-control=prompt]').focus()")
    shown.press("n")
    assert shown.text("count") == "Prompt 42 of 60"
    shown.press("pp")
    assert shown.text("count") == "Prompt 40 of 60"
    shown.press("/")
    shown.press("npx/")  # in the search, keys are letters
    assert shown.run("return document.activeElement.value") == "npx/"
    shown.click("clear")
    shown.run("document.querySelector('[data-control=list] a').focus()")
    shown.press("\ue007")  # Enter follows the link
    shown.driver.execute_async_script("setTimeout(arguments[0], 100)")
    listed = shown.run("return document.querySelector('[data-control=list] a').hash")
    assert shown.run("return location.hash") == listed == f"#prompt/test/{ids[0]}"
    assert shown.run("return document.activeElement.dataset.control") == "prompt"
    shown.open(page, "#prompt/test/%E0%A4%A")  # no prompt, and no encoding
    assert shown.text("count") == "Prompt 1 of 60" and shown.driver.get_log("browser") == []
    names = shown.run(
        "return [...document.querySelectorAll('#browser input, #browser select, #browser button')]"
        ".filter(e => e.checkVisibility()).map(e => e.ariaLabel || e.labels?.[0]?.innerText || e.innerText)"
    )
    assert len(names) >= 10 and all(names)


def test_hostile_text_is_text_and_nothing_is_loaded(shown: Shown, page: Path) -> None:
    shown.open(page)
    driver = shown.driver
    said = shown.run("return document.querySelector('.responses tr:nth-child(2) .say').textContent")
    assert said.startswith(
        '<img src=x onerror="document.title=1"></script><script>document.title=2</script><!--<script>'
    )
    assert "{{ 7 * 7 }} &lt;b&gt; \ufffdgnol\ufffd \ufffd \ufffd\ufffd[31m \ufffd\ufffd" in said
    assert driver.title == "MACPO run run" and shown.run("return document.querySelectorAll('script').length") == 2
    assert shown.run("return document.querySelectorAll('main img, main iframe, main style, main script').length") == 0
    assert shown.run("return performance.getEntriesByType('resource').length") == 0 and driver.get_log("browser") == []
    # What would slip through is forbidden: neither inline code nor anything from elsewhere runs.
    driver.execute_script("document.body.insertAdjacentHTML('beforeend', arguments[0])", HOSTILE)
    driver.execute_script(
        "const s = document.createElement('script'); s.text = 'document.title = 4'; document.body.append(s)"
    )
    driver.execute_async_script("fetch('http://127.0.0.1:9/').then(arguments[0], arguments[0])")
    assert driver.title == "MACPO run run"
    assert sum("Content Security Policy" in entry["message"] for entry in driver.get_log("browser")) >= 3


@pytest.mark.parametrize("name", ["test", "train"])
def test_a_phone_scrolls_down_alone(shown: Shown, page: Path, name: str) -> None:
    shown.open(page, width=360)
    shown.set("set", name)
    shown.run("document.querySelectorAll('details').forEach(e => e.open = true)")
    for _ in range(3):
        assert not shown.overflows()
        shown.click("next")
    shown.run("document.documentElement.classList.remove('js')")  # as without a script
    assert not shown.overflows()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(shown: Shown, page: Path, scheme: str) -> None:
    """WCAG 2.2, 1.4.3: 4.5 to 1."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    shown.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    shown.open(page)
    shown.set("set", "train")
    shown.set("query", "a")
    assert shown.run(CONTRAST) == []
    shown.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_in_print_and_without_scripts_the_first_prompts_are_a_table(shown: Shown, page: Path) -> None:
    visible = "return [...document.querySelectorAll('#browser, .plain, noscript')].map(e => e.checkVisibility())"
    shown.open(page)
    assert shown.run(visible) == [False, True, False]
    shown.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert shown.run(visible) == [False, False, True]
    assert shown.run("return [...document.querySelectorAll('button, input')].some(e => e.checkVisibility())") is False
    shown.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    shown.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    shown.open(page)
    shown.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert shown.run(visible) == [True, False, True]
    assert shown.run("return document.querySelectorAll('.plain .case').length") == 6


def test_five_thousand_prompts_of_ten_policies_stay_quick(
    shown: Shown, large_run: Callable[..., Path], tmp_path: Path
) -> None:
    made = write_report(large_run(tmp_path / "run", 5_000, 10, 20))
    assert 8_000_000 < made.stat().st_size < 16_000_000
    began = time.monotonic()
    shown.open(made)
    assert shown.text("hits") == "5,000 prompts" and time.monotonic() - began < 20
    script = """
        const done = arguments[0];
        const query = document.querySelector("[data-control=query]");
        const hits = document.querySelector("[data-control=hits]");
        const began = performance.now();
        const tell = () => done([performance.now() - began, hits.textContent]);
        new MutationObserver(tell).observe(hits, { childList: true });
        query.value = "w99987"; query.dispatchEvent(new Event("input"));
    """
    took_ms, hits = shown.driver.execute_async_script(script)
    assert re.fullmatch(r"[12] of 5,000 prompts match", hits) and took_ms < 5_000
