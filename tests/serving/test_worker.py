"""The thread that decodes: who leaves makes room at once, and a failure reaches everybody."""

import asyncio
import threading

from ten_dist.generation import Decoder, Request
from ten_dist.serving.worker import Worker
from tests.model.test_network import make_model

LONG = Request(prompt=[1], max_new_tokens=1000)


class Steps(Decoder):
    """A decoder whose steps wait to be let go."""

    def __init__(self):
        super().__init__(make_model())
        self.begun = threading.Semaphore(0)
        self.allowed = threading.Semaphore(0)
        self.failure = None

    def step(self):
        self.begun.release()
        self.allowed.acquire()
        if self.failure is not None:
            raise self.failure
        return super().step()


def running(decoder, slots, scenario):
    """Run a scenario beside a worker with this decoder."""

    async def run():
        worker = Worker(lambda: decoder, slots, queue_size=8)
        await worker.start(on_failure=lambda: None)
        await asyncio.wait_for(scenario(worker), 30)
        await worker.stop()

    asyncio.run(run())


async def begun(decoder):
    """Wait until the next step has begun."""
    await asyncio.to_thread(decoder.begun.acquire)


def test_the_step_after_a_cancellation_is_that_of_who_waited():
    decoder = Steps()

    async def scenario(worker):
        first, second = worker.submit([LONG, LONG], asyncio.Event())
        await begun(decoder)
        worker.cancel(first)
        decoder.allowed.release()
        # The step under way was the last one of the first; now the second has its slot.
        await begun(decoder)
        decoder.allowed.release()
        await begun(decoder)
        assert (len(first.tokens), len(second.tokens)) == (1, 1)
        assert (worker.running, worker.waiting) == (1, 0)
        worker.cancel(second)
        decoder.allowed.release()

    running(decoder, 1, scenario)


def test_a_failure_ends_jobs_that_came_in_the_same_step():
    decoder = Steps()
    decoder.failure = RuntimeError("not a number")

    async def scenario(worker):
        news = asyncio.Event()
        jobs = worker.submit([LONG], news)
        await begun(decoder)
        jobs += worker.submit([LONG, LONG], news)
        decoder.allowed.release()
        await news.wait()
        assert [job.failure for job in jobs] == [decoder.failure] * 3
        await worker.drain(seconds=20)

    running(decoder, 2, scenario)
