"""Measurements of preparing and reading token shards on the CPU.

    python -m benchmarks.data [prepare] [memory] [read] [many] [--output FILE]

`prepare` turns the standard library into shards, beside the tokenizers library encoding
the same documents on the same cores; `memory` compares the peak memory of preparing 3 GB
with that of preparing 30 MB, as bytes in three layouts and with a BPE, which takes 9 GB of
disk and half an hour; `read` iterates over training batches of random tokens; `many` loads
the manifest of 100,000 shards. Results are printed as a table and written as JSON.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks.measure import Report, paired, run_measurements, seconds_of
from data_prep.corpus import list_python_stdlib
from data_prep.documents import Selection, read_documents
from data_prep.left_out import LeftOut
from data_prep.shard import main as prepare
from data_prep.writer import ShardWriter
from ten_dist.data import (
    BatchShape,
    Manifest,
    ShardRecord,
    file_sha256,
    training_batches,
)
from ten_dist.data.tokenizer import byte_tokenizer

VOCAB_SIZE = 4096
GPU_TOKENS_PER_SECOND = 500_000
"""What eight GPUs take of `xlarge`, the most that a run asks of its data."""
ROW_TOKENS, ROWS = 2048, 8


def run_prepare(*arguments: object) -> None:
    """Prepare shards quietly; fails loudly."""
    words = [str(argument) for argument in arguments]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = prepare(words)
    if status:
        raise RuntimeError(f"data_prep.shard {' '.join(words)}: {said.getvalue()}")


def measure_prepare(report: Report, folder: Path) -> None:
    """Preparation with a given tokenizer beside the tokenizer's own batch encoding.

    The other side encodes documents that it has in memory already, in batches of
    several sizes of which the fastest counts, and keeps nothing.
    """
    first = folder / "first"
    run_prepare(
        *("--corpus", "python-stdlib", "--output", first, "--vocab_size", VOCAB_SIZE)
    )
    tokenizer_file = first / "tokenizer.json"
    texts = [
        "".join(document.pieces())
        for segment in list_python_stdlib((), None, LeftOut())
        for document in read_documents(
            segment, Selection("text"), LeftOut(), lambda _: None
        )
    ]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    outputs = (folder / f"again-{n}" for n in itertools.count())
    tokenizer = Tokenizer.from_file(str(tokenizer_file))

    def prepare_again() -> None:
        run_prepare(
            *("--corpus", "python-stdlib", "--output", next(outputs)),
            *("--tokenizer", tokenizer_file),
        )

    def encode(batch_size: int) -> None:
        for start in range(0, len(texts), batch_size):
            tokenizer.encode_batch_fast(
                texts[start : start + batch_size], add_special_tokens=False
            )

    encodings = {
        f"tokenizers, batches of {size}": functools.partial(encode, size)
        for size in (64, 256)
    }
    seconds = paired({"whole command": prepare_again, **encodings}, repeats=3)
    for name, taken in seconds.items():
        report.add(f"prepare: {name}, MB/s", megabytes / taken)
    fastest = min(seconds[name] for name in encodings)
    report.add(
        "prepare: speed beside batch encoding", fastest / seconds["whole command"]
    )


GROWTH = """
def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))

