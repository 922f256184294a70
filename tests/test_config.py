"""Model and training configuration: what is refused, and how it is said."""

import pytest

from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.config.training import TrainingConfig
from ten_dist.errors import ConfigurationError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hten_scales": (2, 4)}, "start with 1"),
        ({"hten_scales": (1, 4, 2)}, "increasing powers of two"),
        ({"hten_scales": (1, 3)}, "increasing powers of two"),
        ({"hten_scales": ()}, "increasing powers of two"),
        (
            {"num_eigenstates": 64, "hten_scales": (1, 2, 4)},
            "does not divide over the 3",
        ),
        (
            {"num_eigenstates": 30, "num_heads": 4},
            "change num_eigenstates or num_heads",
        ),
        ({"dim": 0}, "--dim must be from 1 to 16,777,216, not 0"),
        ({"dim": 160.0}, "--dim must be a whole number"),
        ({"dropout": 1.0}, "--dropout must be 0 or more and below 1, not 1"),
        ({"energy_reg_weight": -1.0}, "energy_reg_weight"),
        ({"energy_kind": "heat"}, "energy_kind must be one of state, eigenvalue"),
        ({"eigenvalue_init": "zero"}, "eigenvalue_init must be one of"),
        ({"input_norm": "layer"}, "input_norm must be one of"),
        ({"selection_range": (0.1,)}, "--selection_range must be 2 values"),
        ({"max_timescale": 1.0}, "max_timescale"),
        ({"short_convolution": 1}, "short_convolution must be 0, or a width"),
        ({"gate": "input"}, "gate must be one of output, state"),
        ({"document_separator_id": -1}, "document_separator_id must be 0 or more"),
        ({"document_separator_id": 50257}, "document_separator_id .* below 50257"),
        ({"document_separator_id": True}, "document_separator_id .* not True"),
        ({"width": 3}, "unknown model option 'width'"),
    ],
)
def test_impossible_models_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        TemporalEigenstateConfig.preset("nano", **options)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigurationError, match="unknown preset 'huge'.*xlarge"):
        TemporalEigenstateConfig.preset("huge")


def test_configuration_survives_json():
    config = TemporalEigenstateConfig.preset("xlarge", selection_range=(0.5, 0.1))
    assert TemporalEigenstateConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3, "tokens": 1e6}, "--steps and --tokens cannot both"),
        ({"epochs": -1.0}, "--epochs must be more than 0"),
        ({"seq_len": 0}, "--seq_len must be 1 or more"),
        ({"precision": "int8"}, "--precision must be"),
        ({"hang_timeout": -1.0}, "--hang_timeout must be from 0 to 10,000,000"),
        ({"learning_rate": 0.0}, "--learning_rate must be more than 0"),
        ({"min_learning_rate": 1.0}, "--min_learning_rate must be between"),
        ({"data": None}, "--data is missing"),
        ({"output_dir": None}, "--output_dir is missing"),
    ],
)
def test_impossible_trainings_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        TrainingConfig(**{"data": "d", "output_dir": "o", **options})
