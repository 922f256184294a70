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


def make_block(scales):
    torch.manual_seed(3)
    return Block(
        TemporalEigenstateConfig(
            vocab_size=10, dim=16, num_eigenstates=32, num_heads=2, hten_scales=scales
        )
    )


def results(block, forward):
    """Outputs, final eigenstates and all gradients, by name."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(2, 13, 16, generator=generator, requires_grad=True)
    weight = torch.randn(2, 13, 16, generator=generator)
    outputs, energy, state = forward(hidden)
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
def test_a_block_is_one_graph_that_calls_the_operator(scales):
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    block = make_block(scales)
    torch.compile(block, fullgraph=True, backend=keep)(torch.randn(2, 13, 16))
    (graph,) = graphs
    targets = [node.target for node in graph.graph.nodes]
    scan = torch.ops.ten_dist_cpu.scan_forward
    calls = sum(target in (scan, scan.default) for target in targets)
    assert calls == len(scales or (1,))


@NEEDS_OPERATOR
@pytest.mark.slow
@pytest.mark.parametrize("scales", SCALES)
def test_a_compiled_block_computes_what_the_block_does(scales):
    torch.compiler.reset()
    block = make_block(scales)
    expected = results(block, block)
    actual = results(block, torch.compile(block, fullgraph=True))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5, msg=name)
