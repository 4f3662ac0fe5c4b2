"""The page's server: on loopback alone, under an address that cannot be guessed, for one person.

    GET  /TOKEN/        the page
    GET  /TOKEN/state   what is shown now: two responses as plain text, no names of policies
    POST /TOKEN/judge   {"showing", "verdict", "comment", "seconds"} -> the next state
    POST /TOKEN/undo    -> the state before

Whoever may open a socket on this machine, and whatever web page the person's browser has open, is kept out by four
checks of each request: the Host is this server's own (a name that was rebound to loopback is not), the Origin, where
the browser sends one, is this page's own, the token fits, and a POST carries JSON, which other pages may not send
without asking first.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import socket
import threading
from collections.abc import Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from macpo.annotation.design import Item, Showing
from macpo.annotation.judgements import MAX_COMMENT, Session
from macpo.engine.errors import ConfigError, MacpoError, Stopped
from macpo.engine.processes import StopFlag
from macpo.report.shown_text import clip, harmless

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

MAX_CHARS = 20_000
"""Longest text that the page shows; longer ones are cut, with the number of characters left out."""
MAX_BODY = 8 * MAX_COMMENT
LOOPBACK = "127.0.0.1"


def serve(session: Session, port: int) -> None:
    """Show the page until the person stops the command.

    Raises:
        ConfigError (2): the port is taken, or the package is not installed.
        Stopped (75): the person stopped before everything was judged; the same command resumes.
    """
    uvicorn = _uvicorn()
    token = secrets.token_urlsafe(32)
    listener = _listen(port)
    port = listener.getsockname()[1]
    config = uvicorn.Config(
        application(session, token, port),
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="page", daemon=True)
    with StopFlag(quiet=True) as stop:  # uvicorn leaves signals alone in a thread that is not the main one
        thread.start()
        print(f"open this page: http://{LOOPBACK}:{port}/{token}/", flush=True)
        print(f"{session.done} of {session.total} judged by {session.annotator}; Ctrl-C ends it", flush=True)
        while thread.is_alive() and not stop.requested:
            thread.join(0.1)
        server.should_exit = True
        thread.join()
    if session.done < session.total:
        fix = "run the same command again to go on"
        raise Stopped(f"stopped after {session.done} of {session.total} judgements", fix)
    print(f"all {session.total} are judged; `macpo annotate RUN --report` counts them")


def _uvicorn() -> Any:
    try:
        import starlette.applications  # noqa: F401
        import uvicorn
    except ImportError:
        raise ConfigError("the page needs starlette and uvicorn", "pip install 'macpo[eval]'") from None
    return uvicorn


def _listen(port: int) -> socket.socket:
    # The protocol is named so that asyncio sets TCP_NODELAY: without it a judgement takes 40 ms more.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK, port))
        listener.listen()  # whoever is faster than the server's start waits
    except (OSError, OverflowError) as error:
        listener.close()
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"port {port} cannot be used: {why}", "--port 0 finds a free one", field="--port") from None
    return listener


def page() -> tuple[bytes, str]:
    """Return the page and its content security policy, which names its one script and one style by their hashes."""
    content = files("macpo.annotation").joinpath("page.html").read_bytes()
    rules = ["default-src 'none'", "connect-src 'self'", "base-uri 'none'", "form-action 'none'"]
    for kind in ("script", "style"):
        (inline,) = re.findall(rb"<%b>(.*?)</%b>" % (kind.encode(), kind.encode()), content, re.DOTALL)
        rules.append(f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(inline).digest()).decode()}'")
    return content, "; ".join([*rules, "frame-ancestors 'none'"])


def application(session: Session, token: str, port: int) -> ASGIApp:
    """Return the ASGI application that shows the session's page under the token."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    content, policy = page()

    async def show_page(request: Request) -> Response:
        return Response(content, media_type="text/html")

    async def show_state(request: Request) -> Response:
        return JSONResponse(state(session))

    async def judge(request: Request) -> Response:
        given = await _object(request)
        current = session.current
        if given is None:
            return JSONResponse({"error": "not a judgement"}, 400)
        if current is None or given.get("showing") != current.id:  # another tab of the same page was faster
            return JSONResponse(state(session) | {"error": "this one was judged already"}, 409)
        try:
            session.judge(current, given.get("verdict", ""), given.get("comment") or "", given.get("seconds"))
        except ValueError:
            return JSONResponse({"error": "not a judgement"}, 400)
        return JSONResponse(state(session))

    async def undo(request: Request) -> Response:
        if await _object(request) is None:
            return JSONResponse({"error": "not a request of the page"}, 400)
        session.undo()
        return JSONResponse(state(session))

    async def not_saved(request: Request, error: Exception) -> Response:
        assert isinstance(error, MacpoError)
        print(error.problems[0], flush=True)
        return JSONResponse({"error": str(error.problems[0])}, 507)

    routes = [
        Route(f"/{token}/", show_page),
        Route(f"/{token}/state", show_state),
        Route(f"/{token}/judge", judge, methods=["POST"]),
        Route(f"/{token}/undo", undo, methods=["POST"]),
    ]
    app: Starlette = Starlette(routes=routes, exception_handlers={MacpoError: not_saved})
    app.router.redirect_slashes = False
    return _Guard(app, token, port, policy)


