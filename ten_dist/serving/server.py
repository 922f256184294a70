"""The server as a process: it starts, serves until a signal, and loses no request at its end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket

import uvicorn

from ten_dist.console import say, warn
from ten_dist.errors import ConfigurationError, TrainingError
from ten_dist.generation import Decoder
from ten_dist.serving.app import make_app
from ten_dist.serving.measurements import Measurements
from ten_dist.serving.prefix_cache import PrefixCache
from ten_dist.serving.served_model import ServedModel
from ten_dist.serving.serving_options import ServingOptions
from ten_dist.serving.worker import Worker
from ten_dist.threads import compute_in_one_thread

_LOOPBACK = ("127.", "::1", "localhost")
_SECONDS_TO_READ = 2.0
"""What clients have at least to read the rest of their answers when the server ends."""


def serve(served: ServedModel, options: ServingOptions) -> None:
    """Serve until SIGTERM or SIGINT; then end what is under way, and return.

    Raises:
        ConfigurationError: the address cannot be listened at.
        TrainingError: the model could not be computed.
    """
    listener = _listen(options.host, options.port)
    api_key = os.environ.get(options.api_key_variable) or None
    if api_key is None and not options.host.startswith(_LOOPBACK):
        warn(
            f"everybody who reaches {options.host} is served: set "
            f"{options.api_key_variable} to a key that clients have to send"
        )
    cache = PrefixCache(options.cache_megabytes * 10**6)

    def make_decoder() -> Decoder:
        if served.model.prefers_one_thread():
            # Of this thread; the others answer meanwhile.
            compute_in_one_thread()
        return served.model.decoder(cache)

    worker = Worker(make_decoder, options.slots, options.queue)
    measurements = Measurements(worker, cache)
    app = make_app(served, worker, measurements, options.request_timeout, api_key)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", http="httptools"
    )
    asyncio.run(_run(_Server(config, worker, options.grace_period), listener, served))
    if worker.failure is not None:
        raise TrainingError(f"the model could not be computed: {worker.failure}")


class _Server(uvicorn.Server):
    """A server that refuses what is new while it ends what is under way."""

    def __init__(self, config: uvicorn.Config, worker: Worker, grace: float) -> None:
        super().__init__(config)
        self.worker = worker
        self._grace = grace
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: object) -> None:
        """Begin to end at the first signal; end at the second."""
        if self._draining is not None:
            self.force_exit = self.should_exit = True
            return
        say(f"{signal.Signals(sig).name}: ending what is under way")
        self.end()

    def end(self) -> None:
        """Take no more requests, and end when those that there are have been answered."""
        if self._draining is None:
            loop = asyncio.get_running_loop()
            self._draining = loop.create_task(self._drain())

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + self._grace
        await self.worker.drain(self._grace)
        self.should_exit = True
        # A client that stops to send its request or to read its answer is not waited for.
        await asyncio.sleep(max(end - loop.time(), _SECONDS_TO_READ))
        # Nor is it a fault of the application.
        logging.getLogger("uvicorn.error").disabled = True
        self.force_exit = True


async def _run(server: _Server, listener: socket.socket, served: ServedModel) -> None:
    worker = server.worker
    await worker.start(on_failure=server.end)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    say(f"serving {served.name} at http://{shown}:{port}")
    await server.serve(sockets=[listener])
    await worker.stop()


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ConfigurationError: the address is not of this machine, or taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        raise ConfigurationError(
            f"--host {host} --port {port} cannot be listened at: {error.strerror}"
        ) from None
    return listener
