"""The annotation page: in headless Chromium with keys that are really pressed, and against requests of other pages."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from commands import macpo

from macpo import annotation
from macpo.engine.files import read_json

HOSTILE = (
    '<img src=x onerror="document.title=1"><script>document.title=2</script></article><style>*{display:none}</style>'
    ' <iframe src="javascript:parent.document.title=3"></iframe> \u202egnol\u2066 \x00\x1b[31m \u200b\ufeff'
)


@contextlib.contextmanager
def started(run: Path, *words: object, most_bytes: int | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in a process of its own, and the address that it prints; `most_bytes`: of a file it can write."""
    command = [sys.executable, "-m", "macpo.cli", "annotate", str(run), *map(str, words)]
    if most_bytes is not None:
        command = ["prlimit", f"--fsize={most_bytes}", *command]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stderr
        line = process.stdout.readline()
        assert line.startswith("open this page: "), line + process.stderr.read()
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.communicate()


class Browser:
    """Headless Chromium that shows the annotation page."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    # Waits until the page shows something else than `arguments[0]`, and says what.
    LOOK = """
        const done = arguments[1];
        const shown = () => document.body && document.body.dataset.showing;
        const tell = () => done([shown(), document.getElementById("left").firstChild?.textContent,
                                 document.getElementById("right").firstChild?.textContent]);
        const wait = () => shown() && shown() !== arguments[0] ? tell() : setTimeout(wait, 1);
        wait();
    """

    def open(self, url: str) -> list[str]:
        self.driver.get(url)
        return self.shown("")

    def shown(self, before: str) -> list[str]:
        found: list[str] = self.driver.execute_async_script(self.LOOK, before)
        return found

    def press(self, keys: str) -> None:
        from selenium.webdriver.common.actions.action_builder import ActionBuilder

        actions = ActionBuilder(self.driver, duration=0)
        actions.key_action.send_keys(keys)
        actions.perform()

    def text(self, name: str) -> str:
        found: str = self.driver.execute_script(f"return document.getElementById({name!r}).innerText")
        return found

    def until(self, condition: str) -> None:
        script = f"const done = arguments[0]; (function f() {{ {condition} ? done() : setTimeout(f, 1) }})()"
        self.driver.execute_async_script(script)


@pytest.fixture(scope="module")
def browser(chromium: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    profile = tmp_path_factory.mktemp("chromium")
    driver = chromium(profile, "host-resolver-rules=MAP rebound.test 127.0.0.1", "window-size=1200,850")
    yield Browser(driver)
    driver.quit()


def rows(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "annotation" / f"{name}.jsonl").read_text().splitlines()]


def ask(url: str, method: str, path: str, body: str | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and content of a request that no browser makes."""
    connection = http.client.HTTPConnection("127.0.0.1", int(urlsplit(url).port or 0))
    with contextlib.closing(connection):
        connection.putrequest(method, path, skip_host="Host" in headers)
        given = {"Content-Length": str(len(body))} if body is not None else {}
        for name, value in {**given, **{name.replace("_", "-"): v for name, v in headers.items()}}.items():
            connection.putheader(name, value)
        connection.endheaders(body.encode() if body is not None else None)
        reply = connection.getresponse()
        return reply.status, dict(reply.getheaders()), reply.read()


def key_for(left: str, right: str) -> str:
    """What a person who likes "blue" presses: of ten numbers six times blue, two times red, once both ways of a tie."""
    digit = int(left.split()[1]) % 10
    if digit >= 8:
        return "0b"[digit - 8]
    wanted = "blue" if digit < 6 else "red"
    assert {left.split()[0], right.split()[0]} == {"blue", "red"}
    return "1" if left.startswith(wanted) else "2"


