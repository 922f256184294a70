"""A web server of a folder that can be made to fail in the ways that servers do."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # As many as ask at the same time.
    request_queue_size = 128


class FaultyServer:
    """Serves a folder on loopback.

    Attributes:
        url, port: of the folder.
        requests: (method, path) of every request, in order.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.requests = []
        self._faults = []
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    def fail(self, name, fault, times=1, method="GET"):
        """Answer the next `times` requests for files that end on `name` with a fault.

        Faults: an HTTP status; the path of a file to send instead; "stall", "drop" and "truncated" send half a file and
        then nothing, a reset, or an orderly end; "wrong" sends other bytes.
        """
        self._faults.append([method, name, fault, times])

    def gets(self, ending=""):
        """How many files, with names that end so, were asked for."""
        return sum(m == "GET" and path.endswith(ending) for m, path in self.requests)

    def _fault(self, method, path):
        with self._lock:
            self.requests.append((method, path))
            for fault in self._faults:
                if fault[0] == method and path.endswith(fault[1]) and fault[3] > 0:
                    fault[3] -= 1
                    return fault[2]
        return None

    def _handler(server):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self._answer("HEAD")

            def do_GET(self):
                # A client may have given up on a connection that stalled.
                with contextlib.suppress(OSError):
                    self._answer("GET")

            def _answer(self, method):
                fault = server._fault(method, self.path)
                path = server.folder / self.path.lstrip("/")
                if isinstance(fault, Path):
                    path = fault
                if isinstance(fault, int):
                    self._send(fault, b"a page of words", method)
                elif not path.is_file():
                    self._send(404, b"no such file", method)
                else:
                    self._send_file(path.read_bytes(), fault, method)

            def _send_file(self, content, fault, method):
                if fault == "wrong":
                    content = bytes(byte ^ 1 for byte in content)
                if fault == "truncated":
                    content = content[: len(content) // 2]
                if fault not in ("stall", "drop"):
                    self._send(200, content, method)
                    return
                self._send(200, content, method, content[: len(content) // 2])
                self.close_connection = True
                if fault == "stall":
                    server._ended.wait(60)
                else:
                    # Closing resets the connection instead of ending it.
                    linger = struct.pack("ii", 1, 0)
                    self.connection.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, linger
                    )

            def _send(self, status, content, method, sent=None):
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if method == "GET":
                    self.wfile.write(content if sent is None else sent)
                self.wfile.flush()

        return Handler
