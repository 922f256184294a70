"""A server that answers as the Hugging Face Hub does, for one data set in a folder."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves a folder on loopback as data set ``name``, at one commit.

    Attributes:
        url: what HF_ENDPOINT has to be.
        fetched: names of the files that were sent, in order.
    """

    def __init__(self, folder, name):
        self.folder = Path(folder)
        self.name = name
        self.fetched = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path, wanted):
        """The content for a request, or None; ``wanted`` are paths in a POST."""
        api = f"/api/datasets/{self.name}"
        files = [
            {
                "type": "file",
                "path": str(found.relative_to(self.folder)),
                "size": found.stat().st_size,
                "oid": "0" * 40,
            }
            for found in sorted(self.folder.rglob("*"))
            if found.is_file()
        ]
        folders = sorted({str(Path(file["path"]).parent) for file in files} - {"."})
        files += [{"type": "directory", "path": p, "oid": "0" * 40} for p in folders]
        if path.startswith(f"{api}/paths-info/"):
            return [file for file in files if file["path"] in wanted]
        if path.startswith(f"{api}/tree/"):
            below = unquote(path.removeprefix(f"{api}/tree/")).partition("/")[2]
            prefix = f"{below}/" if below else ""
            return [file for file in files if file["path"].startswith(prefix)]
        if path == api or path.startswith(f"{api}/revision/"):
            siblings = [{"rfilename": f["path"]} for f in files if f["type"] == "file"]
            return {"id": self.name, "sha": COMMIT, "siblings": siblings, "tags": []}
        return None

    def _handler(hub):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def respond(self, status, content=b"", **headers):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def do_GET(self):
                path = urlsplit(self.path).path
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                wanted = json.loads(body)["paths"] if body[:1] == b"{" else []
                answer = hub.answer(path, wanted)
                if answer is not None:
                    kind = {"Content_Type": "application/json"}
                    return self.respond(200, json.dumps(answer).encode(), **kind)
                resolve = f"/datasets/{hub.name}/resolve/"
                name = unquote(path.removeprefix(resolve)).partition("/")[2]
                file = hub.folder / name
                if not path.startswith(resolve) or not file.is_file():
                    known = path.startswith(resolve)
                    code = "EntryNotFound" if known else "RepoNotFound"
                    return self.respond(404, X_Error_Code=code)
                content = file.read_bytes()
                if self.command == "GET":
                    hub.fetched.append(name)
                etag = f'"{len(content)}-{name.replace("/", "-")}"'
                return self.respond(200, content, ETag=etag, X_Repo_Commit=COMMIT)

            do_HEAD = do_POST = do_GET

        return Handler
