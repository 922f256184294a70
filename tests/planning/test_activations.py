"""What autograd keeps by the formula beside what is alive after a forward pass."""

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ten_dist import TemporalEigenstateConfig, TemporalEigenstateNetwork
from ten_dist.model.precision import autocast
from ten_dist.planning.memory import (
    MATRIX_STEPS,
    Precision,
    kept_by_loss,
    kept_by_network,
)

SMALL = {
    "vocab_size": 97,
    "dim": 32,
    "n_layers": 2,
    "num_eigenstates": 24,
    "num_heads": 2,
}
ROWS, SEQ_LEN = 3, 160


class Storages(TorchDispatchMode):
    """Watches the memory of all results."""

    def __init__(self, ignored):
        super().__init__()
        self.ignored = {tensor.untyped_storage().data_ptr() for tensor in ignored}
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.ignored:
                    reference = StorageWeakRef(storage)
                    self.seen[reference.cdata] = (reference, storage.nbytes())
        return results

    def alive(self):
        """Bytes of results that something still holds."""
        gc.collect()
        return sum(size for one, size in self.seen.values() if not one.expired())


class FastMatrixScan(torch.autograd.Function):
    """Keeps what the backends that train do, and computes nothing."""

    @staticmethod
    def forward(ctx, key, query, value, alpha, omega, ranges, modulation):
        batch, steps, halves = key.shape
        numbers = value.shape[-1] // SMALL["num_heads"] * halves
        kept = alpha.new_empty(batch, (steps - 1) // MATRIX_STEPS, numbers)
        ctx.save_for_backward(key, query, value, alpha, omega, ranges, modulation, kept)
        energy = alpha.new_ones(batch, halves // 2)
        return torch.randn_like(value), alpha.new_zeros(batch, numbers), energy

    @staticmethod
    def backward(ctx, *_):
        *inputs, _ = ctx.saved_tensors
        return tuple(map(torch.zeros_like, inputs))


@pytest.fixture(autouse=True)
def fast_matrix_scan(monkeypatch):
    """Of this module: the oracle keeps every state."""
    monkeypatch.setattr(
        "ten_dist.model.matrix_mixer.matrix_scan",
        lambda inputs, _: FastMatrixScan.apply(*inputs[:7]),
    )


def alive_after_forward(config, precision):
    model = TemporalEigenstateNetwork(config)
    if precision == "bf16_params":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    tokens = torch.randint(config.vocab_size, (ROWS, SEQ_LEN + 1))
    storages = Storages([*model.parameters(), *model.buffers(), tokens])
    with storages, autocast(tokens.device, precision):
        loss = model.compute_loss(tokens[:, :-1], tokens[:, 1:])["loss"]
    alive = storages.alive()
    loss.backward()  # What is alive is what this needs.
    return alive


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_params"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gate": "state", "num_heads": 4},
        {"input_norm": "static", "learnable_selection_range": False},
        {"dropout": 0.1},
        {"short_convolution": 4},
        {"ffn_gate": False},
        {"short_convolution": 4, "document_separator_id": 3},
        {"hten_scales": (1, 2, 4)},
        {"hten_scales": (1, 8), "document_separator_id": 3},
        {"levels": (4, 16)},
        {"levels": (8,), "gate": "state", "document_separator_id": 3},
        {"levels": (4, 16), "gradient_checkpointing": "block"},
        {"state_dim": 8},
        {"state_dim": 8, "matrix_layers": (1,), "matrix_eigenstates": 12},
        {"state_dim": 8, "hten_scales": (1, 4), "document_separator_id": 3},
        {"mixer": "attention"},
        {"mixer": "attention", "document_separator_id": 3},
        {"gradient_checkpointing": "block"},
        {"hten_scales": (1, 2, 4), "gradient_checkpointing": "block"},
    ],
    ids=str,
)
def test_kept_bytes_are_those_that_are_alive(fields, precision):
    config = TemporalEigenstateConfig(**{**SMALL, **fields})
    numbers = Precision.of(precision)
    kept = kept_by_network(config, numbers, SEQ_LEN).bytes(ROWS)
    kept += kept_by_loss(config, numbers, SEQ_LEN).bytes(ROWS)
    assert kept == pytest.approx(alive_after_forward(config, precision), rel=0.005)


def test_float16_keeps_as_much_as_bfloat16():
    """Seen with attention: the scan of CPUs has no float16 of its own."""
    config = TemporalEigenstateConfig(**SMALL, mixer="attention")
    assert Precision.of("fp16") == Precision.of("bf16")
    alive = [alive_after_forward(config, precision) for precision in ("fp16", "bf16")]
    assert alive[0] == pytest.approx(alive[1], rel=0.005)
