"""Model configuration: fields, validation and the seven presets (docs/model.md).

What a run does with a model (data, batch, schedule, files) is
:class:`ten_dist.config.training.TrainingConfig`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from ten_dist.config.options import Options, at_least, metavar, more_than
from ten_dist.errors import ConfigurationError

EIGENSTATE_FIELDS = (
    "num_eigenstates",
    "state_dim",
    "matrix_layers",
    "matrix_eigenstates",
    "hten_scales",
    "levels",
    "energy_reg_weight",
    "energy_kind",
    "eigenvalue_init",
    "max_timescale",
    "depth_increasing_memory",
    "selection_range",
    "learnable_selection_range",
    "input_norm",
    "gate",
    "scan_backend",
)
"""Fields that say something of mixer `eigenstate` alone."""
DEFAULT_HTEN_SCALES = (1, 2, 4)
# More than anyone builds; torch cannot count the elements of much larger ones.
_SIZE = at_least(1, most=2**24)
IGNORED_TARGET = -100
"""Target id of positions that count in no loss."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemporalEigenstateConfig(Options):
    """Shape and mathematics of one Temporal Eigenstate Network.

    Every instance is valid: a :class:`ConfigurationError` that names the field is
    raised where a value, or a combination of values, cannot be built.
    """

    GROUP: ClassVar[str] = "model"
    ALTERNATIVES: ClassVar[tuple[str, ...]] = ("hten_scales", "levels")

    vocab_size: Annotated[int, _SIZE] = 50257
    """Number of token ids; ids are 0 <= id < vocab_size."""
    dim: Annotated[int, _SIZE] = 320
    """Width d of the residual stream."""
    n_layers: Annotated[int, at_least(1, most=10_000)] = 12
    """Number of blocks (mixer and MLP)."""
    num_eigenstates: Annotated[int, _SIZE] = 240
    """Complex eigenstates K of a layer, those of all its scales together."""
    num_heads: Annotated[int, _SIZE] = 4
    """Heads H of the block-diagonal coupling, in every scale, or of attention."""
    mixer: Literal["eigenstate", "attention"] = "eigenstate"
    """`eigenstate`: TEN and HTEN; `attention`: a transformer to compare them with."""
    hten_scales: Annotated[tuple[int, ...] | None, metavar("1,2,4")] = None
    """Scales of the hierarchy (HTEN), or None for the one-scale TEN."""
    state_dim: Annotated[int | None, at_least(2, most=4096)] = None
    """Numbers N that each eigenstate of a matrix layer carries, such as 32, to look up what
    was given with what; None for no matrix layers."""
    matrix_layers: Annotated[tuple[int, ...] | None, metavar("1,3")] = None
    """Layers, from 0, whose eigenstates carry state_dim numbers that queries read; None for
    all."""
    matrix_eigenstates: Annotated[int | None, _SIZE] = None
    """Complex eigenstates of a matrix layer; None for num_eigenstates."""
    levels: Annotated[
        tuple[int, ...] | None, at_least(2, most=2**31), metavar("4,16")
    ] = None
    """Lengths of the blocks of the past that heads weigh apart by the input, each a
    multiple of the one before; all before them is one level more. None for no weights.
    Matrix layers have none."""
    ffn_multiplier: float = 4
    """Hidden width of the MLP as a multiple of dim."""
    ffn_gate: bool = True
    """Gate the MLP by its input (SwiGLU), with two thirds of the hidden width, in which
    it has as many weights."""
    dropout: Annotated[float, at_least(0, below=1)] = 0.0
    """Dropout probability on the output of each mixer and MLP."""
    energy_reg_weight: Annotated[float, at_least(0)] = 0.01
    """Weight of the energy term in the loss."""
    energy_kind: Literal["state", "eigenvalue"] = "state"
    """`state`: mean |c|^2 an eigenstate; `eigenvalue`: sum of sigmoid(alpha)^2."""
    z_loss_weight: Annotated[float, at_least(0)] = 0.0
    """Weight of the squared log partition function in the loss, such as 1e-4."""
    eigenvalue_init: Literal["paper", "timescale"] = "timescale"
    """`timescale`: log-uniform memories; `paper`: alpha ~ U(-3, 0)."""
    max_timescale: Annotated[float, more_than(1)] = 2048.0
    """Longest initial memory, in tokens, of the `timescale` initialisation."""
    depth_increasing_memory: bool = True
    """Let the longest initial memory of `timescale` grow from layer to layer, by the same
    factor, up to max_timescale in the last."""
    selection_range: Annotated[tuple[float, float], at_least(0), metavar("A,B")] = (
        8.0,
        0.1,
    )
    """Largest modulation (s_a, s_w) of alpha and omega by the input."""
    learnable_selection_range: bool = True
    """Learn s_a and s_w of each eigenstate, from selection_range on."""
    input_norm: Literal["none", "static", "dynamic"] = "dynamic"
    """Input gain g: `dynamic` sqrt(1-rho(t)^2), `static` sqrt(1-rho^2), `none` 1."""
    short_convolution: int = 0
    """Tokens that a causal convolution before each mixer sees; 0 for none."""
    document_separator_id: Annotated[int | None, at_least(0)] = None
    """Id of the token that ends a document, behind which a model starts anew: no document
    has any effect on another. None lets them run on."""
    gate: Literal["output", "state"] = "output"
    """What is gated by the input: `output` of the mixer, or the `state` before W_out; not of
    matrix layers, whose gate is another."""
    gradient_checkpointing: Literal["none", "block"] = "none"
    """`block` recomputes each block in backward instead of keeping activations."""
    scan_backend: Literal["auto", "triton", "cpu", "blocked", "reference"] = "auto"
    """Backend of the eigenstate scan, see `recurrence.available_backends`."""

    def check_together(self) -> None:
        if not 1 <= self.ffn_multiplier * self.dim <= _SIZE.most:
            raise ConfigurationError(
                f"--ffn_multiplier must give a width from 1 to {_SIZE.most:,}, "
                f"not {self.ffn_multiplier:g}"
            )
        if self.short_convolution not in (0, *range(2, 65)):
            raise ConfigurationError(
                "--short_convolution must be 0, or a width from 2 to 64, "
                f"not {self.short_convolution}"
            )
        separator = self.document_separator_id
        if separator is not None and separator >= self.vocab_size:
            raise ConfigurationError(
                f"document_separator_id must be a token id below {self.vocab_size}, "
                f"not {separator}"
            )
        if self.hten_scales is not None:
            _check_scales(self.hten_scales)
        if self.levels is not None:
            _check_levels(self.levels)
        if self.mixer == "attention":
            self._check_attention()
        else:
            self._check_matrix_layers()
            for layer in range(self.n_layers):
                self._check_eigenstates_divide(layer)

    def _check_attention(self) -> None:
        if self.dim % self.num_heads or self.dim // self.num_heads % 2:
            raise ConfigurationError(
                f"dim {self.dim} does not divide over num_heads {self.num_heads} of "
                "even width, which mixer attention needs"
            )
        for field in ("hten_scales", "levels"):
            if getattr(self, field) is not None:
                raise ConfigurationError(
                    f"{field} has no effect with mixer attention: leave it out"
                )

    def _check_matrix_layers(self) -> None:
        if self.levels is not None and all(
            self.carries_matrices(layer) for layer in range(self.n_layers)
        ):
            raise ConfigurationError(
                "levels has no effect where all layers have state_dim: leave it out, or "
                "give matrix_layers"
            )
        for field in ("matrix_layers", "matrix_eigenstates"):
            if getattr(self, field) is not None and self.state_dim is None:
                raise ConfigurationError(f"{field} needs state_dim, such as 32")
        layers = self.matrix_layers
        if layers is not None and (
            not layers
            or layers[0] < 0
            or layers[-1] >= self.n_layers
            or any(a >= b for a, b in itertools.pairwise(layers))
        ):
            raise ConfigurationError(
                f"matrix_layers {_join(layers)} must be increasing numbers of layers "
                f"from 0 to {self.n_layers - 1}"
            )
        if self.gate == "state" and all(
            map(self.carries_matrices, range(self.n_layers))
        ):
            raise ConfigurationError(
                "gate state has no effect where state_dim is that of all layers, which have "
                "a gate of their own: leave it out, or give matrix_layers"
            )

    def _check_eigenstates_divide(self, layer: int) -> None:
        scales, total = self.scales, self.eigenstates_of(layer)
        name = "num_eigenstates"
        if self.carries_matrices(layer) and self.matrix_eigenstates is not None:
            name = "matrix_eigenstates"
        if total % len(scales):
            raise ConfigurationError(
                f"{name} {total} does not divide over the "
                f"{len(scales)} scales of hten_scales {_join(scales)}: choose a "
                "multiple, or another number of scales"
            )
        if self.eigenstates_per_scale_of(layer) % self.num_heads:
            raise ConfigurationError(
                f"{self.eigenstates_per_scale_of(layer)} eigenstates a scale do not "
                f"divide over num_heads {self.num_heads}: change {name} or num_heads"
            )

    @property
    def scales(self) -> tuple[int, ...]:
        """Scales of every layer; (1,) for the one-scale TEN."""
        return self.hten_scales if self.hten_scales is not None else (1,)

    def carries_matrices(self, layer: int) -> bool:
        """Whether the eigenstates of layer `layer`, from 0, carry state_dim numbers."""
        if self.state_dim is None:
            return False
        return self.matrix_layers is None or layer in self.matrix_layers

    def eigenstates_of(self, layer: int) -> int:
        """Eigenstates of layer `layer`, from 0, those of all its scales together."""
        if self.carries_matrices(layer) and self.matrix_eigenstates is not None:
            return self.matrix_eigenstates
        return self.num_eigenstates

    def eigenstates_per_scale_of(self, layer: int) -> int:
        """Eigenstates of one scale of layer `layer`, from 0."""
        return self.eigenstates_of(layer) // len(self.scales)

    def describe_eigenstates(self) -> str:
        """How many a layer has, and what they carry, in words."""
        layers = [*filter(self.carries_matrices, range(self.n_layers))]
        if len(layers) == self.n_layers:
            return f"{self.eigenstates_of(0)} eigenstates of {self.state_dim} numbers"
        others = f"{self.num_eigenstates} eigenstates"
        if not layers:
            return others
        where = f"{len(layers)} matrix layers" if len(layers) > 1 else "a matrix layer"
        carrying = f"{self.eigenstates_of(layers[0])} of {self.state_dim} numbers"
        return f"{others} ({carrying} in {where})"

    @property
    def eigenstates_per_scale(self) -> int:
        """Eigenstates K/|S| of one scale of a layer without matrices."""
        return self.num_eigenstates // len(self.scales)

    def longest_memory(self, layer: int) -> float:
        """Longest initial memory, in tokens, of `timescale` in layer `layer` from 0."""
        if not self.depth_increasing_memory:
            return self.max_timescale
        return self.max_timescale ** ((layer + 1) / self.n_layers)

    @property
    def ffn_dim(self) -> int:
        """Hidden width of the MLP; of a gated one a multiple of 8, which GPUs multiply
        best."""
        width = int(self.ffn_multiplier * self.dim)
        return max(8, round(2 * width / 3 / 8) * 8) if self.ffn_gate else width

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> TemporalEigenstateConfig:
        """The preset `name` of :data:`PRESETS` with some fields replaced.

        Raises:
            ConfigurationError: there is no such preset or field, the combination is
                not valid, or a field would have no effect with the mixer.
        """
        if name not in PRESETS:
            raise ConfigurationError(
                f"unknown preset '{name}' for --config: choose one of "
                f"{', '.join(PRESETS)}"
            )
        fields = {**PRESETS[name], **overrides}
        attends = overrides.get("mixer") == "attention"
        if attends:
            for field in EIGENSTATE_FIELDS:
                if field in overrides:
                    raise ConfigurationError(
                        f"{field} has no effect with mixer attention: leave it out"
                    )
        if attends or (
            overrides.get("levels") is not None and "hten_scales" not in overrides
        ):
            fields.pop("hten_scales", None)
        return cls.from_dict(fields)


