"""What `ten-dist launch` runs on every host, over ssh.

It reads requests from its input and writes events to its output, a JSON object a line. The
first request is one of

- clear: end what is left of earlier starts, check that there is a route to the master,
  and say which port is free; then it ends;
- start: start this host's ranks and say how they end. Then come alive, signal, kill and end.

Both sides say `alive` every few seconds. An agent that hears nothing any more ends the
ranks of its host: a launcher that was killed, or a host that was cut off, leaves none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from launch.cluster.node import Node, NodeStart
from launch.rank_environment import interface_towards, with_interface
from ten_dist.errors import ConfigurationError, TrainingError
from ten_dist.supervision.job import end_processes

ALIVE_SECONDS = 3.0
"""How often both sides say that they are alive."""
_POLL_SECONDS = 0.2
# The ranks of a launcher that has gone may still be able to save.
_SECONDS_TO_SAVE = 30.0
_SECONDS_FOR_FOLDER = 5.0


def main() -> int:
    """Serve one request from the input, as above."""
    request = json.loads(sys.stdin.readline())
    try:
        if request["do"] == "clear":
            _say(**_clear(request))
        else:
            _serve(request)
    except (ConfigurationError, TrainingError, OSError) as error:
        _say(error=str(error), refused=isinstance(error, ConfigurationError))
    return 0


def _say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def _clear(request: dict[str, Any]) -> dict[str, Any]:
    ended = end_processes(request["mark"], request["grace"])
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    # Without a route to the master this host cannot take part.
    interface_towards(request["master"])
    return {"ended": ended, "port": port}


def _serve(request: dict[str, Any]) -> None:
    _check_folder(Path(request["logs"]))
    part = NodeStart(**request["part"])
    interface = interface_towards(request["master"])
    environment = with_interface(part.environment, interface)
    node = Node(dataclasses.replace(part, environment=environment))
    requests: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    try:
        patience = _talk(node, requests, request["silence"])
    except OSError:
        # Nobody reads any more.
        patience = _SECONDS_TO_SAVE
    if patience is not None:
        node.abandon(patience)


def _check_folder(logs: Path) -> None:
    """Raise ConfigurationError if this host does not see the folder that the launcher made."""
    deadline = time.monotonic() + _SECONDS_FOR_FOLDER
    while not logs.is_dir():
        if time.monotonic() > deadline:
            raise ConfigurationError(
                f"{logs}, which the launcher has made, is not there: put --output_dir "
                "on a file system that all hosts and the launching machine share"
            )
        time.sleep(0.5)


def _read(requests: queue.Queue[dict[str, Any] | None]) -> None:
    for line in sys.stdin:
        requests.put(json.loads(line))
    requests.put(None)


def _talk(
    node: Node, requests: queue.Queue[dict[str, Any] | None], silence: float
) -> float | None:
    """Do as the launcher says until it says end, or nothing for `silence` seconds.

    Returns:
        None after an orderly end; else seconds that the ranks have to save.
    """
    heard = said = time.monotonic()
    status, ended = None, 0
    _say(alive=True)
    while True:
        with contextlib.suppress(queue.Empty):
            request = requests.get(timeout=_POLL_SECONDS)
            if request is None:
                return _SECONDS_TO_SAVE
            heard = time.monotonic()
            if request["do"] == "end":
                _say(gone=node.end(request["grace"]))
                return None
            if request["do"] == "signal":
                node.send(request["number"])
            elif request["do"] == "kill":
                node.kill()
        ranks = node.ended_ranks()
        if len(ranks) > ended:
            ended = len(ranks)
            _say(ended_ranks=ranks)
        if status is None and node.poll() is not None:
            status = node.poll()
            _say(status=status)
        now = time.monotonic()
        if now - said >= ALIVE_SECONDS:
            said = now
            _say(alive=True)
        if now - heard > silence:
            # The others of the run are out of reach, too.
            return 0.0


if __name__ == "__main__":
    # Reading threads may hold locks that an orderly end would wait for.
    os._exit(main())
