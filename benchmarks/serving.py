"""`ten-dist serve` beside one offline batch, and its memory.

    python -m benchmarks.serving [streams] [memory] [--output FILE]

A pico model of random weights and a vocabulary of bytes, in float32. `streams`: 64 clients
ask at once, for unequal lengths after unequal prompts, at temperature 0; the offline side
continues the same prompts in one `Decoder`, and writes no text. Both run in turn. `memory`:
the server's resident memory after 100 and after 2,000 requests, whose prompts all differ.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import psutil

from benchmarks.measure import Report, paired, run_measurements
from ten_dist.cli import main as ten_dist
from ten_dist.generation import Request, Sampling
from ten_dist.run_folder import RunFolder
from ten_dist.trained_model import TrainedModel, tokenizer_of

CLIENTS = 64
TEXT = "A state decays, turns, and takes in what is said. "


def trained(folder: Path) -> Path:
    """A run of one step."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(8):
        (corpus / f"{number}.txt").write_text(TEXT * (20 + number))
    from data_prep.shard import main as shard

    data, run = str(folder / "data"), folder / "pico"
    shard(["--input", str(corpus), "--output", data, "--tokenizer", "bytes"])
    model = ["--config", "pico", "--precision", "fp32", "--seq_len", "64"]
    length = ["--steps", "1", "--global_batch_size", "2", "--num_workers", "0"]
    places = ["--data", data, "--output_dir", str(run)]
    assert ten_dist(["train", *model, *length, *places]) == 0
    return run


@contextlib.contextmanager
def server(run: Path, *options: str) -> Iterator[tuple[str, psutil.Process]]:
    """The address and the process of a server."""
    command = [sys.executable, "-m", "ten_dist", "serve", str(run), "--port", "0"]
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    url = next(line.split()[-1] for line in process.stdout if "serving" in line)
    try:
        yield url, psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def asked_of(number: int) -> dict[str, object]:
    """The request of one client."""
    prompt = TEXT[number % 40 :] * (1 + number % 5) + str(number)
    tokens = 100 + 37 * number % 200
    return {"model": "pico", "prompt": prompt, "max_tokens": tokens, "temperature": 0}


async def stream(session: aiohttp.ClientSession, url: str, number: int) -> str:
    """What a client gets; read as it comes, understood at the end."""
    body = {**asked_of(number), "stream": True}
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        content = await answer.read()
    events = [line[6:] for line in content.decode().splitlines() if line]
    assert events.pop() == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


async def at_once(url: str, numbers: range) -> list[str]:
    """The answers to some clients that ask at once."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        return await asyncio.gather(*(stream(session, url, n) for n in numbers))


def offline(run: Path) -> Callable[[], list[str]]:
    """A function that continues the prompts of all clients in one batch."""
    model, tokenizer = TrainedModel.load(RunFolder(run)), tokenizer_of(RunFolder(run))
    decoder = model.decoder()
    separator = tokenizer.separator_id

    def continued() -> list[str]:
        results = []
        for number in range(CLIENTS):
            asked = asked_of(number)
            (prompt,) = tokenizer.encode([str(asked["prompt"])])
            request = Request(
                prompt=prompt.tolist(),
                max_new_tokens=int(str(asked["max_tokens"])),
                sampling=Sampling(temperature=0),
                stop_ids=[separator],
            )
            results.append(decoder.add(request))
        while len(decoder):
            decoder.step()
        return [
            tokenizer.decode([i for i in result.ids if i != separator])
            for result in results
        ]

    return continued


def measure_streams(report: Report, folder: Path) -> None:
    """Tokens a second of 64 streams beside one batch, and whether all are alike."""
    import torch

    # As the server does for a model of this size.
    torch.set_num_threads(1)
    run = trained(folder)
    continued = offline(run)
    # A cache would give the repetitions of the server an advantage.
    with server(run, "--cache_megabytes", "0") as (url, _):
        answers = asyncio.run(at_once(url, range(CLIENTS)))
        wanted = continued()
        report.add(
            "streams that differ from the offline batch",
            sum(a != w for a, w in zip(answers, wanted, strict=True)),
        )
        seconds = paired(
            {
                "served": lambda: asyncio.run(at_once(url, range(CLIENTS))),
                "offline": continued,
            },
            repeats=15,
        )
    tokens = sum(map(len, wanted))
    report.add("served, tokens/s", tokens / seconds["served"])
    report.add("offline, tokens/s", tokens / seconds["offline"])
    report.add("served / offline", seconds["offline"] / seconds["served"])


def measure_memory(report: Report, folder: Path) -> None:
    """Memory of the server after 100 requests and after 2,000."""
    run = trained(folder)
    sizes = {}
    with server(run, "--cache_megabytes", "16") as (url, process):
        done = 0
        for until in (100, 2000):
            for first in range(done, until, 50):
                asyncio.run(at_once(url, range(first, first + 50)))
            done = until
            sizes[until] = process.memory_info().rss
            report.add(f"memory after {until} requests, MB", sizes[until] / 1e6)
    report.add("memory after 2,000 / after 100", sizes[2000] / sizes[100])


MEASUREMENTS = {"streams": measure_streams, "memory": measure_memory}


if __name__ == "__main__":
    run_measurements(__doc__, MEASUREMENTS)