# Sizes keep K divisible by 1 to 5 scales times H, so that --hten_scales can be given
# with any preset. Parameter counts are those of vocabulary 50257 with the tied head.
PRESETS: dict[str, dict[str, Any]] = {
    "pico": {
        "dim": 160,
        "n_layers": 4,
        "num_eigenstates": 240,
        "num_heads": 4,
        "ffn_multiplier": 1.75,
    },
    "nano": {"dim": 320, "n_layers": 12, "num_eigenstates": 240, "num_heads": 4},
    "micro": {"dim": 512, "n_layers": 17, "num_eigenstates": 360, "num_heads": 6},
    "small": {"dim": 768, "n_layers": 20, "num_eigenstates": 360, "num_heads": 6},
    "medium": {"dim": 1024, "n_layers": 23, "num_eigenstates": 360, "num_heads": 6},
    "large": {
        "dim": 1280,
        "n_layers": 17,
        "num_eigenstates": 480,
        "num_heads": 8,
        "hten_scales": (1, 2, 4),
        "energy_reg_weight": 0.02,
    },
    "xlarge": {
        "dim": 1536,
        "n_layers": 24,
        "num_eigenstates": 960,
        "num_heads": 8,
        "hten_scales": (1, 2, 4, 8),
        "energy_reg_weight": 0.02,
    },
}
"""Fields of each preset that differ from the defaults."""


