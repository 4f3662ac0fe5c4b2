"""An HTTP server on loopback that answers as a test wants: what clients of OpenAI-compatible servers are tried on."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Callable
from typing import Any, Self, TypeAlias

Reply: TypeAlias = tuple[int, dict[str, str], bytes]  # status, headers, body


class Server:
    """Every POST is answered by `act(number of the request, what `read` takes from its body)`; None hangs up."""

    def __init__(self, act: Callable[[int, Any], Reply | None], read: Callable[[Any], Any] = lambda body: body) -> None:
        self.act = act
        self.asked: list[Any] = []
        self.paths: set[str] = set()
        self.authorization: set[str | None] = set()
        outer, lock = self, threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = read(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                with lock:
                    outer.asked.append(asked)
                    number = len(outer.asked)
                    outer.paths.add(self.path)
                    outer.authorization.add(self.headers.get("Authorization"))
                reply = outer.act(number, asked)
                if reply is None:  # hang up without a word
                    return
                status, headers, content = reply
                with contextlib.suppress(ConnectionError):  # the client may have gone
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.httpd.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.httpd.server_port}/v1"
        self._thread = threading.Thread(target=self.httpd.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.httpd.shutdown()
        self._thread.join()
        self.httpd.server_close()


def completion(text: str, reason: str = "stop", **more: Any) -> Reply:
    choice = {"index": 0, "text": text, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    body = {
        "id": "x",
        "object": "text_completion",
        "created": 0,
        "model": "m",
        "choices": [choice | more.pop("choice", {})],
    }
    return 200, {"Content-Type": "application/json"}, json.dumps(body | more).encode()