# The peak counts from here on.
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
{code}
print((status("VmHWM") - before) * 1024)
"""


def growth_of(imports: str, code: str, *arguments: object) -> float:
    """Bytes by which a program of its own grows, at its peak, after its imports."""
    code = imports + GROWTH.format(code=code)
    output = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return float(output.split()[-1])


PREPARE_IMPORTS = "import sys\nfrom data_prep.shard import main\n"
PREPARE_FOLDER = """
words = ["--input", sys.argv[1], "--output", sys.argv[2], "--tokenizer", sys.argv[3]]
assert main(words) == 0
"""
BLOCK_BYTES = 10**6


def random_text(blocks: int) -> Iterator[bytes]:
    """Lines of words of random letters, in blocks of :data:`BLOCK_BYTES`."""
    draw = np.random.default_rng(0)
    for _ in range(blocks):
        letters = draw.integers(97, 123, BLOCK_BYTES, dtype=np.uint8)
        letters[draw.integers(0, letters.size, letters.size // 6)] = ord(" ")
        letters[79::80] = ord("\n")
        yield letters.tobytes()


def source_text(blocks: int) -> Iterator[bytes]:
    """The standard library over and over, in blocks of :data:`BLOCK_BYTES` of ASCII."""
    segments = itertools.cycle(list_python_stdlib((), None, LeftOut()))
    text = b""
    for _ in range(blocks):
        while len(text) < BLOCK_BYTES:
            source = Path(next(segments).path).read_bytes()
            text += source.decode("ascii", "ignore").encode()
        yield text[:BLOCK_BYTES]
        text = text[BLOCK_BYTES:]


def write_text_files(folder: Path, blocks: int, texts=random_text) -> None:
    """A text file for each block."""
    for number, text in enumerate(texts(blocks)):
        (folder / f"{number:04d}.txt").write_bytes(text)


write_source_files = functools.partial(write_text_files, texts=source_text)


def write_text_file(folder: Path, blocks: int) -> None:
    """One document."""
    with open(folder / "all.txt", "wb") as file:
        file.writelines(random_text(blocks))


def write_jsonl(folder: Path, blocks: int) -> None:
    """One file of documents of 10 kB."""
    with open(folder / "all.jsonl", "w", encoding="utf-8") as file:
        for text in random_text(blocks):
            for start in range(0, len(text), 10**4):
                document = text[start : start + 10**4].decode()
                file.write(json.dumps({"text": document}) + "\n")


# How the corpus lies, and the tokenizer: bytes, or a BPE.
LAYOUTS = {
    "text files of 1 MB": (write_text_files, "bytes"),
    "one text file": (write_text_file, "bytes"),
    "one JSONL file": (write_jsonl, "bytes"),
    "source files of 1 MB, BPE": (write_source_files, "bpe"),
}


def measure_memory(report: Report, folder: Path) -> None:
    """Peak memory of preparing 30 MB and 3 GB, and 300 MB in between."""
    largest = 3000
    # The corpus, and two bytes for each of its own in the shards.
    needed = 3 * largest * BLOCK_BYTES
    if shutil.disk_usage(folder).free < 1.2 * needed:
        raise RuntimeError(f"{folder} has no room for {needed / 1e9:g} GB")
    run_prepare(
        *("--corpus", "python-stdlib", "--output", folder / "bpe"),
        *("--vocab_size", VOCAB_SIZE),
    )
    tokenizers = {"bytes": "bytes", "bpe": folder / "bpe" / "tokenizer.json"}
    for name, (write, tokenizer) in LAYOUTS.items():
        peaks = {}
        for megabytes in (30, 300, largest):
            with tempfile.TemporaryDirectory(dir=folder) as place:
                corpus = Path(place) / "corpus"
                corpus.mkdir()
                write(corpus, megabytes)
                peaks[megabytes] = growth_of(
                    PREPARE_IMPORTS,
                    PREPARE_FOLDER,
                    *(corpus, Path(place) / "shards", tokenizers[tokenizer]),
                )
        report.row(
            f"memory, {name}",
            {
                **{f"MiB for {size} MB": peak / 2**20 for size, peak in peaks.items()},
                "3 GB beside 30 MB": peaks[largest] / peaks[30],
            },
        )


def write_random_tokens(folder: Path, shards: int, tokens: int) -> Manifest:
    """A set of random tokens below 50,257."""
    folder.mkdir()
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    draw = np.random.default_rng(0)
    records = []
    for index in range(shards):
        with ShardWriter(folder / f"shard-{index:05d}.tar", "uint16") as writer:
            writer.add(draw.integers(0, 50257, tokens))
            records.append(writer.finish())
    manifest = Manifest(
        directory=folder,
        shards=tuple(records),
        documents=1,
        text_bytes=shards * tokens,
        dtype="uint16",
        vocab_size=50257,
        tokenizer_file="tokenizer.json",
        tokenizer_sha256=file_sha256(folder / "tokenizer.json"),
        separator_token="<|endoftext|>",
        separator_id=256,
    )
    manifest.write()
    return manifest


def measure_read(report: Report, folder: Path) -> None:
    """Tokens per second of training batches, as int64 tensors, for 0 to 2 workers."""
    manifest = write_random_tokens(folder / "tokens", shards=24, tokens=2**22)
    steps = manifest.rows(ROW_TOKENS) // ROWS

    def read(workers: int) -> Callable[[], None]:
        def epoch() -> None:
            batches = training_batches(
                manifest,
                BatchShape(ROW_TOKENS, ROWS),
                seed=0,
                last_step=steps,
                num_workers=workers,
            )
            for _ in batches:
                pass

        return epoch

    seconds = paired({str(n): read(n) for n in range(3)}, repeats=3)
    for workers, taken in seconds.items():
        speed = steps * ROWS * ROW_TOKENS / taken
        report.row(
            f"read, {workers} workers",
            {
                "million tokens/s": speed / 1e6,
                "times eight GPUs": speed / GPU_TOKENS_PER_SECOND,
            },
        )


LOAD_IMPORTS = "import sys\nfrom ten_dist.data import Manifest, RowOrder, TokenReader\n"
LOAD_MANIFEST = """
manifest = Manifest.load(sys.argv[1])
order, reader = RowOrder(manifest, 2048, 0), TokenReader(manifest)
order.rows(10**8, 10**8 + 512)
"""


def measure_many(report: Report, folder: Path) -> None:
    """Start-up and memory of the loader for 100,000 shards of 16 million tokens."""
    shards = tuple(
        ShardRecord(
            f"shard-{n:05d}.tar",
            16_000_000 + n % 1000,
            32_100_000,
            hashlib.sha256(str(n).encode()).hexdigest(),
        )
        for n in range(100_000)
    )
    manifest = Manifest(
        directory=folder,
        shards=shards,
        documents=1,
        text_bytes=1,
        dtype="uint16",
        vocab_size=50257,
        tokenizer_file="tokenizer.json",
        tokenizer_sha256="0" * 64,
        separator_token="<|endoftext|>",
        separator_id=0,
    )
    manifest.write()
    report.add("100,000 shards: load, s", seconds_of(lambda: Manifest.load(folder)))
    grown = growth_of(LOAD_IMPORTS, LOAD_MANIFEST, folder)
    report.add("100,000 shards: memory at the peak, MB", grown / 1e6)


MEASUREMENTS = {
    "prepare": measure_prepare,
    "memory": measure_memory,
    "read": measure_read,
    "many": measure_many,
}


if __name__ == "__main__":
    run_measurements(__doc__, MEASUREMENTS)