PAPER: dict[str, Any] = {
    "eigenvalue_init": "paper",
    "input_norm": "none",
    "selection_range": (0.1, 0.1),
    "learnable_selection_range": False,
    "short_convolution": 0,
    "gate": "output",
    "depth_increasing_memory": False,
    "state_dim": None,
    "ffn_gate": False,
}
"""Fields with which the recurrence is that of the paper, whatever the defaults are."""


def _check_scales(scales: Sequence[int]) -> None:
    valid = (
        len(scales) > 0
        and all(s > 0 and s & (s - 1) == 0 for s in scales)
        and scales[0] == 1
        and all(a < b for a, b in itertools.pairwise(scales))
    )
    if not valid:
        raise ConfigurationError(
            f"hten_scales {_join(scales)} must be increasing powers of two that start "
            "with 1, such as 1,2,4"
        )


def _check_levels(levels: Sequence[int]) -> None:
    # Otherwise a block of one level would begin before that of the next.
    nested = all(a < b and b % a == 0 for a, b in itertools.pairwise(levels))
    if not levels or not nested:
        raise ConfigurationError(
            f"levels {_join(levels)} must be increasing lengths of blocks, each a multiple "
            "of the one before, such as 4,16"
        )


def _join(scales: Sequence[int]) -> str:
    return ",".join(str(s) for s in scales)
