"""With a separator in its configuration a model keeps documents apart."""

import pytest
import torch

from ten_dist.generation import Sampling, generate
from ten_dist.model.document_starts import document_starts
from ten_dist.recurrence import ScanInputs, eigenstate_scan_with_energy
from tests.model.test_network import VOCAB, make_model, random_ids

SEPARATOR = 7
STEPS = 70
SCALES = (1, 2, 4, 8)
HIERARCHY = {"scales": SCALES, "num_eigenstates": 24}
MODELS = {
    "ten": {},
    "convolution": {"short_convolution": 4},
    "matrix": {"state_dim": 3, "matrix_layers": (1,)},
    "attention": {"mixer": "attention"},
    "attention_convolution": {"mixer": "attention", "short_convolution": 3},
    "hierarchy": HIERARCHY,
    "hierarchy_convolution": {**HIERARCHY, "short_convolution": 5},
    "levels": {"levels": (4, SCALES[-1])},
    "hierarchy_matrix": {**HIERARCHY, "state_dim": 3},
}
# Those of which a document is what it is alone where it starts in phase, and wherever.
WITH_PHASE = ["hierarchy", "hierarchy_convolution", "hierarchy_matrix", "levels"]
WITHOUT_PHASE = [name for name in MODELS if name not in WITH_PHASE]
PIECES = [[1] * STEPS, [STEPS - 1, 1], [3, 1, 20, 27, 19], [17, 15, 38]]
# Separators in each row: at both ends, one after the other, some tokens apart.
ENDS = ([0, 1, 2, 4, 9, 10, 23, 40, 63, 69], [6, 15, 16, 39, 55])


def masked_model(name, **options):
    return make_model(**{**MODELS[name], "document_separator_id": SEPARATOR, **options})


def documents_of_two_rows(seed=1):
    """[2, STEPS] random tokens with separators at ENDS alone."""
    ids = random_ids(steps=STEPS, seed=seed)
    ids[ids == SEPARATOR] = SEPARATOR + 1
    for row, ends in enumerate(ENDS):
        ids[row, ends] = SEPARATOR
    return ids


def bounds(row):
    """First token of each document of a row, and the one behind its last."""
    stops = [end + 1 for end in ENDS[row]]
    if stops[-1] != STEPS:
        stops.append(STEPS)
    return list(zip([0, *stops], stops))


def outside(start, stop):
    """The positions of a row that are not in [start, stop)."""
    others = torch.ones(STEPS, dtype=torch.bool)
    others[start:stop] = False
    return others


@pytest.mark.parametrize("name", WITHOUT_PHASE)
@torch.no_grad()
def test_a_document_is_what_it_is_alone(name):
    model = masked_model(name)
    ids = documents_of_two_rows()
    logits = model(ids)
    for row in range(2):
        for start, stop in bounds(row):
            alone = model(ids[row, None, start:stop])[0]
            torch.testing.assert_close(
                logits[row, start:stop], alone, rtol=0, atol=1e-5
            )


