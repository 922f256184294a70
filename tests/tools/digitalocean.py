"""A server on loopback with the documented behaviour of the DigitalOcean API.

Its clock is its own, so that hours pass when a test says so; what takes the API a while
takes so many requests here.
"""

import contextlib
import email.utils
import functools
import itertools
import json
import re
import socket
import struct
import threading
import time
import urllib.parse
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.tools.digitalocean_catalogue import IMAGES, KEYS, REGIONS, SIZES

TOKEN = "dop_v1_" + "5ec7e7" * 10
_REGION = re.compile(r"[a-z]{3}[0-9]")
_TAG = re.compile(r"[A-Za-z0-9:_-]{1,255}")
_HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}")


class Refusal(Exception):
    """An answer that is no success."""

    def __init__(self, status, message, headers=None):
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


class DigitalOcean:
    """The API; a context manager.

    Attributes:
        url: endpoint.
        requests: (method, path with query, body) of every request, in order.
        droplets: by their ids, as the API answers them, each with `asked`, how often it
            was listed.
        provisioning: listings until a new droplet is active.
        dying: listings until a destroyed droplet is gone.
        tag_delay: listings until a new droplet has its tags.
        hidden: listings that a new droplet is absent from.
        faults: see :meth:`fail`.
        late: what was asked for and is still to be done.
    """

    def __init__(self):
        self.requests = []
        self.sizes = [dict(size) for size in SIZES]
        self.droplets, self.tags, self.vpcs, self.firewalls = {}, {}, {}, {}
        self.actions = []
        self.provisioning, self.dying, self.tag_delay, self.hidden = 2, 0, 0, 0
        self.extra_limit = None
        self.late = []
        self.faults = []
        self._offset = 0.0
        self._ids = itertools.count(1000)
        self._lock = threading.RLock()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(
            target=self._server.serve_forever, args=(0.01,), daemon=True
        ).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def now(self):
        return time.time() + self._offset

    def advance(self, hours):
        """Let hours pass."""
        self._offset += hours * 3600

    def fail(self, method, path, fault, times=1, skip=0):
        """Have requests fail, after `skip` of their kind.

        Args:
            method: of the requests.
            path: how their paths end, a regular expression.
            fault: a status to refuse with; a Refusal; "drop" the connection before
                anything is done; do it and then lose the answer ("lost"), send status 500
                ("lost 500") or something that is no JSON ("garbled"); drop it, and do it
                some requests later ("late"); of a creation, do a half and send status 503
                ("half") or have the last droplet fail ("errored"); or a function that is
                called when it has been done.
        """
        self.faults.append([method, path, fault, times, skip])

    def heal(self):
        """No more faults; what is late is done."""
        with self._lock:
            self.faults.clear()
            self.settle()

    def settle(self):
        """Do now what is late."""
        with self._lock:
            late, self.late = self.late, []
            for _, action in late:
                with contextlib.suppress(Refusal):
                    action()

    def changes(self):
        """Requests that were not only reading: (method, path)."""
        return [(method, path) for method, path, _ in self.requests if method != "GET"]

    # What follows answers requests.

    def _fault(self, method, path):
        for fault in self.faults:
            if fault[0] == method and re.search(fault[1] + "$", path) and fault[3] > 0:
                if fault[4] > 0:
                    fault[4] -= 1
                    continue
                fault[3] -= 1
                return fault[2]
        return None

    def _do_what_is_late(self):
        due = [entry for entry in self.late if entry[0] <= len(self.requests)]
        self.late = [entry for entry in self.late if entry not in due]
        for _, action in due:
            with contextlib.suppress(Refusal):
                action()

    def _answer(self, method, target, body, token):
        """Returns (status, headers, content); None drops the connection."""
        path, _, query = target.partition("?")
        query = dict(urllib.parse.parse_qsl(query))
        with self._lock:
            self.requests.append((method, target, body))
            self._do_what_is_late()
            fault = self._fault(method, path)
            if fault == "drop":
                return None
            if fault == "late":
                # The token is right, or the fault would not be worth its name.
                action = functools.partial(self._act, method, path, query, body)
                self.late.append((len(self.requests) + 12, action))
                return None
            try:
                if token != TOKEN:
                    raise Refusal(401, "Unable to authenticate you")
                if isinstance(fault, int):
                    raise Refusal(fault, "something is wrong here")
                if isinstance(fault, Refusal):
                    raise fault
                if fault == "half":
                    body = body | {"names": body["names"][: len(body["names"]) // 2]}
                status, content = self._act(method, path, query, body)
                if fault == "errored":
                    self._error(content["droplets"][-1]["id"])
            except Refusal as refusal:
                name = {401: "unauthorized", 404: "not_found"}.get(refusal.status, "e")
                content = {"id": name, "message": str(refusal)}
                return refusal.status, refusal.headers, content
        if fault == "lost":
            return None
        if fault in ("lost 500", "half"):
            return 500 if fault == "lost 500" else 503, {}, {"id": "e", "message": "no"}
        if fault == "garbled":
            return 200, {}, "<html>"
        if callable(fault):
            fault()
        return status, {}, content

    def _act(self, method, path, query, body):
        """Returns (status, content)."""
        parts = path.removeprefix("/v2/").split("/")
        match method, *parts:
            case "GET", "sizes":
                return self._page("sizes", self.sizes, query)
            case "GET", "regions":
                return self._page("regions", REGIONS, query)
            case "GET", "images":
                return self._page("images", IMAGES, query)
            case "GET", "images", name:
                for image in IMAGES:
                    if name in (str(image["id"]), image["slug"]):
                        return 200, {"image": image}
                raise Refusal(
                    404, "The resource you were accessing could not be found."
                )
            case "GET", "account", "keys":
                return self._page("ssh_keys", KEYS, query)
            case "GET", "actions":
                return self._page("actions", self.actions[::-1], query)
            case "GET", "droplets":
                return self._list_droplets(query)
            case "POST", "droplets":
                return self._create(body)
            case "DELETE", "droplets", number:
                return self._destroy(int(number))
            case "POST", "tags":
                return self._make_tag(body["name"])
            case "POST", "tags", name, "resources":
                return self._assign(name, body["resources"])
            case "GET", "vpcs":
                return self._page("vpcs", list(self.vpcs.values()), query)
            case "POST", "vpcs":
                return self._make_vpc(body)
            case "DELETE", "vpcs", name:
                return self._remove_vpc(name)
            case "GET", "firewalls":
                return self._page("firewalls", list(self.firewalls.values()), query)
            case "POST", "firewalls":
                return self._make_firewall(body)
            case "PUT", "firewalls", name:
                self._found(self.firewalls, name).update(body)
                return 200, {"firewall": self.firewalls[name]}
            case "DELETE", "firewalls", name:
                self._found(self.firewalls, name)
                del self.firewalls[name]
                return 204, None
        raise AssertionError(f"{method} {path} is no part of this API")

    def _page(self, key, items, query):
        size, number = int(query.get("per_page", 20)), int(query.get("page", 1))
        if not 1 <= size <= 200:
            raise Refusal(422, "per_page is out of range")
        first = (number - 1) * size
        pages = {}
        if first + size < len(items):
            pages["next"] = f"{self.url}/v2/{key}?page={number + 1}&per_page={size}"
        return 200, {
            key: items[first : first + size],
            "links": {"pages": pages} if pages else {},
            "meta": {"total": len(items)},
        }

    def _list_droplets(self, query):
        kind = query.get("type")
        if kind and ("tag_name" in query):
            raise Refusal(422, "type can not be combined with tag_name")
        shown = []
        for droplet in list(self.droplets.values()):
            if bool(droplet["size"].get("gpu_info")) != (kind == "gpus"):
                continue
            droplet["asked"] += 1
            self._age(droplet)
            if droplet["id"] in self.droplets and droplet["asked"] > self.hidden:
                shown.append(droplet)
        return self._page("droplets", shown, query)

    def _age(self, droplet):
        if droplet["dying_at"] is not None and droplet["asked"] > droplet["dying_at"]:
            del self.droplets[droplet["id"]]
        if droplet["asked"] > self.tag_delay:
            droplet["tags"] += droplet.pop("coming_tags", [])
        errored = any(
            (a["resource_id"], a["status"]) == (droplet["id"], "errored")
            for a in self.actions
        )
        if droplet["status"] == "new" and not errored:
            if droplet["asked"] <= self.provisioning:
                return
            droplet["status"] = "active"
            host = droplet["id"] % 250
            droplet["networks"]["v4"] = [
                {"ip_address": f"10.116.0.{host}", "type": "private"},
                {"ip_address": f"203.0.113.{host}", "type": "public"},
            ]
            for action in self.actions:
                if action["resource_id"] == droplet["id"]:
                    action["status"] = "completed"

    def _create(self, body):
        names = body.get("names") or [body["name"]]
        size = next((s for s in self.sizes if s["slug"] == body["size"]), None)
        image = {i["slug"] for i in IMAGES} | {i["id"] for i in IMAGES}
        if len(names) > 10:
            raise Refusal(422, "a maximum of 10 Droplets may be created at a time")
        if not all(_HOST_NAME.fullmatch(name) for name in names):
            raise Refusal(422, "Only valid hostname characters are allowed.")
        if (
            size is None
            or not size["available"]
            or body["region"] not in size["regions"]
        ):
            raise Refusal(422, "Size is not available in this region.")
        if body["image"] not in image or not {*body["ssh_keys"]} <= {
            key["id"] for key in KEYS
        }:
            raise Refusal(422, "You specified an invalid image or key.")
        if self._found(self.vpcs, body["vpc_uuid"])["region"] != body["region"]:
            raise Refusal(422, "the VPC is in another region")
        if len(body["user_data"].encode()) > 64 * 1024:
            raise Refusal(422, "user_data is too long")
        limit = self.extra_limit
        if limit is not None and len(self.droplets) + len(names) > limit:
            raise Refusal(422, "this will exceed your droplet limit")
        for tag in body["tags"]:
            self._make_tag(tag)
        droplets = [self._new_droplet(name, size, body) for name in names]
        links = [
            {"id": a["id"], "rel": "create", "href": f"{self.url}/v2/actions/{a['id']}"}
            for a in self.actions[-len(names) :]
        ]
        return 202, {"droplets": droplets, "links": {"actions": links}}

    def _new_droplet(self, name, size, body):
        number = next(self._ids)
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.now()))
        self.droplets[number] = droplet = {
            "id": number,
            "name": name,
            "status": "new",
            "size": {key: size[key] for key in ("slug", "price_hourly")}
            | {key: size[key] for key in ("gpu_info",) if key in size},
            "size_slug": size["slug"],
            "region": {"slug": body["region"]},
            "created_at": created,
            "networks": {"v4": [], "v6": []},
            "tags": [] if self.tag_delay else list(body["tags"]),
            "coming_tags": list(body["tags"]) if self.tag_delay else [],
            "vpc_uuid": body["vpc_uuid"],
            "asked": 0,
            "dying_at": None,
        }
        action = {
            "id": next(self._ids),
            "type": "create",
            "status": "in-progress",
            "resource_id": number,
            "resource_type": "droplet",
        }
        self.actions.append(action)
        return droplet

    def _error(self, number):
        for action in self.actions:
            if action["resource_id"] == number:
                action["status"] = "errored"

    def _destroy(self, number):
        droplet = self._found(self.droplets, number)
        if droplet["dying_at"] is None:
            droplet["dying_at"] = droplet["asked"] + self.dying
            if not self.dying:
                del self.droplets[number]
        return 204, None

    def _make_tag(self, name):
        if not _TAG.fullmatch(name):
            raise Refusal(422, "Tag name is invalid")
        self.tags.setdefault(name.lower(), name)
        return 201, {"tag": {"name": name, "resources": {"count": 0}}}

    def _assign(self, name, resources):
        self._found(self.tags, name.lower())
        for resource in resources:
            assert resource["resource_type"] == "droplet"
            droplet = self._found(self.droplets, int(resource["resource_id"]))
            if name not in droplet["tags"]:
                droplet["tags"].append(name)
        return 204, None

    def _make_vpc(self, body):
        if any(vpc["name"] == body["name"] for vpc in self.vpcs.values()):
            raise Refusal(422, "a VPC with this name is already in use")
        assert _REGION.fullmatch(body["region"])
        first = all(vpc["region"] != body["region"] for vpc in self.vpcs.values())
        name = str(uuid.uuid4())
        self.vpcs[name] = {
            **body,
            "id": name,
            "default": first,
            "ip_range": "10.0.0.0/20",
        }
        return 201, {"vpc": self.vpcs[name]}

    def _remove_vpc(self, name):
        vpc = self._found(self.vpcs, name)
        if vpc["default"]:
            raise Refusal(403, "The default VPC can not be deleted.")
        if any(droplet["vpc_uuid"] == name for droplet in self.droplets.values()):
            raise Refusal(403, "Can not delete VPC with members")
        del self.vpcs[name]
        return 204, None

    def _make_firewall(self, body):
        if any(wall["name"] == body["name"] for wall in self.firewalls.values()):
            raise Refusal(409, "duplicate name")
        for tag in body["tags"]:
            if tag.lower() not in self.tags:
                raise Refusal(422, f"tag {tag} does not exist")
        name = str(uuid.uuid4())
        self.firewalls[name] = {**body, "id": name, "status": "waiting"}
        return 202, {"firewall": self.firewalls[name]}

    @staticmethod
    def _found(items, key):
        if key not in items:
            raise Refusal(404, "The resource you were accessing could not be found.")
        return items[key]

    def _handler(api):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1

            def log_message(self, *_):
                pass

            def _answer(self):
                length = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(length)) if length else None
                token = self.headers.get("Authorization", "").removeprefix("Bearer ")
                answer = api._answer(self.command, self.path, body, token)
                if answer is None:
                    # Closing resets the connection instead of ending it.
                    linger = struct.pack("ii", 1, 0)
                    self.connection.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, linger
                    )
                    self.close_connection = True
                    return
                status, headers, content = answer
                self._send(status, headers, content)

            def _send(self, status, headers, content):
                data = b"" if content is None else json.dumps(content).encode()
                if content == "<html>":
                    data = content.encode()
                self.send_response_only(status)
                for name, value in {
                    "Date": email.utils.formatdate(api.now(), usegmt=True),
                    "Content-Type": "application/json",
                    "Content-Length": str(len(data)),
                    "ratelimit-limit": "5000",
                    "ratelimit-remaining": "4999",
                    "ratelimit-reset": str(int(api.now()) + 1),
                    **headers,
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
                self.wfile.flush()

            do_GET = do_POST = do_PUT = do_DELETE = _answer

        return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass
