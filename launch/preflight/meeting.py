"""Can the hosts reach each other, and do they share a folder? Runs on each host at once.

Sent to `python -` over ssh, on its own, and needs nothing but the standard library. Every
host listens, greets whoever connects, and connects to all others. The first one puts a
file into the folder before it greets anyone, the others look for it after its greeting,
and it removes the file when all have looked or the time is up. Prints one JSON object.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time


def main(wanted):
    """Meet the others; `wanted` is what the controller asks for.

    Prints `unreached`, what is wrong by the number of each host that could not be
    reached, and `shared`, whether the first host's file is here; None where that is
    unknown.
    """
    seconds, me, peers = wanted["seconds"], wanted["me"], wanted["peers"]
    deadline = time.monotonic() + seconds
    marker = None
    if wanted["folder"] is not None:
        marker = os.path.join(wanted["folder"], f".meeting_{wanted['token']}")
    # Unwinds on SIGALRM and when ssh has gone, so that the file does not stay.
    for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    signal.alarm(seconds + 10)
    server = listener(peers[me]["port"])
    try:
        if me == 0 and marker is not None:
            with open(marker, "x"):
                pass
        greeting = f"{wanted['token']} {me}\n".encode()
        everyone = set(range(len(peers))) - {me}
        visited = greet_visitors(server, greeting, everyone)
        shared = None

        def visit(number):
            nonlocal shared
            peer = peers[number]
            expected = f"{wanted['token']} {number}\n".encode()
            try:
                with reach((peer["address"], peer["port"]), deadline) as connection:
                    problem = meet(connection, expected)
                    if number == 0 and problem is None and marker is not None:
                        shared = appears(marker)
                    connection.sendall(f"{me}\n".encode())
            except OSError as error:
                problem = str(error.strerror or error)
            return problem

        with concurrent.futures.ThreadPoolExecutor(len(everyone)) as pool:
            problems = dict(zip(everyone, pool.map(visit, everyone)))
        visited.wait(max(deadline - time.monotonic(), 0))
    finally:
        server.close()
        if me == 0 and marker is not None and os.path.exists(marker):
            os.unlink(marker)
    unreached = {number: text for number, text in problems.items() if text}
    print(json.dumps({"unreached": unreached, "shared": shared}), flush=True)


def greet_visitors(server, greeting, expected):
    """Greet whoever connects, in threads; the event is set when all expected have left."""
    missing, all_left = set(expected), threading.Event()

    def greet(connection):
        with connection, contextlib.suppress(OSError, ValueError):
            connection.sendall(greeting)
            missing.discard(int(connection.makefile().readline()))
            if not missing:
                all_left.set()

    def accept():
        # Until the server is closed.
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                threading.Thread(target=greet, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return all_left


def listener(port):
    """A socket that listens at all addresses."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(
        ("", port), family=family, dualstack_ipv6=dual, backlog=256
    )


def reach(address, deadline):
    """Connect to a host; one that does not listen yet is tried again."""
    while True:
        try:
            # Long enough for the kernel to ask three times.
            return socket.create_connection(address, timeout=5)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def meet(connection, expected):
    """What is wrong with the greeting at the other end of a connection, or None."""
    found = connection.makefile("rb").readline()
    return None if found == expected else "another program or host answers there"


def appears(path):
    """Whether a file is here; a network file system may need a moment."""
    for _ in range(10):
        if os.path.exists(path):
            return True
        time.sleep(0.1)
    return False


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