@pytest.mark.parametrize("name", WITH_PHASE)
@torch.no_grad()
def test_a_document_in_phase_is_what_it_is_alone(name):
    """Where it starts at a multiple of the largest scale, or of the longest block."""
    model = masked_model(name)
    ids = documents_of_two_rows()
    logits = model(ids)
    starts = [(r, a, b) for r in range(2) for a, b in bounds(r) if a % SCALES[-1] == 0]
    assert len(starts) >= 5 and any(stop - start > 9 for _, start, stop in starts)
    for row, start, stop in starts:
        alone = model(ids[row, None, start:stop])[0]
        torch.testing.assert_close(logits[row, start:stop], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", list(MODELS))
@torch.no_grad()
def test_a_document_changes_no_bit_of_another(name):
    model = masked_model(name)
    ids = documents_of_two_rows()
    other = documents_of_two_rows(seed=2)
    logits = model(ids)
    for row in range(2):
        for start, stop in bounds(row):
            changed = ids.clone()
            changed[row, start:stop] = other[row, start:stop]
            new_logits = model(changed)
            others = outside(start, stop)
            assert torch.equal(new_logits[row, others], logits[row, others])
            assert torch.equal(new_logits[1 - row], logits[1 - row])
            if stop - start > 2:
                assert not torch.equal(new_logits[row, stop - 1], logits[row, stop - 1])


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_no_gradient_crosses_a_boundary(name, checkpointing):
    model = masked_model(name, gradient_checkpointing=checkpointing).train()
    embedded = []
    model.embedding.register_forward_hook(
        lambda module, inputs, output: embedded.append(output)
    )
    logits = model(documents_of_two_rows())
    weight = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3))
    for start, stop in bounds(1):
        (gradient,) = torch.autograd.grad(
            (logits[1, start:stop] @ weight).sum(), embedded, retain_graph=True
        )
        assert (gradient[1, outside(start, stop)] == 0).all()
        assert (gradient[0] == 0).all()
        assert (gradient[1, start:stop] != 0).any(dim=-1).all()


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("pieces", PIECES, ids=lambda pieces: f"{len(pieces)}_pieces")
@torch.no_grad()
def test_streaming_equals_the_whole(name, pieces):
    model = masked_model(name)
    ids = documents_of_two_rows()
    state, outputs = None, []
    for piece in ids.split(pieces, dim=1):
        logits, state = model(piece, state=state, return_state=True)
        outputs.append(logits)
    torch.testing.assert_close(torch.cat(outputs, 1), model(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_random_documents_stream_in_random_pieces(name, seed):
    model = masked_model(name)
    generator = torch.Generator().manual_seed(seed)
    ids = random_ids(batch=4, steps=STEPS, seed=10 + seed)
    # From a separator in two tokens to one in sixteen.
    shares = 2.0 ** -torch.arange(1, 5).unsqueeze(1)
    ids[torch.rand(4, STEPS, generator=generator) < shares] = SEPARATOR
    cuts = torch.rand(STEPS - 1, generator=generator) < 0.05 * 3**seed
    stops = [*(cuts.nonzero().flatten() + 1).tolist(), STEPS]
    state, outputs, start = None, [], 0
    for stop in stops:
        logits, state = model(ids[:, start:stop], state=state, return_state=True)
        outputs.append(logits)
        start = stop
    torch.testing.assert_close(torch.cat(outputs, 1), model(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", list(MODELS))
@torch.no_grad()
def test_nothing_is_masked_where_no_document_ends(name):
    model, plain = masked_model(name), make_model(**MODELS[name])
    ids = documents_of_two_rows()
    ids[ids == SEPARATOR] = SEPARATOR + 1
    torch.testing.assert_close(model(ids), plain(ids), rtol=0, atol=1e-5)
    ids[:, 20] = SEPARATOR
    assert (model(ids) - plain(ids))[:, 21:].abs().amax(dim=(1, 2)).min() > 1e-3


@pytest.mark.parametrize("checkpointing", ["none", "block"])
@pytest.mark.parametrize("options", [{}, {"short_convolution": 4}])
def test_training_on_a_row_is_training_on_its_documents(checkpointing, options):
    """Loss, energy and gradients are the means of those of the documents alone."""
    model = masked_model(
        "ten", energy_reg_weight=0.5, gradient_checkpointing=checkpointing, **options
    )
    model = model.double().train()
    ids, targets = documents_of_two_rows()[1:], random_ids(steps=STEPS, seed=3)[1:]
    parameters = list(model.parameters())
    losses = model.compute_loss(ids, targets)
    alone = {}
    for start, stop in bounds(1):
        part = model.compute_loss(ids[:, start:stop], targets[:, start:stop])
        for name in ("loss", "ce_loss", "energy_loss"):
            share = (stop - start) / STEPS
            alone[name] = alone.get(name, 0.0) + share * part[name]
    for name, value in alone.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-10, atol=1e-10)
    actual = torch.autograd.grad(losses["loss"], parameters)
    expected = torch.autograd.grad(alone["loss"], parameters)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def plain_masked_hierarchy(mixer, u, numbers):
    """The formulas of `ten_dist.model.hierarchy`, position by position, for one row."""
    steps, outputs, energy = u.shape[1], 0.0, 0.0
    for s, part in zip(SCALES, mixer.scales):
        ten, zero = part.ten, torch.zeros_like(u[:, 0])
        ticks = range(0, steps, s)
        coarse = [
            sum(
                (
                    u[:, i]
                    for i in range(max(0, t - s + 1), t + 1)
                    if numbers[i] == numbers[t]
                ),
                zero,
            )
            / s
            for t in ticks
        ]
        coarse = torch.stack(coarse, dim=1)
        k = ten.alpha.numel()
        w_in, w_sel, w_gate = ten.input_weight.split([2 * k, 2 * k, u.shape[2]])
        new = [t > 0 and numbers[t] != numbers[t - s] for t in ticks]
        inputs = ScanInputs(
            beta=coarse @ w_in.T,
            alpha=ten.alpha,
            omega=ten.omega,
            ranges=ten.selection,
            modulation=coarse @ w_sel.T,
            resets=torch.tensor([new]),
            input_norm=ten.input_norm,
        )
        c, *_ = eigenstate_scan_with_energy(inputs, "reference")
        energy = energy + c.square().sum(-1).mean()
        weight = ten.coupled_output_weight()
        gate = torch.sigmoid(coarse @ w_gate.T + ten.gate_bias)
        z = gate * (c @ weight.T) @ part.mixing.weight.T
        faded = []
        for t in range(steps):
            j, r = divmod(t, s)
            w = (r + 1) / s
            value = zero
            if j > 0 and numbers[(j - 1) * s] == numbers[t]:
                value = value + (1 - w) * z[:, j - 1]
            if numbers[j * s] == numbers[t]:
                value = value + w * z[:, j]
            faded.append(value)
        outputs = outputs + torch.stack(faded, dim=1)
    return outputs, energy


def test_a_masked_hierarchy_equals_a_plain_implementation():
    mixer = masked_model("hierarchy").double().blocks[0].mixer
    resets, _ = document_starts(documents_of_two_rows()[:1], SEPARATOR, None)
    generator = torch.Generator().manual_seed(3)
    u = torch.randn(1, STEPS, 24, generator=generator, dtype=torch.float64)
    u.requires_grad_()
    weights = torch.randn(u.shape, generator=generator, dtype=torch.float64)
    leaves = {"u": u, **dict(mixer.named_parameters())}
    results = []
    numbers = resets[0].cumsum(0).tolist()
    for outputs, energy in (
        mixer(u, resets=resets)[:2],
        plain_masked_hierarchy(mixer, u, numbers),
    ):
        loss = (outputs * weights).sum() + 3 * energy
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        named = dict(zip(leaves, gradients))
        results.append({"outputs": outputs, "energy": energy, **named})
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_rows_longer_than_a_block_of_attention_stay_finite():
    """All that the first blocks of keys hold is masked there."""
    model = masked_model("attention", n_layers=1)
    ids = random_ids(batch=1, steps=1500)
    ids[ids == SEPARATOR] = SEPARATOR + 1
    ids[0, 1300] = SEPARATOR
    logits = model(ids)
    assert logits.isfinite().all()
    torch.testing.assert_close(
        logits[:, 1301:], model(ids[:, 1301:]), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", list(MODELS))
def test_a_continuation_forgets_earlier_documents(name):
    model = masked_model(name)
    ids = documents_of_two_rows()
    # The last document of row 1 starts at 56, a multiple of the largest scale.
    assert bounds(1)[-1] == (56, STEPS)
    whole = ids[1].tolist()
    after_others, alone = generate(
        model, [whole, whole[56:]], 12, Sampling(temperature=0)
    )
    assert after_others == alone


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_products_stay_near_float32(name, dtype):
    model = masked_model(name)
    ids, targets = documents_of_two_rows(), random_ids(steps=STEPS, seed=2)
    exact = model.compute_loss(ids, targets)
    with torch.autocast("cpu", dtype):
        low = model.compute_loss(ids, targets)
    for part, value in exact.items():
        torch.testing.assert_close(low[part], value, rtol=2e-2, atol=2e-2)
