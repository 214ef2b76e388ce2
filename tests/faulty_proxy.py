"""An HTTP proxy in front of the S3 server: passes all on and counts it, and answers wrongly where a test asks for it."""

import http.client
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STATUS = {
    "AccessDenied": 403, "ConditionalRequestConflict": 409, "ExpiredToken": 400, "InternalError": 500, "InvalidToken": 400,
    "NoSuchKey": 404, "SlowDown": 503,
}  # fmt: skip
RESET = "reset"
"""The connection is reset before the request is passed on."""
LOST = "lost"
"""The request is passed on and done; then the connection is reset without an answer."""
FAULTS = [*STATUS, RESET, LOST]


@dataclass(frozen=True)
class Request:
    """One request, as it came."""

    method: str
    path: str
    """With the query."""
    range: str
    """The Range header, or an empty string."""
    answered: int = 0
    """Bytes of the answer's body."""


@dataclass
class Rule:
    """Requests that are to fail, and how."""

    fault: str
    method: re.Pattern[str]
    path: re.Pattern[str]
    times: float
    """How many more."""
    skip: int
    """How many to let pass before."""
    met: int = 0
    """How many failed."""

    def meets(self, request: Request) -> bool:
        """Whether this request is to fail; counts it."""
        if self.times <= 0 or not self.method.fullmatch(request.method) or not self.path.search(request.path):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        self.met += 1
        return True


class FaultyProxy:
    """Stands at a port of 127.0.0.1 and passes requests on to another.

    Args:
        port: where clients find it.
        behind: the server's port.
    """

    def __init__(self, port: int, behind: int) -> None:
        self.requests: list[Request] = []
        self.behind = behind
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, name="proxy", daemon=True).start()

    def stop(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()

    def fail(self, fault: str, method: str = ".*", path: str = "", times: float = 1, skip: int = 0) -> Rule:
        """Have the next requests fail that match.

        Args:
            fault: an S3 error code of `STATUS`, `RESET` or `LOST`.
            method: pattern of the whole method.
            path: pattern found in the path and query, which are percent-encoded.
            times: how many.
            skip: how many to let pass before.
        """
        rule = Rule(fault, re.compile(method), re.compile(path), times, skip)
        with self._lock:
            self._rules.append(rule)
        return rule

    def pass_all(self) -> None:
        """Forget all faults."""
        with self._lock:
            self._rules.clear()

    @contextmanager
    def counting(self) -> Iterator[list[Request]]:
        """The requests that come inside the block."""
        seen: list[Request] = []
        begin = len(self.requests)
        yield seen
        seen.extend(self.requests[begin:])

    def fault_of(self, request: Request) -> str | None:
        """What is to happen to a request."""
        with self._lock:
            return next((rule.fault for rule in self._rules if rule.meets(request)), None)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyProxy

    def handle_one_request(self) -> None:
        try:
            self.raw_requestline = self.rfile.readline(65537)
            if not self.raw_requestline or not self.parse_request():
                self.close_connection = True
                return
            self._answer()
        except (OSError, http.client.HTTPException):  # either side is gone
            self._reset()

    def _answer(self) -> None:
        request = Request(self.command, self.path, self.headers.get("Range", ""))
        body = self._body()
        fault = self.proxy.fault_of(request)
        if fault == RESET:
            self.proxy.requests.append(request)
            self._reset()
        elif fault in STATUS:
            self.proxy.requests.append(request)
            said = f"<?xml version='1.0'?><Error><Code>{fault}</Code><Message>{fault}, says the test</Message></Error>"
            self._send(STATUS[fault], {"Content-Type": "application/xml"}, said.encode())
        else:
            status, headers, content = self._pass_on(body)
            self.proxy.requests.append(Request(request.method, request.path, request.range, len(content)))
            self._reset() if fault == LOST else self._send(status, headers, content)

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _pass_on(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.behind, timeout=60)
        hop = ("connection", "expect", "transfer-encoding", "content-length", "keep-alive")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in hop}
        headers["Content-Length"] = str(len(body))
        connection.request(self.command, self.path, body or None, headers)
        answer = connection.getresponse()
        content = answer.read()
        said = {name: value for name, value in answer.getheaders() if name.lower() not in hop}
        if self.command == "HEAD":
            said["Content-Length"] = answer.getheader("Content-Length") or "0"
        connection.close()
        return answer.status, said, content

    def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        self.wfile.flush()

    def _reset(self) -> None:
        self.close_connection = True
        try:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        except OSError:
            return
