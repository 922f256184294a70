"""What a host is and has. Runs on the host, on its own: sent to `python -` over ssh.

Needs nothing but the standard library and Python 3.7: what is missing on the host is to
be reported, not to fail. Prints a JSON object a line: `{"begin": SECTION}` before and
`{SECTION: ...}` after each section, so that a host that hangs shows where. The first and
the last line, `started` and `ended`, have the host's time.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GPU_FIELDS = (
    "index",
    "name",
    "uuid",
    "memory.total",
    "memory.used",
    "temperature.gpu",
    "ecc.errors.uncorrected.volatile.total",
    "driver_version",
)
PROCESS_FIELDS = ("gpu_uuid", "pid", "process_name", "used_memory")
_CODE = {".py", ".cpp", ".json", ".sh"}


def main(wanted):
    """Report everything; `wanted` is what the controller asks for."""
    tell({"started": time.time()})
    # The controller may be gone by then. Unwinds, so that no file stays.
    seconds = wanted["seconds"]
    end = f"it took more than {seconds} s"
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(end))
    signal.alarm(seconds)
    # The folder in which ssh starts is no place to import from.
    sys.path[:] = [entry for entry in sys.path if entry]
    for name, section in (
        ("python", lambda: {"version": sys.version.split()[0]}),
        ("packages", packages),
        ("code", lambda: code(Path(wanted["root"]))),
        ("compiler", compiler),
        ("network", lambda: network(wanted["names"], wanted["master_port"])),
        ("gpus", gpus),
        ("temporary", lambda: space(tempfile.gettempdir())),
        ("shared_memory", lambda: space("/dev/shm")),
        ("output", lambda: output(wanted["output_dir"])),
        ("data", lambda: [token_set(address) for address in wanted["data"]]),
    ):
        tell({"begin": name})
        try:
            found = section()
        except Exception as error:  # noqa: BLE001 - the other sections still count
            found = {"error": f"{type(error).__name__}: {error}"}
        tell({name: found})
    tell({"ended": time.time()})


def tell(value):
    """Print one line of the report."""
    print(json.dumps(value), flush=True)


def packages():
    """Versions of the installed packages, by name; the one that an import would find."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(name.lower().replace("_", "-"), distribution.version)
    return found


def code(root):
    """Where ten_dist is imported from, its commit, and a hash of each of its files."""
    folders = {"ds_configs": root / "ds_configs"}
    for package in ("ten_dist", "launch"):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            folders[package] = Path(spec.submodule_search_locations[0])
    files = {}
    for name, folder in folders.items():
        for path in sorted(folder.rglob("*")):
            if path.suffix in _CODE and path.is_file():
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                files[f"{name}/{path.relative_to(folder).as_posix()}"] = digest[:16]
    commit = output_of("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    return {
        "checkout": root.is_dir(),
        "imported_from": str(folders["ten_dist"]) if "ten_dist" in folders else None,
        "commit": commit["output"].strip() or None,
        "files": files,
    }


def compiler():
    """First line of what the C++ compiler says of itself; None without one."""
    name = os.environ.get("CXX") or "c++"
    lines = output_of(name, "--version")["output"].splitlines()
    return lines[0] if lines else None


def network(names, master_port):
    """Interfaces, what names resolve to here, and a port that is free.

    That is the master's where this host is asked for it and it is free.
    """
    own_name = socket.gethostname()
    found = {
        "host_name": own_name,
        "names": {name: resolved(name) for name in [*names, own_name]},
        "port_problem": None,
        "interfaces": interfaces(),
    }
    with listener(0) as server:
        found["meeting_port"] = server.getsockname()[1]
    if master_port is not None:
        try:
            listener(master_port).close()
            found["meeting_port"] = master_port
        except OSError as error:
            found["port_problem"] = f"{error.strerror}{port_owner(master_port)}"
    return found


def interfaces():
    """Addresses, state and MTU of each network interface; None without psutil."""
    try:
        import psutil
    except ImportError:
        return None
    states = psutil.net_if_stats()
    return {
        name: {
            "addresses": [
                entry.address.partition("%")[0]
                for entry in entries
                if entry.family in (socket.AF_INET, socket.AF_INET6)
            ],
            "up": name in states and states[name].isup,
            "mtu": states[name].mtu if name in states else None,
        }
        for name, entries in psutil.net_if_addrs().items()
    }


def resolved(name):
    """Addresses of a name here; empty if it has none."""
    try:
        entries = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return sorted({entry[4][0].partition("%")[0] for entry in entries})


def listener(port):
    """A socket that listens as torch's store does, at all addresses."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=dual)


def port_owner(port):
    """Which process listens at a port, in brackets; "" if that cannot be seen."""
    try:
        import psutil

        for connection in psutil.net_connections("tcp"):
            listens = connection.status == "LISTEN" and connection.laddr.port == port
            if listens and connection.pid:
                name = psutil.Process(connection.pid).name()
                return f" (process {connection.pid}, {name})"
    except Exception:  # noqa: BLE001 - psutil's errors cannot be named without it
        return ""
    return ""


def gpus():
    """What nvidia-smi says of devices and processes, as text; None without it."""
    if shutil.which("nvidia-smi") is None:
        return None
    form = "--format=csv,noheader,nounits"
    devices = output_of("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", form)
    processes = {"output": ""}
    if devices["status"] == 0:
        query = f"--query-compute-apps={','.join(PROCESS_FIELDS)}"
        processes = output_of("nvidia-smi", query, form)
    return {"devices": devices, "processes": processes["output"]}


def space(path):
    """Bytes in all and free where a path is or will be; None if nothing is there."""
    if not os.path.isdir(path):
        return None
    usage = shutil.disk_usage(path)
    return {"path": path, "total": usage.total, "free": usage.free}


def output(path):
    """Whether a folder can be written to, or made; nothing of it stays."""
    if path is None:
        return None
    existing = path
    while not os.path.isdir(existing):
        existing = os.path.dirname(existing)
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".preflight_") as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
        problem = None
    except OSError as error:
        problem = error.strerror
    return {"existing": existing, "problem": problem, **space(existing)}


def token_set(address):
    """Fingerprints of a token set and of the held-out set beside it."""
    found = {"address": address, "problem": None, "fingerprint": None}
    try:
        if "://" in address:
            from ten_dist.data import Manifest

            found["fingerprint"] = Manifest.load(address).fingerprint
        else:
            found["fingerprint"] = "+".join(
                fingerprint(folder)
                for folder in (Path(address), Path(address, "val"))
                if folder.name != "val" or folder.is_dir()
            )
    except OSError as error:
        found["problem"] = f"{error.filename or address}: {error.strerror or error}"
    except Exception as error:  # noqa: BLE001 - whatever is wrong with it is told
        found["problem"] = str(error)
    return found


def fingerprint(folder):
    """Fingerprint of a token set, each of whose files is there in its whole size."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for shard in manifest["shards"]:
        size = (folder / shard["name"]).stat().st_size
        if size != shard["bytes"]:
            raise ValueError(
                f"{folder / shard['name']} has {size} bytes, not {shard['bytes']}"
            )
    return manifest["fingerprint"]


def output_of(*words):
    """Status, output and errors of a program; it has 20 seconds."""
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=20,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"status": None, "output": "", "errors": "no answer in 20 s"}
    except OSError as error:
        return {"status": None, "output": "", "errors": str(error.strerror)}
    errors = done.stderr.strip()
    return {"status": done.returncode, "output": done.stdout, "errors": errors}


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main(json.loads(sys.argv[1]))
    # At once: by the time of this end the clock is judged.
    os._exit(0)
