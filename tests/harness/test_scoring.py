"""Scores of sequences are those of a plain loop, whatever shares a batch or a rank."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ten_dist import TemporalEigenstateConfig, TemporalEigenstateNetwork
from ten_dist.harness.scoring import Scorer, TokenSequence
from tests.tools.launching import ROOT

VARIANTS = {
    "ten": {},
    "hten": {"hten_scales": (1, 2, 4)},
    "everything": {
        "hten_scales": (1, 4),
        "short_convolution": 4,
        "gate": "state",
        "document_separator_id": 0,
    },
    "attention": {"mixer": "attention"},
}
VOCABULARY = 23


def make_network(variant):
    torch.manual_seed(3)
    config = TemporalEigenstateConfig(
        vocab_size=VOCABULARY,
        dim=16,
        n_layers=2,
        num_eigenstates=12,
        num_heads=2,
        **VARIANTS[variant],
    )
    network = TemporalEigenstateNetwork(config).eval()
    with torch.no_grad():
        network.embedding.weight *= 20
    return network


def plain_score(network, sequence):
    """One pass over the whole sequence."""
    tokens = torch.tensor([sequence.tokens])
    with torch.no_grad():
        logprobs = network(tokens[:, :-1]).log_softmax(-1)[0].double()
    first, targets = sequence.first_scored, tokens[0, 1:]
    picked = logprobs.gather(1, targets[:, None])[first - 1 :, 0]
    likeliest = (logprobs.argmax(1) == targets)[first - 1 :]
    return picked.sum().item(), bool(likeliest.all())


def make_sequences(network):
    """Of unequal lengths, of which some end with what the model finds most likely."""
    generator = torch.Generator().manual_seed(0)
    sequences = []
    for number, length in enumerate([2, 3, 3, 5, 17, 40, 41, 90, 200, 201, 300]):
        tokens = torch.randint(VOCABULARY, (length,), generator=generator).tolist()
        first = 1 + int(torch.randint(length - 1, (), generator=generator))
        if number % 2:
            with torch.no_grad():
                last = network(torch.tensor([tokens[:-1]]))[0, -1].argmax()
            tokens[-1], first = int(last), length - 1
        sequences.append(TokenSequence(tokens, first))
    # Nothing is scored of it.
    sequences.append(TokenSequence([5], 1))
    return sequences


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_are_those_of_a_plain_loop(variant):
    network = make_network(variant)
    sequences = make_sequences(network)
    expected = [plain_score(network, sequence) for sequence in sequences[:-1]]
    assert {greedy for _, greedy in expected} == {True, False}
    # In pieces of a few tokens each.
    scorer = Scorer(
        network, VOCABULARY, torch.device("cpu"), batch_size=4, tokens_at_once=50
    )
    counts = []
    scores = scorer.score(sequences, counts.append)
    for score, (log_likelihood, greedy) in zip(scores, expected):
        assert score.log_likelihood == pytest.approx(log_likelihood, abs=1e-5, rel=1e-5)
        assert score.greedy == greedy
    assert scores[-1] == (0.0, True)
    assert sum(counts) == len(sequences) and max(counts) == 4


def test_ranks_call_the_model_alike_and_all_have_the_scores():
    network = make_network("hten")
    sequences = make_sequences(network)
    alone = Scorer(network, VOCABULARY, torch.device("cpu")).score(sequences)
    given, barrier = [None, None], threading.Barrier(2, timeout=60)
    shapes = [[], []]

    def score(rank):
        def model(ids, **options):
            shapes[rank].append((ids.shape, options["last_only"]))
            return network(ids, **options)

        def gather(value):
            given[rank] = value
            barrier.wait()
            return list(given)

        scorer = Scorer(
            *(model, VOCABULARY, torch.device("cpu")),
            batch_size=3,
            tokens_at_once=64,
            rank=rank,
            world_size=2,
            gather=gather,
        )
        return scorer.score(sequences)

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(score, range(2))
    assert first == second
    assert shapes[0] == shapes[1]
    for score_, expected in zip(first, alone, strict=True):
        assert score_.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-4)
        assert score_.greedy == expected.greedy


_PEAK = """
import torch
from ten_dist import TemporalEigenstateConfig, TemporalEigenstateNetwork
from ten_dist.harness.scoring import Scorer, TokenSequence
config = TemporalEigenstateConfig(
    vocab_size=2000, dim=16, n_layers=1, num_eigenstates=12, num_heads=2, hten_scales=(1, 4)
)
scorer = Scorer(
    TemporalEigenstateNetwork(config).eval(), config.vocab_size, torch.device("cpu")
)
tokens = torch.arange({length}).remainder(config.vocab_size).tolist()
scorer.score([TokenSequence(tokens, 1)])
# What getrusage tells begins with the peak of the process that started this one.
print(int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_a_document():
    def peak(length):
        command = [sys.executable, "-c", _PEAK.format(length=length)]
        # The C library then gives back at once what tensors free.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        output = subprocess.check_output(command, cwd=ROOT, env=environment)
        return int(output)

    # All logits of the longer one would be 400 MB, its hidden states 3 MB a tensor.
    assert peak(50_000) < peak(5_000) + 24
