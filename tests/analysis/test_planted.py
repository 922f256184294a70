"""On models into which something was planted, the analysis finds it where it was put."""

import math

import numpy as np
import pytest
import torch

from ten_dist import TemporalEigenstateConfig, TemporalEigenstateNetwork
from ten_dist.analysis import (
    ContextLoss,
    HeldOutRows,
    condition_of,
    gradient_norms,
    measure_context,
    measure_influence,
    measure_worth,
    measure_writing,
    observe_usage,
    places_of,
    row_losses,
    silenced,
    spectrum_of,
    where_it_stops,
)
from ten_dist.config.model import PAPER
from ten_dist.data import Manifest
from ten_dist.errors import ConfigurationError

SYMBOLS = 8


def network_of(seed=0, **options):
    torch.manual_seed(seed)
    fields = {"vocab_size": SYMBOLS, "dim": 32, "n_layers": 2, "num_heads": 2}
    config = TemporalEigenstateConfig.preset(
        "pico", **fields | {"num_eigenstates": 24} | options
    )
    return TemporalEigenstateNetwork(config).eval()


def random_rows(rows=6, length=64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(SYMBOLS, (rows, length + 1), generator=generator)
    return HeldOutRows(tokens[:, :-1], tokens[:, 1:])


@torch.no_grad()
def move_eigenvalues(mixer, decay, angle):
    """Put all base eigenvalues of a mixer to one place."""
    mixer.alpha_offset.copy_(math.log(decay / (1 - decay)) - mixer.alpha_base)
    mixer.omega_offset.copy_(angle - mixer.omega_base)


def test_eigenvalues_are_where_they_were_put():
    network = network_of(hten_scales=(1, 4))
    places = places_of(network)
    assert [place[:2] for place in places] == [(1, 1), (1, 4), (2, 1), (2, 4)]
    move_eigenvalues(places[3].mixer, decay=0.9, angle=2.0)
    spectrum = spectrum_of(places[3])
    np.testing.assert_allclose(spectrum.now, 0.9 * np.exp(2j), rtol=1e-5)
    np.testing.assert_allclose(spectrum.memory, 4 * 10, rtol=1e-5)
    np.testing.assert_array_equal(
        spectrum.initial_alpha, places[3].mixer.alpha_base.numpy()
    )
    # Without a selection the effective eigenvalues are the base ones, at all steps.
    rows = random_rows()
    usage = observe_usage(network, rows)[3]
    np.testing.assert_allclose(usage.memory_percentiles((5, 50, 95)), 40, rtol=0.04)
    x, y = ((math.cos(2) * 0.9 + 1) * 32, (math.sin(2) * 0.9 + 1) * 32)
    steps = rows.inputs.numel() // 4
    assert usage.plane_counts[int(y), int(x)] == usage.plane_counts.sum() == steps * 12


def test_counts_are_of_every_row_and_step():
    network, rows = network_of(), random_rows(rows=300, length=64)
    # More rows than are computed at once.
    usages = observe_usage(network, rows)
    assert all(usage.memory_counts.sum() == 300 * 64 * 24 for usage in usages)
    halves = map(HeldOutRows, rows.inputs.split(150), rows.targets.split(150))
    parts = [observe_usage(network, half)[1] for half in halves]
    summed = parts[0].memory_counts + parts[1].memory_counts
    np.testing.assert_array_equal(usages[1].memory_counts, summed)
    mean = (parts[0].energy + parts[1].energy) / 2
    np.testing.assert_allclose(usages[1].energy, mean, rtol=1e-6)


def test_selection_and_gates_at_their_limits_are_found():
    network = network_of()
    place = places_of(network)[0]
    with torch.no_grad():
        place.mixer.gate_bias[:8] = 50.0
        place.mixer.gate_bias[8:12] = -50.0
        # tanh of the modulation of the decay is 1 or -1 wherever the first input is not 0.
        place.mixer.input_weight[48:72] = 0.0
        place.mixer.input_weight[48:72, 0] = 1e6
        place.mixer.input_weight[0] = place.mixer.input_weight[24] = 0.0
    condition = condition_of(place, observe_usage(network, random_rows())[0])
    assert (condition.open_gates, condition.shut_gates) == (8 / 32, 4 / 32)
    assert condition.decay_at_limit > 0.99
    assert condition.rotation_at_limit == 0
    assert condition.dead.tolist() == [True] + [False] * 23
    assert 0 < condition.bound_ratio <= 1


def test_eigenstates_that_keep_nothing_or_everything_are_saturated():
    network = network_of()
    first, second = places_of(network)
    move_eigenvalues(first.mixer, decay=0.01, angle=0.0)
    move_eigenvalues(second.mixer, decay=1 - 1e-5, angle=0.0)
    usages = observe_usage(network, random_rows())
    forgetting, holding = map(condition_of, places_of(network), usages)
    assert forgetting.forgets.all() and not forgetting.holds.any()
    assert holding.holds.all() and not holding.forgets.any()


@pytest.mark.slow
def test_a_model_that_copies_over_forty_tokens_remembers_forty():
    network = network_of(
        n_layers=1,
        num_eigenstates=128,
        max_timescale=256.0,
        depth_increasing_memory=False,
    )
    generator = torch.Generator().manual_seed(2)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(350):
        inputs = torch.randint(SYMBOLS, (16, 128), generator=generator)
        targets = torch.full_like(inputs, -100)
        targets[:, 40:] = inputs[:, :-40]
        optimizer.zero_grad()
        network.compute_loss(inputs, targets)["loss"].backward()
        optimizer.step()
    influence = measure_influence(network, random_rows(rows=16, length=128))
    assert 1 + int(influence.by_lag[1:].argmax()) == 40
    assert 35 <= influence.lag_of_share(0.5) <= 45
    assert influence.by_lag.sum() == pytest.approx(1)


def test_the_initialisation_of_the_paper_remembers_two_tokens():
    network = network_of(n_layers=1, num_eigenstates=128, **PAPER)
    influence = measure_influence(network, random_rows(rows=16, length=128))
    assert influence.lag_of_share(0.5) <= 2
    assert influence.lag_of_share(0.9) <= 3
    assert all(spectrum_of(place).memory.max() <= 2 for place in places_of(network))


def test_a_network_without_memory_has_no_influence_of_the_past():
    network = network_of(n_layers=1)
    with silenced({places_of(network)[0].mixer: torch.ones(24, dtype=torch.bool)}):
        influence = measure_influence(network, random_rows())
    assert influence.lag_of_share(0.5) is None
    assert influence.by_lag[0] == 1


def test_a_scale_without_output_is_worth_nothing():
    network, rows = network_of(hten_scales=(1, 2, 4)), random_rows()
    with torch.no_grad():
        for block in network.blocks:
            block.mixer.scales[1].mixing.weight.zero_()
    worth = measure_worth(network, rows)
    rises = {part.part: part.rise for part in worth["scale"]}
    assert rises["scale 2"] == 0
    assert abs(rises["scale 1"]) > 1e-5 and abs(rises["scale 4"]) > 1e-5
    assert [part.part for part in worth["layer"]] == ["layer 1", "layer 2"]
    assert sum(part.eigenstates for part in worth["band"]) == 2 * 24


def test_a_level_is_worth_what_is_read_of_it():
    network, rows = network_of(levels=(4, 16), n_layers=1), random_rows()
    levels = places_of(network)[0].mixer.levels
    with torch.no_grad():
        # Both heads read nothing of the blocks of 16 beyond those of 4.
        levels.bias[2:4] = -1e4
    before = {name: value.clone() for name, value in network.state_dict().items()}
    losses = row_losses(network, rows)
    near, silent, far = measure_worth(network, rows)["level"]
    assert [near.part, silent.part, far.part] == ["level 4", "level 16", "beyond 16"]
    assert silent.rise == 0
    assert near.rise != 0 and far.rise != 0
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    # That is what it is worth to read nothing of the last one either.
    with torch.no_grad():
        levels.bias[4:] = -1e4
    assert (row_losses(network, rows) - losses).mean() == pytest.approx(
        far.rise, abs=1e-6
    )


def test_levels_show_in_gradients_and_usage():
    network, rows = network_of(levels=(4, 16)), random_rows()
    norms = gradient_norms(network, rows)
    assert norms["layer 1"]["levels"] > 0
    usages = observe_usage(network, rows)
    assert len(usages) == len(places_of(network)) == 2
    assert all(0 < usage.bound.largest_ratio <= 1 for usage in usages)
    assert measure_writing(network, list(range(8))).written.shape == (2, 8)


def test_what_one_part_does_is_what_it_is_worth():
    network, rows = network_of(n_layers=3), random_rows()
    with torch.no_grad():
        for layer in (0, 2):
            places_of(network)[layer].mixer.output_weight.zero_()
    first, second, third = measure_worth(network, rows)["layer"]
    assert first.rise == third.rise == 0
    whole = row_losses(network, rows)
    with torch.no_grad():
        places_of(network)[1].mixer.output_weight.zero_()
    rise = row_losses(network, rows) - whole
    assert second.rise == pytest.approx(rise.mean(), rel=1e-4)
    assert second.standard_error == pytest.approx(rise.std(ddof=1) / 6**0.5, rel=1e-4)


def test_what_was_silenced_is_as_before():
    network, rows = network_of(hten_scales=(1, 2)), random_rows()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    losses = row_losses(network, rows)
    mixer = places_of(network)[1].mixer
    some = torch.arange(12) % 3 == 0
    with pytest.raises(KeyboardInterrupt), silenced({mixer: some}):
        assert (row_losses(network, rows) != losses).any()
        raise KeyboardInterrupt
    measure_worth(network, rows)
    observe_usage(network, rows)
    measure_influence(network, rows)
    gradient_norms(network, rows)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    np.testing.assert_array_equal(row_losses(network, rows), losses)


@torch.no_grad()
def with_a_token_that_resets(token):
    """A network whose eigenstates hold what they have until they see `token`."""
    network = network_of(n_layers=1)
    mixer = places_of(network)[0].mixer
    # The first input of the mixer is large at the token and 0 at all others.
    embedding = network.embedding.weight
    embedding.normal_()
    embedding[:, 0] = 0.0
    embedding[token] = 0.0
    embedding[:, 1:] -= embedding[:, 1:].mean(dim=1, keepdim=True)
    embedding[token, 0] = 100.0
    move_eigenvalues(mixer, decay=0.99, angle=0.0)
    mixer.selection[0] = 16.0
    mixer.input_weight[48:72] = 0.0
    mixer.input_weight[48:72, 0] = -10.0
    return network


def test_a_token_that_resets_shows_in_a_text():
    network = with_a_token_that_resets(token=7)
    text = [1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 7, 4]
    writing = measure_writing(network, text)
    (erased,) = writing.erased
    assert math.isnan(erased[0])
    resets = {place for place in range(1, 12) if erased[place] > 0.999}
    assert resets == {6, 10}
    assert all(erased[place] < 0.05 for place in range(1, 12) if place not in resets)
    # All that is held there moves, and what moves most is named first.
    assert (writing.changes[6] > np.median(writing.changes)).all()
    assert (np.diff(writing.changes, axis=1) <= 0).all()


def test_documents_kept_apart_show_as_erased():
    network = network_of(document_separator_id=0)
    writing = measure_writing(network, [1, 2, 3, 0, 4, 5])
    assert (writing.erased[:, 4] == 1).all()
    assert (writing.erased[:, [1, 2, 3, 5]] < 1).all()


def test_coarse_steps_belong_to_the_tokens_that_they_read():
    network = network_of(n_layers=1, hten_scales=(1, 4))
    writing = measure_writing(network, list(range(8)) * 2)
    fine, coarse = writing.written
    assert len(set(fine[:8])) == 8
    for first in (1, 5, 9):
        assert len(set(coarse[first : first + 4])) == 1
    # The last three are read by a step that is yet to come.
    assert np.isnan(coarse[13:]).all() and not np.isnan(coarse[:13]).any()
    at_fine_steps_only = writing.movers[[1, 2, 3, 5], :, 0]
    assert (at_fine_steps_only == 0).all()
    assert (writing.movers[4, :, 0] == 1).any()


def test_the_loss_by_context_is_that_of_the_text_cut_off(token_data):
    manifest = Manifest.load(token_data / "val")
    network = network_of(vocab_size=manifest.vocab_size, seed=3)
    losses = measure_context(network, manifest, 400)
    assert [loss.context for loss in losses] == [2**n for n in range(4, 13)]
    for loss in losses[1:]:
        assert loss.targets == max(4, 400 // (loss.context + 16)) * 16
        assert 0 < loss.standard_error < 1
    rows = HeldOutRows.read(manifest, manifest.tokens - 1, 1, torch.device("cpu"))
    stream, targets = rows.inputs[0], rows.targets[0]
    blocks = (
        np.random.default_rng(0).permutation(
            np.arange(256, (manifest.tokens - 1) // 16)
        )
        * 16
    )

    def by_hand(context, places):
        found = []
        for place in places:
            scored = torch.full((context + 16,), -100)
            scored[context:] = targets[place : place + 16]
            inputs = stream[place - context : place + 16]
            loss = network.compute_loss(inputs[None], scored[None])["ce_loss"]
            found.append(loss.item())
        return np.mean(found)

    places = blocks[: losses[2].targets // 16]
    change = by_hand(64, places) - by_hand(32, places)
    assert losses[2].change == pytest.approx(change, abs=1e-6)
    assert losses[2].loss == pytest.approx(losses[1].loss + losses[2].change)


def test_only_what_the_tokens_can_tell_is_claimed_of_context():
    def losses(*changes, error=0.01):
        start = ContextLoss(16, 3.0, 0.0, math.nan, 64)
        rest = [
            ContextLoss(32 * 2**i, 3.0, change, error, 64)
            for i, change in enumerate(changes)
        ]
        return [start, *rest]

    assert where_it_stops(losses(-0.5, -0.1, -0.01, 0.0)) == 64
    # A fall behind a doubling that told nothing counts.
    assert where_it_stops(losses(-0.5, -0.01, -0.1, 0.0)) == 128
    assert where_it_stops(losses(-0.5, -0.1)) is None
    assert where_it_stops(losses(0.01, -0.01)) == 16
    assert where_it_stops([]) is None


def test_gradients_are_those_of_the_training_loss():
    network, rows = network_of(hten_scales=(1, 2), short_convolution=3), random_rows()
    norms = gradient_norms(network, rows)
    network.compute_loss(rows.inputs, rows.targets)["loss"].backward()
    whole = sum(p.grad.square().sum() for p in network.parameters()) ** 0.5
    found = sum(norm**2 for layer in norms.values() for norm in layer.values()) ** 0.5
    assert found == pytest.approx(whole.item(), rel=1e-4)
    mixer = places_of(network)[0].mixer
    weights = [place.mixer.input_weight.grad[24:48] for place in places_of(network)[:2]]
    wanted = sum(weight.square().sum() for weight in weights) ** 0.5
    assert mixer.num_eigenstates == 12
    assert norms["layer 1"]["selection"] == pytest.approx(wanted.item(), rel=1e-4)


def matrix_network(**options):
    return network_of(state_dim=4, **options)


def test_what_matrix_layers_hold_is_counted_over_all_numbers():
    network, rows = (
        matrix_network(matrix_layers=(1,), hten_scales=(1, 2)),
        random_rows(),
    )
    places = places_of(network)
    assert [type(place.mixer).__name__ for place in places] == [
        *["EigenstateMixer"] * 2,
        *["MatrixMixer"] * 2,
    ]
    move_eigenvalues(places[2].mixer, decay=0.9, angle=2.0)
    usages = observe_usage(network, rows)
    np.testing.assert_allclose(usages[2].memory_percentiles((5, 95)), 10, rtol=0.04)
    # Once for all numbers of an eigenstate, which decay alike.
    steps = rows.inputs.numel()
    assert usages[2].memory_counts.sum() == usages[2].plane_counts.sum() == 12 * steps
    assert usages[3].memory_counts.sum() == 12 * steps / 2
    energies = [float(usage.energy.sum()) for usage in usages]
    wanted = network.compute_loss(rows.inputs, rows.targets)["energy_loss"] * 2 * 24
    assert sum(energies) == pytest.approx(wanted.item(), rel=1e-5)
    assert all(0 < usage.bound.largest_ratio <= 1 + 1e-6 for usage in usages)


@torch.no_grad()
def test_an_eigenstate_that_no_query_reads_is_dead_and_worth_nothing():
    network, rows = matrix_network(n_layers=1), random_rows()
    (place,) = places_of(network)
    queries = place.mixer.input_weight[place.mixer.rows_of("query")]
    queries[5] = queries[24 + 5] = 0.0
    condition = condition_of(place, observe_usage(network, rows)[0])
    assert condition.dead.nonzero()[0].tolist() == [5]
    losses = row_losses(network, rows)
    for unread, same in ((5, True), (6, False)):
        silence = torch.arange(24) == unread
        with silenced({place.mixer: silence}):
            assert (row_losses(network, rows) == losses).all() == same


@torch.no_grad()
def test_a_matrix_layer_without_keys_passes_nothing_on():
    network, rows = matrix_network(n_layers=2), random_rows()
    first = places_of(network)[0].mixer
    with silenced({first: torch.ones(24, dtype=torch.bool)}):
        losses = row_losses(network, rows)
    first.output_weight.zero_()
    np.testing.assert_array_equal(losses, row_losses(network, rows))


def test_what_a_token_writes_is_written_into_all_numbers():
    network = matrix_network(n_layers=1, document_separator_id=0)
    mixer = places_of(network)[0].mixer
    before = measure_writing(network, [1, 2, 3, 0, 4, 5])
    with torch.no_grad():
        # Values half as long.
        mixer.input_weight[mixer.rows_of("value")] *= 0.5
    after = measure_writing(network, [1, 2, 3, 0, 4, 5])
    np.testing.assert_allclose(after.written, before.written / 2, rtol=1e-5)
    np.testing.assert_allclose(after.changes, before.changes / 2, rtol=1e-5)
    np.testing.assert_allclose(after.erased[:, 1:], before.erased[:, 1:], rtol=1e-5)
    assert (after.erased[:, 4] == 1).all()
    assert (after.erased[:, [1, 2, 3, 5]] < 1).all()
    # By hand: of the first token nothing was there before.
    embedded = network.embedding(torch.tensor(1))
    inputs = network.blocks[0].mixer_norm(embedded)
    rows = (mixer.input_weight[mixer.rows_of(name)] for name in ("input", "value"))
    key, value = (inputs @ weight.T for weight in rows)
    gain = torch.sqrt(1 - torch.sigmoid(mixer.alpha) ** 2).repeat(2)
    written = (gain * key).unflatten(0, (2, 2, 12)).square().sum(dim=(0, 2)) @ (
        value.unflatten(0, (2, 4)).square().sum(dim=1)
    )
    assert after.written[0, 0] == pytest.approx(written.sqrt().item(), rel=1e-4)


def test_gradients_of_a_matrix_layer_have_groups_of_their_own():
    network, rows = matrix_network(), random_rows()
    norms = gradient_norms(network, rows)
    groups = {"input", "selection", "query", "value", "gate", "output"}
    assert groups < norms["layer 1"].keys() and "coupling" not in norms["layer 1"]
    network.compute_loss(rows.inputs, rows.targets)["loss"].backward()
    whole = sum(p.grad.square().sum() for p in network.parameters()) ** 0.5
    found = sum(norm**2 for layer in norms.values() for norm in layer.values()) ** 0.5
    assert found == pytest.approx(whole.item(), rel=1e-4)


def test_attention_has_nothing_to_analyse():
    with pytest.raises(ConfigurationError, match="attention"):
        places_of(network_of(mixer="attention"))
