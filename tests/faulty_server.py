"""A server that fails in every way an MLflow server can, or hands on to a real one; also used by a benchmark."""

import http.client
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HOP_HEADERS = ("transfer-encoding", "connection", "content-length", "server", "date", "content-encoding")


class FaultyServer:
    """mode: pass (hand on to `upstream`, host:port), 500, 500-rows (only to log-batch), hang, drop, drip.

    The mode may be changed while it runs. requests: how many came in each mode.
    """

    def __init__(self, mode: str, upstream: str = "", port: int = 0) -> None:
        self.mode = mode
        self.upstream = upstream
        self.requests: dict[str, int] = {}
        self._ended = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                owner.requests[owner.mode] = owner.requests.get(owner.mode, 0) + 1
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                owner._answer(self, body)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any  # noqa: N815

            def log_message(self, *given: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def __enter__(self) -> "FaultyServer":
        return self

    def __exit__(self, *given: object) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def _answer(self, request: Any, body: bytes) -> None:
        rows = request.path.endswith("/runs/log-batch")
        if self.mode == "hang":
            self._ended.wait()
        elif self.mode == "drip":
            self._drip(request)
        elif self.mode == "drop":
            request.close_connection = True
        elif self.mode == "500" or (self.mode == "500-rows" and rows):
            self._send(request, 500, b'{"error_code": "INTERNAL_ERROR", "message": "struck by lightning"}', [])
        else:
            self._hand_on(request, body)

    def _drip(self, request: Any) -> None:
        """A byte a second, so that no read ever times out."""
        request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while not self._ended.wait(0.2):
            try:
                request.wfile.write(b" ")
                request.wfile.flush()
            except OSError:
                return

    def _hand_on(self, request: Any, body: bytes) -> None:
        connection = http.client.HTTPConnection(self.upstream, timeout=60)
        headers = {key: value for key, value in request.headers.items() if key.lower() not in ("host", "connection")}
        try:
            connection.request(request.command, request.path, body, headers)
            answer = connection.getresponse()
            kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in HOP_HEADERS]
            self._send(request, answer.status, answer.read(), kept)
        except OSError:
            request.close_connection = True
        finally:
            connection.close()

    def _send(self, request: Any, status: int, body: bytes, headers: list[tuple[str, str]]) -> None:
        request.send_response(status)
        for key, value in headers:
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)


def wait_until(condition: Any, seconds: float = 30) -> bool:
    """Whether a condition came true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return bool(condition())
