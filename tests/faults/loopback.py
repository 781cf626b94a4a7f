"""Run a Weights & Biases server on this machine that fails, hangs or is slow after some number of requests."""

from __future__ import annotations

import base64
import http.server
import json
import threading
import time
from types import TracebackType


class Loopback:
    """Context manager that serves while it is open.

    ``how``: well, fails (status 500), hangs (never answers), slow (2 s each). ``after``: number of first requests that
    are answered well in any case. ``bodies``: bodies of the requests. ``keys``: API keys of the requests.
    ``misbehaved``: number of requests that were not answered well.
    """

    def __init__(self, how: str, after: int = 0) -> None:
        self.how, self.after = how, after
        self.requests, self.misbehaved = 0, 0
        self.bodies: list[bytes] = []
        self.keys: set[str] = set()
        self._closing = threading.Event()
        self._lock = threading.Lock()

        answer = self._answer

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                answer(self)

            def do_GET(self) -> None:
                answer(self)

            def do_PUT(self) -> None:
                answer(self)

            def log_message(self, *_: object) -> None:
                pass

        class Quiet(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """Ignore a client that disconnected."""

        self._server = Quiet(("127.0.0.1", 0), Handler)

    def _answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        with self._lock:
            self.requests += 1
            self.bodies.append(body)
            self.keys.add(
                base64.b64decode(handler.headers.get("Authorization", "").removeprefix("Basic "))
                .decode()
                .partition(":")[2]
            )
            well = self.how == "well" or self.requests <= self.after
            self.misbehaved += not well
        if not well and self.how == "hangs":
            self._closing.wait()
            return
        if not well and self.how == "slow":
            time.sleep(2.0)
        answer = json.dumps({"data": self._data(body)}).encode()
        handler.send_response(500 if not well and self.how == "fails" else 200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(answer)))
        handler.end_headers()
        handler.wfile.write(answer)

    def _data(self, body: bytes) -> dict[str, object]:
        """Return an empty answer, which W&B takes for an accepted run, or the address for uploads."""
        if b"createRunFiles" not in body:
            return {}
        names = json.loads(body)["variables"]["files"]
        files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in names]
        return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Loopback:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
