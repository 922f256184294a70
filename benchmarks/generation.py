"""Generation on CPUs: beside a transformer with a cache, at any position, in batches.

    python -m benchmarks.generation [position] [transformer] [batch] [threads] [sampling]
        [--output FILE]

Random weights of the presets pico and nano, with a vocabulary of 50,257 and as an HTEN also
with scales 1, 2, 4. The transformer is GPT-2's of `transformers`, of nano's width and depth,
which its own `generate` steps with its cache of keys and values; reading the prompts is not
timed. Figures are medians of sides that run in turn, in one thread each unless a name says
otherwise. `ten-dist` has threads wait as OMP_WAIT_POLICY=passive does: set it for `threads`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.measure import Report, paired, run_measurements
from ten_dist import TemporalEigenstateConfig, TemporalEigenstateNetwork
from ten_dist.generation import Decoder, Request, Sampling
from ten_dist.model.precision import autocast
from ten_dist.model.state import state_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SCALES = {"TEN": None, "HTEN": (1, 2, 4)}
POSITIONS = (200, 2000, 8000)
STEPS = 16
"""Tokens that a timing takes."""

Side = Callable[[], object]


def network(preset: str, kind: str, precision: str) -> TemporalEigenstateNetwork:
    """A preset as TEN or HTEN, ready for use."""
    torch.manual_seed(0)
    config = TemporalEigenstateConfig.preset(preset, hten_scales=SCALES[kind])
    model = TemporalEigenstateNetwork(config).eval()
    model.freeze(DTYPES[precision])
    return model


def decoding(
    model: TemporalEigenstateNetwork,
    precision: str,
    lengths: list[int],
    sampling: Sampling | None = None,
) -> Side:
    """A function that continues prompts of these lengths, which have been read."""
    decoder = Decoder(model, lambda: autocast(torch.device("cpu"), precision))
    for length in lengths:
        prompt = torch.randint(model.config.vocab_size, (length,)).tolist()
        decoder.add(
            Request(
                prompt=prompt,
                max_new_tokens=10**9,
                sampling=sampling or Sampling(temperature=0),
            )
        )
    while len(decoder.step()) < len(lengths):
        pass

    def steps() -> None:
        for _ in range(STEPS):
            decoder.step()

    return steps


def transformer(precision: str) -> torch.nn.Module:
    """GPT-2 of nano's width and depth."""
    from transformers import GPT2Config, GPT2LMHeadModel

    nano = TemporalEigenstateConfig.preset("nano")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=nano.vocab_size,
        n_positions=max(POSITIONS) + 2 * STEPS,
        n_embd=nano.dim,
        n_layer=nano.n_layers,
        n_head=nano.num_heads,
    )
    return GPT2LMHeadModel(config).eval().to(DTYPES[precision])


@torch.inference_mode()
def cached_generation(model: torch.nn.Module, position: int) -> Side:
    """A function that continues a prompt of this length, which is in the cache."""
    from transformers.generation.utils import ALL_CACHE_NAMES

    ids = torch.randint(model.config.vocab_size, (1, position + 1))
    cache = model(ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
    # What generate calls it depends on the version of transformers.
    named = "cache" if "cache" in ALL_CACHE_NAMES else "past_key_values"

    def steps() -> None:
        cache.crop(-(cache.get_seq_length() - position))
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **{named: cache},
            do_sample=False,
            min_new_tokens=STEPS,
            max_new_tokens=STEPS,
            pad_token_id=0,
        )

    return steps


def parameters() -> dict[str, int]:
    """Parameters of what is compared, tied weights once; of GPT-2 without the table of
    positions, which no step computes with."""
    sizes = {}
    with torch.device("meta"):
        for kind, scales in SCALES.items():
            config = TemporalEigenstateConfig.preset("nano", hten_scales=scales)
            sizes[kind] = TemporalEigenstateNetwork(config).num_parameters()
        gpt2 = transformer("fp32")
    table = gpt2.transformer.wpe.weight.numel()
    sizes["GPT-2"] = sum(p.numel() for p in gpt2.parameters()) - table
    return sizes