def luminance(colour: str) -> float:
    """Relative luminance of "#rrggbb" (WCAG 2.2)."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_have_contrast(theme: int) -> None:
    """4.5 for text, 3 for the outline of what has the focus and the edges of buttons (WCAG 2.2, 1.4.3 and 1.4.11)."""
    page = (Path(annotation.__file__).parent / "page.html").read_text()
    colours = dict(re.findall(r"--([\w-]+): (#\w{6});", re.findall(r":root \{(.*?)\}", page, re.DOTALL)[theme]))
    places = [
        ("ink", "page"),
        ("ink", "card"),
        ("ink", "soft"),
        ("ink", "bad-soft"),
        ("muted", "page"),
        ("muted", "card"),
    ]
    for first, second, least in [
        *((*place, 4.5) for place in (*places, ("muted", "soft"))),
        *(("accent", "page", 3), ("accent", "card", 3), ("line", "card", 3), ("line", "page", 3)),
    ]:
        low, high = sorted((luminance(colours[first]), luminance(colours[second])))
        assert (high + 0.05) / (low + 0.05) >= least, (first, second)


def test_five_hundred_judgements_by_keys_with_a_kill_between(
    browser: Browser, responses: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = responses(tmp_path / "run", 460, lambda policy, i: f"{'blue' if policy == 'student@3' else 'red'} {i}")
    pressed = []
    with started(run, "--annotator", "anna", "--prompts", 460) as (process, url):
        showing, left, right = browser.open(url)
        for _ in range(250):
            pressed.append((showing, key_for(left, right)))
            browser.press(pressed[-1][1])
            showing, left, right = browser.shown(showing)
        assert browser.text("count") == "250 of 506 judged"
        process.kill()  # SIGKILL
        process.wait()
        browser.press("1")
        browser.until("!document.getElementById('alert').hidden")
        assert browser.text("alert").startswith("Not saved: the server does not answer.")
    with (run / "annotation" / "anna.jsonl").open("a") as file:
        file.write('{"row": "judgement", "showi')  # a row that was torn by the kill
    with started(run, "--annotator", "anna") as (process, url):
        assert browser.open(url) == [showing, left, right]  # on the item that was on the screen
        while showing != "end":
            pressed.append((showing, key_for(left, right)))
            browser.press(pressed[-1][1])
            showing, left, right = browser.shown(showing)
        assert browser.text("count") == "506 of 506 judged" and "Thank you" in browser.text("end")
        assert not browser.driver.get_log("browser")[1:]  # the one entry is the request to the killed server
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0  # everything is judged

    verdicts = {"1": "left", "2": "right", "0": "tie", "b": "both-bad"}
    saved = rows(run, "anna")[1:]
    assert [(row["showing"], row["verdict"]) for row in saved] == [(shown, verdicts[key]) for shown, key in pressed]
    assert len({row["showing"] for row in saved}) == 506 and sum(row["repeat"] for row in saved) == 46
    assert all(0 < row["seconds"] < 600 for row in saved)

    assert macpo("annotate", run, "--report") == 0
    assert "better" in capsys.readouterr().out
    found = read_json(run / "annotation" / "annotation.json")
    (pair,) = found["pairs"]
    assert (pair["win"], pair["tie"], pair["lose"], pair["both_bad"]) == (276, 92, 92, 46)
    assert pair["win_rate"] == pytest.approx(0.7) and pair["verdict"] == "better"
    person = found["people"]["anna"]
    assert person["repeats_same"]["share"] == 1 and person["repeats_same"]["of"] == 46
    assert 0.4 < person["left"]["share"] < 0.6


def test_undo_skip_comment_and_focus_with_the_keyboard_alone(
    browser: Browser, responses: Callable[..., Path], tmp_path: Path
) -> None:
    run = responses(tmp_path / "run", 5)
    with started(run, "--annotator", "ben", "--repeats", "0") as (_, url):
        first, *_ = browser.open(url)
        browser.press("1")
        second, *_ = browser.shown(first)
        browser.press("u")
        assert browser.shown(second)[0] == first
        browser.press("c")  # in the comment, keys are letters
        browser.press("12 u0")
        assert browser.driver.execute_script("return document.activeElement.id") == "comment"
        browser.press("\ue00c")  # Escape
        browser.press("2")
        assert browser.shown(first)[0] == second
        browser.press("s")
        third, *_ = browser.shown(second)
        for _ in range(3):  # the browser's own keys reach the buttons: from the heading, Tab to "Equal"
            if browser.driver.execute_script("return document.activeElement.dataset.verdict") == "tie":
                break
            browser.press("\ue004")
        browser.press("\ue007")  # Enter
        browser.shown(third)
        names = browser.driver.execute_script(
            "return [...document.querySelectorAll('button, textarea, progress')].map(e => e.labels?.[0]?.innerText"
            " || e.innerText || document.getElementById(e.getAttribute('aria-labelledby')).innerText)"
        )
        assert all(names) and "3 of 5 judged" in names
    kinds = [row["row"] for row in rows(run, "ben")]
    assert kinds == ["annotator", "judgement", "undo", *["judgement"] * 3]
    assert [row.get("verdict") for row in rows(run, "ben")[3:]] == ["right", "skip", "tie"]
    assert rows(run, "ben")[3]["comment"] == "12 u0" and rows(run, "ben")[4]["comment"] == ""


def test_a_key_that_is_held_down_judges_one_item(
    browser: Browser, responses: Callable[..., Path], tmp_path: Path
) -> None:
    run = responses(tmp_path / "run", 6)
    with started(run, "--annotator", "cas") as (_, url):
        first, *_ = browser.open(url)
        press = {"type": "keyDown", "key": "1", "text": "1", "windowsVirtualKeyCode": 49}
        browser.driver.execute_cdp_cmd("Input.dispatchKeyEvent", press)
        browser.shown(first)
        for _ in range(3):
            browser.driver.execute_cdp_cmd("Input.dispatchKeyEvent", press | {"autoRepeat": True})
        browser.press("c")  # is answered after the repeated ones
        assert browser.text("count").startswith("1 of")
    assert len(rows(run, "cas")) == 2


def test_hostile_text_is_text(browser: Browser, responses: Callable[..., Path], tmp_path: Path) -> None:
    huge = "x" * 1_000_000
    run = responses(
        tmp_path / "run", 4, lambda policy, i: f"{policy} {HOSTILE} {i} {huge if policy == 'student@0' else ''}"
    )
    with started(run, "--annotator", "dora") as (_, url):
        _, left, right = browser.open(url)
        for text in (left, right):
            assert "<script>document.title=2</script>" in text and "\ufffdgnol\ufffd" in text
            assert not re.search("[\x00\x1b\u200b\u202e\u2066\ufeff]", text)
        assert "more characters)" in (left if len(left) > len(right) else right) and len(left + right) < 21_000
        driver = browser.driver
        assert driver.title == "Which response is better?"
        assert (
            driver.execute_script(
                "return document.querySelectorAll('main img, main script, main iframe, main style').length"
            )
            == 0
        )
        assert driver.execute_script("return document.querySelectorAll('script').length") == 1
        assert driver.get_log("browser") == []  # nothing was blocked, because nothing was tried
        # What would slip through is forbidden: neither inline code nor anything from elsewhere runs.
        driver.execute_script("document.body.insertAdjacentHTML('beforeend', arguments[0])", HOSTILE)
        driver.execute_script(
            "const s = document.createElement('script'); s.text = 'document.title = 4'; document.body.append(s)"
        )
        assert driver.title == "Which response is better?"
        assert sum("Content Security Policy" in entry["message"] for entry in driver.get_log("browser")) >= 3


def test_other_names_and_pages_are_refused(browser: Browser, responses: Callable[..., Path], tmp_path: Path) -> None:
    run = responses(tmp_path / "run", 4)
    with started(run, "--annotator", "eve") as (_, url):
        address = urlsplit(url)
        browser.driver.get(f"http://rebound.test:{address.port}{address.path}")  # a name that was rebound to loopback
        assert browser.driver.find_element("tag name", "body").text == "refused"
        browser.driver.get("data:text/html,<title>another page</title>")
        script = """
            const done = arguments[1];
            const options = { method: "POST", body: "{}", headers: { "Content-Type": "application/json" } };
            fetch(arguments[0] + "undo", options).then(() => done("sent"), () => done("refused"));
        """
        assert browser.driver.execute_async_script(script, url) == "refused"

        status, headers, page = ask(url, "GET", address.path)
        assert status == 200 and b"Which response" in page and b"http" not in page.replace(b"http-equiv", b"")
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; connect-src 'self'") and "unsafe" not in policy
        assert headers["cache-control"] == "no-store" and headers["referrer-policy"] == "no-referrer"
        status, _, content = ask(url, "GET", f"{address.path}state")
        shown = json.loads(content)
        assert status == 200 and b"student" not in re.sub(rb"student@\d says", b"", content)
        assert set(shown["showing"]) == {"id", "turns", "left", "right"}

        origin = f"http://127.0.0.1:{address.port}"
        right = {"Origin": origin, "Content_Type": "application/json"}
        judgement = json.dumps({"showing": shown["showing"]["id"], "verdict": "left"})
        judge = f"{address.path}judge"
        wrong = address.path.replace(address.path[5], "A" if address.path[5] != "A" else "B")
        refusals: list[tuple[int, tuple[Any, ...], dict[str, str]]] = [
            (421, ("GET", address.path), {"Host": "evil.example"}),
            (421, ("GET", address.path), {"Host": f"evil.example:{address.port}"}),
            (421, ("GET", address.path), {"Host": "127.0.0.1"}),
            (403, ("GET", address.path), {"Origin": "http://evil.example"}),
            (403, ("GET", address.path), {"Sec_Fetch_Site": "cross-site"}),
            (404, ("GET", wrong), {}),
            (404, ("GET", "/"), {}),
            (404, ("GET", f"{address.path}../../etc/passwd"), {}),
            (404, ("GET", f"{address.path}items.json"), {}),
            (404, ("GET", address.path.rstrip("/")), {}),
            (405, ("GET", judge), {}),
            (403, ("POST", judge, judgement), right | {"Origin": "http://evil.example"}),
            (403, ("POST", judge, judgement), right | {"Origin": "null"}),
            (403, ("POST", judge, judgement), {"Content_Type": "application/json"}),
            (400, ("POST", judge, judgement), right | {"Content_Type": "text/plain"}),
            (404, ("POST", f"{wrong}judge", judgement), right),
            (400, ("POST", judge, "[1]"), right),
            (400, ("POST", judge, "[" * 30_000), right),
            (400, ("POST", judge, json.dumps({"comment": "x" * 40_000})), right),
            (409, ("POST", judge, json.dumps({"showing": "x", "verdict": "left"})), right),
            (400, ("POST", judge, judgement.replace("left", "first")), right),
            (400, ("POST", judge, judgement.replace("}", ', "seconds": -1}')), right),
            (400, ("POST", judge, judgement.replace("}", ', "comment": "\\ud800"}')), right),
        ]
        for expected, words, extra in refusals:
            assert ask(url, *words, **extra)[0] == expected, (words, extra)
        assert len(rows(run, "eve")) == 1  # nothing was saved
        status, _, content = ask(url, "POST", judge, judgement, **right)
        assert status == 200 and json.loads(content)["done"] == 1
    assert len(rows(run, "eve")) == 2


def test_it_listens_on_loopback_alone_and_for_one_process_a_person(
    responses: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = responses(tmp_path / "run", 4)
    with started(run, "--annotator", "fay") as (process, url):
        port = int(urlsplit(url).port or 0)
        with pytest.raises(ConnectionRefusedError):  # another address of this machine
            socket.create_connection(("127.0.0.2", port))
        assert macpo("annotate", run, "--annotator", "fay") == 2
        assert "another process shows fay the page" in capsys.readouterr().err
        assert macpo("annotate", run, "--annotator", "gil", "--port", port) == 2
        assert "--port: port" in (err := capsys.readouterr().err) and "--port 0 finds a free one" in err
        process.send_signal(signal.SIGINT)
        assert process.wait() == 75 and process.stderr
        assert "stopped after 0 of 4 judgements. Fix: run the same command again" in process.stderr.read()
    assert {path.name for path in (run / "annotation").iterdir()} == {"items.json", "fay.jsonl", "gil.jsonl"}


def test_a_judgement_that_cannot_be_saved_is_not_counted(responses: Callable[..., Path], tmp_path: Path) -> None:
    run = responses(tmp_path / "run", 4)
    assert macpo("annotate", run, "--export", "argilla", tmp_path / "argilla.jsonl") == 0  # begins the study
    with started(run, "--annotator", "hal", most_bytes=300) as (_, url):  # room for the head of the file alone
        path = urlsplit(url).path
        shown = json.loads(ask(url, "GET", f"{path}state")[2])
        headers = {"Origin": f"http://{urlsplit(url).netloc}", "Content_Type": "application/json"}
        judgement = json.dumps({"showing": shown["showing"]["id"], "verdict": "left"})
        status, _, content = ask(url, "POST", f"{path}judge", judgement, **headers)
        assert status == 507 and "no space to write it" in json.loads(content)["error"]
        assert json.loads(ask(url, "GET", f"{path}state")[2]) == shown
    assert len(rows(run, "hal")) == 1
