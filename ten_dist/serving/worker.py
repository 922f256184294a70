"""The thread that decodes: jobs come in from the server's event loop, tokens go back to it.

Only this thread touches the decoder. What it writes of a job, the event loop only reads: the
list of its tokens, which grows, and why it has ended.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable

from ten_dist.generation import Decoder, Generated, Request, Token


class QueueFull(Exception):
    """There are as many jobs as may wait."""


class Draining(Exception):
    """No job is taken any more: the server is about to end."""


class Job:
    """A request on its way through the decoder, as the event loop sees it.

    Args:
        request: what is to be continued.
        news: set when it has gone on.
    """

    def __init__(self, request: Request, news: asyncio.Event) -> None:
        self.request = request
        self.generated: Generated | None = None
        """From when it has a slot."""
        self.failure: BaseException | None = None
        """What decoding has raised."""
        self.cancelled = False
        """Whether nobody waits for it any more."""
        self.news = news

    @property
    def tokens(self) -> list[Token]:
        """Those so far."""
        return [] if self.generated is None else self.generated.tokens

    @property
    def finish_reason(self) -> str | None:
        """Why it has ended, or None while it goes on."""
        if self.cancelled or self.failure is not None:
            return "cancelled"
        return None if self.generated is None else self.generated.finish_reason


class Worker:
    """Decodes jobs in a thread of its own.

    Args:
        make_decoder: called in that thread.
        slots: sequences that the decoder has at once.
        queue_size: jobs that wait for a slot at most.
    """

    def __init__(
        self, make_decoder: Callable[[], Decoder], slots: int, queue_size: int
    ) -> None:
        self._make_decoder = make_decoder
        self._slots = slots
        self._queue_size = queue_size
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._ready = threading.Event()
        self._unfinished: set[Job] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False
        """Whether no job is taken any more."""
        self.tokens = 0
        """Tokens that were generated."""
        self.prompt_tokens = 0
        """Tokens of all prompts that were taken."""
        self.steps = 0
        """Steps of the decoder."""
        self.failure: BaseException | None = None
        """What has ended the thread, if anything has."""

    async def start(self, on_failure: Callable[[], None]) -> None:
        """Start the thread; returns when its decoder is made.

        Args:
            on_failure: called in the event loop if the model cannot be computed.
        """
        self._loop = asyncio.get_running_loop()
        self._on_failure = on_failure
        self._thread.start()
        await asyncio.to_thread(self._ready.wait)
        if self.failure is not None:
            raise self.failure

    def submit(self, requests: list[Request], news: asyncio.Event) -> list[Job]:
        """Take some requests, all or none.

        Args:
            requests: what is to be continued.
            news: set whenever any of them has gone on.

        Raises:
            QueueFull: too many wait.
            Draining: the server is about to end.
        """
        if self.draining or self.failure is not None:
            raise Draining
        if len(self._unfinished) + len(requests) > self._slots + self._queue_size:
            raise QueueFull
        jobs = [Job(request, news) for request in requests]
        for job in jobs:
            self._unfinished.add(job)
            self.prompt_tokens += len(job.request.prompt)
            self._inbox.put(job)
        self._idle.clear()
        return jobs

    def cancel(self, job: Job) -> None:
        """Let go of a job; its slot is free at the next step. One that has ended stays."""
        if job.finish_reason is None:
            job.cancelled = True
            self._inbox.put(job)

    @property
    def running(self) -> int:
        """Jobs that have a slot."""
        return min(len(self._unfinished), self._slots)

    @property
    def waiting(self) -> int:
        """Jobs that wait for one."""
        return len(self._unfinished) - self.running

    async def drain(self, seconds: float) -> None:
        """Take no more jobs, and wait until those that there are have ended, so long at
        most; then the rest is cancelled."""
        self.draining = True
        if not await happens_within(self._idle, seconds):
            for job in list(self._unfinished):
                self.cancel(job)
            await self._idle.wait()

    async def stop(self) -> None:
        """End the thread."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        try:
            self._decoder = self._make_decoder()
        except Exception as error:  # noqa: BLE001 - told to who waits
            self.failure = error
            return
        finally:
            self._ready.set()
        waiting: deque[Job] = deque()
        by_generated: dict[Generated, Job] = {}
        while True:
            try:
                if not self._take(waiting, by_generated):
                    return
                continued = self._decoder.step()
            except Exception as error:  # noqa: BLE001 - told to who waits
                assert self._loop is not None, "the worker was started"
                self._loop.call_soon_threadsafe(self._fail, error)
                return
            self.steps += 1
            self.tokens += len(continued)
            self._tell([by_generated[generated] for generated in continued])
            for generated in continued:
                if generated.finish_reason is not None:
                    del by_generated[generated]

    def _take(self, waiting: deque[Job], by_generated: dict[Generated, Job]) -> bool:
        """Take what has come, and fill the slots; waits where there is nothing to do.

        Returns:
            False when the thread is to end.
        """
        while True:
            idle = not waiting and not by_generated
            while idle or not self._inbox.empty():
                job = self._inbox.get()
                if job is None:
                    return False
                self._sort(job, waiting, by_generated)
                idle = False
            while waiting and len(by_generated) < self._slots:
                job = waiting.popleft()
                job.generated = self._decoder.add(job.request)
                by_generated[job.generated] = job
            if by_generated:
                return True

    def _sort(
        self, job: Job, waiting: deque[Job], by_generated: dict[Generated, Job]
    ) -> None:
        """Put a new job with those that wait; take a cancelled one away."""
        if not job.cancelled:
            waiting.append(job)
            return
        if job.generated is not None:
            self._decoder.cancel(job.generated)
            by_generated.pop(job.generated, None)
        elif job in waiting:
            waiting.remove(job)
        self._tell([job])

    def _fail(self, error: BaseException) -> None:
        """End all jobs; in the event loop, so that none is submitted meanwhile."""
        self.failure = error
        for job in self._unfinished:
            job.failure = error
        self._hear(list(self._unfinished))
        self._on_failure()

    def _tell(self, jobs: list[Job]) -> None:
        """Tell who waits for these jobs, in one call of the event loop."""
        assert self._loop is not None, "the worker was started"
        self._loop.call_soon_threadsafe(self._hear, jobs)

    def _hear(self, jobs: list[Job]) -> None:
        for job in jobs:
            job.news.set()
            if job.finish_reason is not None:
                self._unfinished.discard(job)
        if not self._unfinished:
            self._idle.set()


async def happens_within(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event, so long at most; returns whether it has happened."""
    if event.is_set():
        return True
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait([waiting], timeout=seconds)
        return waiting.done()
    finally:
        waiting.cancel()