def measure_position(report: Report, folder: Path) -> None:
    """Time of a token at position 100,000 beside position 100."""
    for kind in SCALES:
        model = network("nano", kind, "fp32")
        sides = {str(n): decoding(model, "fp32", [n]) for n in (100, 100_000)}
        seconds = paired(sides, repeats=15)
        ratio = seconds["100"] / seconds["100000"]
        report.add(f"nano {kind}: tokens/s at position 100,000 / 100", ratio)
        state = Decoder(model).empty_state()
        report.add(f"nano {kind}: state of a sequence, KiB", state_bytes(state) / 1024)


def measure_transformer(report: Report, folder: Path) -> None:
    """Tokens per second beside the transformer with its cache."""
    for name, size in parameters().items():
        report.add(f"nano {name}: million parameters", size / 1e6)
    for precision in DTYPES:
        models = {kind: network("nano", kind, precision) for kind in SCALES}
        gpt2 = transformer(precision)
        for position in POSITIONS:
            sides: dict[str, Side] = {
                kind: decoding(model, precision, [position])
                for kind, model in models.items()
            }
            sides["GPT-2"] = cached_generation(gpt2, position)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                seconds = paired(sides, repeats=9)
                name = f"nano {precision}, {threads} threads, position {position:,}"
                columns = {f"{n} tokens/s": STEPS / s for n, s in seconds.items()}
                for kind in SCALES:
                    columns[f"{kind} / GPT-2"] = seconds["GPT-2"] / seconds[kind]
                report.row(name, columns)
            torch.set_num_threads(1)


def measure_batch(report: Report, folder: Path) -> None:
    """Tokens per second of 16 and 64 sequences at once beside one."""
    for preset in ("pico", "nano"):
        for kind in SCALES:
            for precision in DTYPES:
                model = network(preset, kind, precision)
                sides = {
                    rows: decoding(model, precision, [5 + 3 * n for n in range(rows)])
                    for rows in (1, 16, 64)
                }
                seconds = paired({str(n): side for n, side in sides.items()}, 9)
                speeds = {n: n * STEPS / seconds[str(n)] for n in sides}
                columns = {f"tokens/s of {n}": s for n, s in speeds.items()}
                for rows in (16, 64):
                    columns[f"{rows} / 1"] = speeds[rows] / speeds[1]
                report.row(f"{preset} {kind} {precision}", columns)


def measure_threads(report: Report, folder: Path) -> None:
    """Two threads beside one: how many rows of how many parameters are worth sharing."""
    for preset in ("pico", "nano"):
        for kind in SCALES:
            model = network(preset, kind, "fp32")
            for rows in (1, 4, 16, 64):
                side = decoding(model, "fp32", [5 + 3 * n for n in range(rows)])

                def in_threads(count: int, side: Side = side) -> None:
                    torch.set_num_threads(count)
                    side()

                sides = {
                    str(count): lambda count=count: in_threads(count)
                    for count in (1, 2)
                }
                seconds = paired(sides, repeats=9)
                torch.set_num_threads(1)
                report.add(
                    f"{preset} {kind}, {rows} rows: tokens/s of 2 threads / 1",
                    seconds["1"] / seconds["2"],
                )


def measure_sampling(report: Report, folder: Path) -> None:
    """Time of a step that draws, beside one that takes the most likely token."""
    model = network("nano", "TEN", "fp32")
    lengths = [5 + 3 * n for n in range(16)]
    settings = {
        "greedy": Sampling(temperature=0),
        "temperature 0.8": Sampling(),
        "top_k 50": Sampling(top_k=50),
        "min_p 0.05": Sampling(min_p=0.05),
    }
    sides = {
        name: decoding(model, "fp32", lengths, sampling)
        for name, sampling in settings.items()
    }
    seconds = paired(sides, repeats=9)
    for name in settings:
        report.add(
            f"nano TEN, 16 rows, {name}: time / greedy",
            seconds[name] / seconds["greedy"],
        )


MEASUREMENTS = {
    "position": measure_position,
    "transformer": measure_transformer,
    "batch": measure_batch,
    "threads": measure_threads,
    "sampling": measure_sampling,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_measurements(__doc__, MEASUREMENTS)
