"""torch.compile of a block: one graph, with the scan as an operator in it."""

import pytest
import torch

from ten_dist import TemporalEigenstateConfig
from ten_dist.model.block import Block
from ten_dist.recurrence import available_backends

NEEDS_OPERATOR = pytest.mark.skipif(
    "cpu" not in available_backends(), reason="the scan could not be compiled here"
)
SCALES = [None, (1, 2)]
# Documents that start within a row.
RESETS = torch.zeros(2, 13, dtype=torch.bool)
RESETS[0, [3, 4, 11]] = RESETS[1, 8] = True


def make_block(scales):
    torch.manual_seed(3)
    return Block(
        TemporalEigenstateConfig(
            vocab_size=10, dim=16, num_eigenstates=32, num_heads=2, hten_scales=scales
        )
    )


def results(block, forward, resets=None):
    """Outputs, final eigenstates and all gradients, by name."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(2, 13, 16, generator=generator, requires_grad=True)
    weight = torch.randn(2, 13, 16, generator=generator)
    outputs, energy, state = forward(hidden, resets=resets)
    loss = (outputs * weight).sum() + energy
    leaves = {"hidden": hidden, **dict(block.named_parameters())}
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    mixer_state = state[0]
    if not isinstance(mixer_state, torch.Tensor):
        mixer_state = mixer_state.scales[-1].eigenstates
    found = {"outputs": outputs, "energy": energy, "state": mixer_state}
    return found | {f"grad {name}": g for name, g in zip(leaves, gradients)}


@NEEDS_OPERATOR
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("resets", [None, RESETS], ids=["plain", "masked"])
def test_a_block_is_one_graph_that_calls_the_operator(scales, resets):
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    block = make_block(scales)
    compiled = torch.compile(block, fullgraph=True, backend=keep)
    compiled(torch.randn(2, 13, 16), resets=resets)
    (graph,) = graphs
    targets = [node.target for node in graph.graph.nodes]
    scan = torch.ops.ten_dist_cpu.scan_forward
    calls = sum(target in (scan, scan.default) for target in targets)
    assert calls == len(scales or (1,))


def test_a_masked_block_of_attention_is_one_graph():
    torch.compiler.reset()
    config = TemporalEigenstateConfig(
        vocab_size=10, dim=16, num_heads=2, mixer="attention", short_convolution=3
    )
    block, hidden = Block(config), torch.randn(2, 13, 16)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    actual, _, state = compiled(hidden, resets=RESETS)
    torch.testing.assert_close(actual, block(hidden, resets=RESETS)[0])
    assert torch.equal(state.mixer.documents, RESETS.cumsum(1))


@NEEDS_OPERATOR
@pytest.mark.slow
@pytest.mark.parametrize(
    ("scales", "resets"), [(SCALES[1], None), (None, RESETS)], ids=["plain", "masked"]
)
def test_a_compiled_block_computes_what_the_block_does(scales, resets):
    torch.compiler.reset()
    block = make_block(scales)
    expected = results(block, block, resets)
    actual = results(block, torch.compile(block, fullgraph=True), resets)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5, msg=name)