def state(session: Session) -> dict[str, Any]:
    """Return what the page shows now."""
    showing = session.current
    return {
        "done": session.done,
        "total": session.total,
        "showing": None if showing is None else _shown(showing, session.item(showing)),
    }


def _shown(showing: Showing, item: Item) -> dict[str, Any]:
    sides = [{"text": _text(text), "finished": done} for text, done in zip(item.answers, item.finished, strict=True)]
    left, right = reversed(sides) if showing.swapped else sides
    turns = [{"role": _text(turn.get("role", "")), "text": _text(_said(turn))} for turn in item.prompt]
    return {"id": showing.id, "turns": turns, "left": left, "right": right}


def _said(turn: Mapping[str, Any]) -> str:
    """A message's text, and as JSON what else it holds, such as tool calls."""
    rest = {name: value for name, value in turn.items() if name not in ("role", "content") and value}
    parts = (turn.get("content"), rest)
    texts = [part if isinstance(part, str) else json.dumps(part, ensure_ascii=False) for part in parts if part]
    return "\n".join(texts)


def _text(text: Any) -> str:
    return harmless(clip(text, MAX_CHARS))


async def _object(request: Request) -> dict[str, Any] | None:
    """The JSON object that a POST carries; None for anything else, and for more than the page ever sends."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return None
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            return None
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


class _Guard:
    """Answers requests that are not from the page itself without asking the application, and adds headers to all."""

    def __init__(self, app: ASGIApp, token: str, port: int, policy: str) -> None:
        self.app, self.token = app, token
        self.hosts = {f"{name}:{port}" for name in (LOOPBACK, "localhost")}
        self.origins = {f"http://{host}" for host in self.hosts}
        self.headers = [
            (b"content-security-policy", policy.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
            (b"cache-control", b"no-store"),
            (b"cross-origin-opener-policy", b"same-origin"),
            (b"cross-origin-resource-policy", b"same-origin"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.datastructures import Headers
        from starlette.responses import PlainTextResponse

        if scope["type"] != "http":
            await self.app(scope, receive, send)  # start and end of the server; no other kind is routed
            return

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message.get("headers", ()), *self.headers]}
            await send(message)

        status = self._refusal(Headers(scope=scope), scope["method"], scope["path"])
        if status is None:
            await self.app(scope, receive, send_guarded)
        else:
            await PlainTextResponse("refused", status)(scope, receive, send_guarded)

    def _refusal(self, headers: Any, method: str, path: str) -> int | None:
        """The status of a request that is refused; None for one of the page's own."""
        if headers.getlist("host") != [headers.get("host")] or headers.get("host", "").lower() not in self.hosts:
            return 421  # a name that leads here and is not ours
        origins = headers.getlist("origin")
        if any(origin not in self.origins for origin in origins) or (method not in ("GET", "HEAD") and not origins):
            return 403
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return 403
        given = path.split("/")[1]
        return None if secrets.compare_digest(given.encode(), self.token.encode()) else 404
