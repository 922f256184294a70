"""What autograd keeps of a micro-batch from forward to backward, in bytes.

Every term is a tensor that a part of the model (`ten_dist.model`) leaves for backward.
Widths are d, K eigenstates a scale, F of the MLP and V of the vocabulary. A block keeps
its tensors for every token, but those of scale s of a hierarchy for one token in s.

Exact for torch's kernels on CPUs, but for the scan in float16, which keeps float32 there;
those of GPUs keep the same tensors, but masks of dropout in a byte a number.
"""

from __future__ import annotations

import dataclasses

from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.model.linear_cross_entropy import fills_up

_FLOAT = 4


@dataclasses.dataclass(frozen=True)
class Precision:
    """Bytes of a number, by what it is part of, with one `--precision`."""

    parameters: int
    """Of a parameter as the model has it, of a norm's output and of the residual
    stream."""
    products: int
    """Of what matrix products take and give."""

    @classmethod
    def of(cls, name: str) -> Precision:
        """That of `fp32`, `bf16`, `bf16_params` or `fp16`."""
        return {
            "fp32": cls(4, 4),
            "bf16": cls(4, 2),
            "bf16_params": cls(2, 2),
            "fp16": cls(4, 2),
        }[name]

    @property
    def copies_weights(self) -> bool:
        """Whether products work with a copy of their weights, in 16 bits."""
        return self.products != self.parameters


@dataclasses.dataclass(frozen=True)
class Kept:
    """Bytes that are kept from forward to backward."""

    per_row: float
    """For each row of the micro-batch."""
    fixed: float = 0.0
    """Whatever its size: weights with the coupling."""
    copies: float = 0.0
    """Whatever its size: weights in 16 bits, which are kept to the end of forward in
    any case."""

    def bytes(self, rows: int) -> float:
        """Of a micro-batch."""
        return self.per_row * rows + self.fixed + self.copies

    def times(self, layers: int) -> Kept:
        """Of so many alike blocks."""
        return Kept(self.per_row * layers, self.fixed * layers, self.copies * layers)


def kept_by_block(
    config: TemporalEigenstateConfig, precision: Precision, seq_len: int
) -> Kept:
    """What one block keeps of rows of `seq_len` tokens."""
    d, ffn, p = config.dim, config.ffn_dim, precision
    if config.mixer == "attention":
        mixer = _kept_by_attention(config, p, seq_len)
    else:
        mixer = _kept_by_eigenstates(config, p, seq_len)
    # Of both norms the input, mean and deviation; of the MLP its input, and the hidden
    # values before and after SiLU.
    per_token = 2 * p.parameters * (d + 2) + p.products * (d + 2 * ffn)
    if config.dropout:
        per_token += 2 * p.products * d
    per_row = per_token * seq_len + mixer.per_row
    per_row += _kept_by_convolution(config, p, seq_len)
    copies = p.products * 2 * ffn * d if p.copies_weights else 0
    return Kept(per_row, mixer.fixed, mixer.copies + copies)


def kept_by_network(
    config: TemporalEigenstateConfig, precision: Precision, seq_len: int
) -> Kept:
    """What all blocks keep; with checkpointing, the input of each block alone."""
    blocks = kept_by_block(config, precision, seq_len).times(config.n_layers)
    stream = precision.parameters * config.dim * seq_len
    if config.gradient_checkpointing == "block":
        blocks = Kept(config.n_layers * stream)
    embedding = stream if config.dropout else 0
    return dataclasses.replace(blocks, per_row=blocks.per_row + embedding)


def kept_by_loss(
    config: TemporalEigenstateConfig, precision: Precision, seq_len: int
) -> Kept:
    """What the final norm and the loss keep: of the head, the gradients of its factors."""
    per_token = precision.parameters * (2 * config.dim + 2)
    rows = config.vocab_size + fills_up(config.vocab_size)
    return Kept(per_token * seq_len, _FLOAT * rows * config.dim)


def _kept_by_eigenstates(
    config: TemporalEigenstateConfig, p: Precision, seq_len: int
) -> Kept:
    """By a TEN, or by all scales of a hierarchy."""
    d, k = config.dim, config.eigenstates_per_scale
    of_state = config.gate == "state"
    gate = 2 * k if of_state else d
    hierarchical = config.hten_scales is not None
    per_row, fixed, copies = 0.0, 0.0, 0.0
    for scale in config.scales:
        # The input, its projections and the states; then the gate before and after its
        # function and what it gives, or the gate and what it multiplies.
        numbers = d + (4 * k + gate) + 2 * k + (3 * 2 * k if of_state else 2 * d)
        if hierarchical:
            # The input of the mixing matrix.
            numbers += d
        ticks = -(-seq_len // scale)
        per_row += p.products * numbers * ticks
        if hierarchical and config.document_separator_id is not None:
            # Weights of the fading, by position, and what pooling leaves out.
            per_row += (2 * p.products + 1) * seq_len
        # alpha, omega and the ranges of the selection; W_out with the coupling, the
        # product alone in float32 and the sum as the product takes it.
        fixed += _FLOAT * 4 * k + (_FLOAT + p.products) * 2 * k * d
        if p.copies_weights:
            copies += p.products * (4 * k + gate) * d
            copies += p.products * d * d if hierarchical else 0
        if p.parameters < _FLOAT:
            # The factors of the coupling in float32.
            fixed += _FLOAT * (2 * k * d + k * k // config.num_heads)
    return Kept(per_row, fixed, copies)


def _kept_by_attention(
    config: TemporalEigenstateConfig, p: Precision, seq_len: int
) -> Kept:
    d = config.dim
    # The input, the three projections, queries and keys rotated, the mix as it comes and
    # as the last product takes it; the normalization of each head.
    per_token = p.products * (d + 3 * d + 2 * d + 2 * d) + _FLOAT * config.num_heads
    if config.document_separator_id is not None:
        # Which positions each one sees, as numbers that are added.
        per_token += p.products * seq_len
    # Cosine and sine, for queries and for keys.
    fixed = 4 * p.products * seq_len * (d // config.num_heads // 2)
    copies = p.products * 4 * d * d if p.copies_weights else 0
    return Kept(per_token * seq_len, fixed, copies)


def _kept_by_convolution(
    config: TemporalEigenstateConfig, p: Precision, seq_len: int
) -> float:
    """Bytes a row."""
    width, number = config.short_convolution, p.parameters * config.dim
    if not width:
        return 0.0
    inputs = number * seq_len
    if config.document_separator_id is None:
        # All lags are views of the inputs with the past before them.
        return inputs + number * (seq_len + width - 1)
    # Of each lag a copy without what is of other documents, and which those are.
    return inputs + (width - 1) * (number + 1) * seq_len
