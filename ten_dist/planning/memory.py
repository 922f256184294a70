"""Peak memory of a rank, by part, at every ZeRO stage.

The largest part is what autograd keeps of a micro-batch from forward to backward: tensors
that a part of the model (`ten_dist.model`) leaves for backward, one by one. A block keeps
them for every token, those of scale s of a hierarchy for one token in s.

Exact for torch's kernels on CPUs, but for the scan in float16, which keeps float32 there;
those of GPUs keep the same tensors, but masks of dropout in a byte a number.

A step of training goes through moments at each of which other things lie in memory. Here
every one of them is written down with what DeepSpeed 0.19 and the model hold then, and
the largest is the peak:

    loss        all activations, and the pieces of logits that exist at one time
    head        all activations, and the gradient of the head's weight
    backward    all gradients; that of the embedding twice, as it is also the head
    reduction   gradients beside the buffers that they are communicated from
    update      gradients in the optimizer's own layout

What is counted is what tensors take. A process needs more: its libraries, on a GPU the
context of the driver and the buffers of NCCL, and whatever an allocator cannot use again.
Training on CPUs keeps what it has freed (`ten_dist.engine.host_memory`): processes of pico
and nano then came to 1.1 to 2.0 times what tensors take.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.model.linear_cross_entropy import fills_up, rows_at_once
from ten_dist.planning.sharding import (
    Sharding,
    Workload,
    count,
    count_moments,
    gathered_again,
    matrices_of,
    parameters_of,
    rounds_of_muon,
    touched_elements,
)

_FLOAT = 4
MATRIX_STEPS = 64
"""Steps from one state that a fast backend of matrix layers keeps to the next."""


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
        return cls(2 if name == "bf16_params" else 4, 4 if name == "fp32" else 2)

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


def kept_by_blocks(
    config: TemporalEigenstateConfig, precision: Precision, seq_len: int
) -> list[Kept]:
    """What each block keeps of rows of `seq_len` tokens."""
    kinds: dict[bool, Kept] = {}
    for layer in range(config.n_layers):
        carries = config.carries_matrices(layer)
        if carries not in kinds:
            kinds[carries] = _kept_by_block(config, precision, seq_len, layer)
    return [kinds[config.carries_matrices(layer)] for layer in range(config.n_layers)]


def _kept_by_block(
    config: TemporalEigenstateConfig, precision: Precision, seq_len: int, layer: int
) -> Kept:
    """What one block keeps, by the number of its layer."""
    d, ffn, p = config.dim, config.ffn_dim, precision
    if config.mixer == "attention":
        mixer = _kept_by_attention(config, p, seq_len)
    else:
        mixer = _kept_by_eigenstates(config, p, seq_len, layer)
    # Of both norms the input, mean and deviation; of the MLP its input, and the hidden
    # values before and after SiLU, and of a gated one what these gate, and the product.
    hidden, matrices = (4, 3) if config.ffn_gate else (2, 2)
    per_token = 2 * p.parameters * (d + 2) + p.products * (d + hidden * ffn)
    if config.dropout:
        per_token += 2 * p.products * d
    per_row = per_token * seq_len + mixer.per_row
    per_row += _kept_by_convolution(config, p, seq_len)
    copies = p.products * matrices * ffn * d if p.copies_weights else 0
    return Kept(per_row, mixer.fixed, mixer.copies + copies)


def kept_by_network(
    config: TemporalEigenstateConfig, precision: Precision, seq_len: int
) -> Kept:
    """What all blocks keep; with checkpointing, the input of each block alone."""
    layers, stream = config.n_layers, precision.parameters * config.dim * seq_len
    embedding = stream if config.dropout else 0
    if config.gradient_checkpointing == "block":
        return Kept(layers * stream + embedding)
    blocks = kept_by_blocks(config, precision, seq_len)
    per_row = sum(block.per_row for block in blocks) + embedding
    fixed, copies = (sum(getattr(b, n) for b in blocks) for n in ("fixed", "copies"))
    return Kept(per_row, fixed, copies)


def kept_by_loss(
    config: TemporalEigenstateConfig, precision: Precision, seq_len: int
) -> Kept:
    """What the final norm and the loss keep: of the head, the gradients of its factors."""
    per_token = precision.parameters * (2 * config.dim + 2)
    rows = config.vocab_size + fills_up(config.vocab_size)
    return Kept(per_token * seq_len, _FLOAT * rows * config.dim)


def _kept_by_eigenstates(
    config: TemporalEigenstateConfig, p: Precision, seq_len: int, layer: int
) -> Kept:
    """By a TEN, or by all scales of a hierarchy."""
    d, hierarchical = config.dim, config.hten_scales is not None
    per_row, fixed, copies = 0.0, 0.0, 0.0
    for scale in config.scales:
        ticks = -(-seq_len // scale)
        if config.carries_matrices(layer):
            mixer = _kept_by_matrices(config, p, ticks, layer)
        else:
            mixer = _kept_by_mixer(config, p, ticks)
        per_row, fixed = per_row + mixer.per_row, fixed + mixer.fixed
        copies += mixer.copies
        if hierarchical:
            # The input of the mixing matrix, and its weight.
            per_row += p.products * d * ticks
            copies += p.products * d * d if p.copies_weights else 0
        if hierarchical and config.document_separator_id is not None:
            # Weights of the fading, by position, and what pooling leaves out.
            per_row += (2 * p.products + 1) * seq_len
    return Kept(per_row, fixed, copies)


def _kept_by_mixer(config: TemporalEigenstateConfig, p: Precision, ticks: int) -> Kept:
    """By one scale, of rows of so many steps."""
    d, k, of_state = config.dim, config.eigenstates_per_scale, config.gate == "state"
    gate = 2 * k if of_state else d
    # The input, its projections and the states; then the gate before and after its
    # function and what it gives, or the gate and what it multiplies.
    numbers = d + (4 * k + gate) + 2 * k + (3 * 2 * k if of_state else 2 * d)
    # alpha, omega and the ranges of the selection; W_out with the coupling, the product
    # alone in float32 and the sum as the product takes it.
    fixed = _FLOAT * 4 * k + (_FLOAT + p.products) * 2 * k * d
    weights = 4 * k + gate + _weights_of_levels(config)
    copies = p.products * weights * d if p.copies_weights else 0
    if p.parameters < _FLOAT:
        # The factors of the coupling in float32.
        fixed += _FLOAT * (2 * k * d + k * k // config.num_heads)
    per_token = p.products * numbers + _kept_by_levels(config, p)
    return Kept(per_token * ticks, fixed, copies)


def _kept_by_matrices(
    config: TemporalEigenstateConfig, p: Precision, ticks: int, layer: int
) -> Kept:
    """By one scale of a matrix layer, of rows of so many steps, with a fast backend."""
    assert config.state_dim is not None, "matrix layers carry vectors"
    d, k = config.dim, config.eigenstates_per_scale_of(layer)
    values = config.num_heads * config.state_dim
    # The input and its projections; the gate before and after its function, what it
    # multiplies, and the product.
    numbers = d + (6 * k + 2 * values) + 4 * values
    per_row = p.products * numbers * ticks
    # What is read, which the norm takes in float32, and the scale of each head.
    per_row += _FLOAT * (values + config.num_heads) * ticks
    # States between pieces, of which those within are computed again.
    per_row += _FLOAT * 2 * k * config.state_dim * ((ticks - 1) // MATRIX_STEPS)
    weights = (6 * k + 3 * values) * d
    copies = p.products * weights if p.copies_weights else 0
    return Kept(per_row, _FLOAT * 4 * k, copies)


def _kept_by_levels(config: TemporalEigenstateConfig, p: Precision) -> float:
    """Bytes a token, beside those of the one scan of a TEN without levels."""
    if config.levels is None:
        return 0.0
    shorter, weights = len(config.levels), _weights_of_levels(config)
    # The states of the other levels and what is read of all; the weights before and after
    # their differences; where a level restarts.
    numbers = 2 * config.num_eigenstates * (shorter + 1) + weights
    if p.copies_weights:
        # The input is converted again.
        numbers += config.dim
    return p.products * numbers + _FLOAT * weights + shorter


def _weights_of_levels(config: TemporalEigenstateConfig) -> int:
    """Weights mu of a token in a layer."""
    return 0 if config.levels is None else (len(config.levels) + 1) * config.num_heads


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


# What DeepSpeed reduces at one time at stage 0, in elements.
_STAGE_0_BUCKET = 500_000_000


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a rank at its peak, by part."""

    parameters: float
    """The weights that the model computes with, gathered ones included."""
    master_copies: float
    """Float32 weights that the optimizer updates, where it has its own."""
    moments: float
    """AdamW's two, in float32; of matrices with Muon one."""
    gradients: float
    activations: float
    """What autograd keeps, and what the last or the first block works with."""
    loss: float
    """Logits that exist at one time, and the head's gradients."""
    buffers: float
    """From which is communicated."""
    host: float
    """Bytes in host memory: what is offloaded, and what a checkpoint is written from."""
    moment_of_peak: str = ""
    """When it is reached."""

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Bytes on the device by name."""
        names = [field.name for field in dataclasses.fields(self)]
        return {name: getattr(self, name) for name in names[:-2]}


def peak_memory(
    config: TemporalEigenstateConfig, sharding: Sharding, work: Workload
) -> Memory:
    """The peak of the rank that holds most."""
    step = _Step(config, sharding, work)
    return max(step.moments(), key=lambda memory: memory.total)


def forward_memory(config: TemporalEigenstateConfig, work: Workload) -> float:
    """Bytes of tensors that one process needs for a loss without gradients."""
    p = Precision.of(work.precision)
    blocks = kept_by_blocks(config, p, work.seq_len)
    block = max(block.bytes(work.rows) for block in blocks)
    logits = rows_at_once(work.rows * work.seq_len, config.vocab_size, p.products)
    return (
        p.parameters * count(parameters_of(config))
        + p.products * config.vocab_size * config.dim * p.copies_weights
        + block
        + (p.products + _FLOAT) * logits * config.vocab_size
    )


class _Step:
    """The moments of a step; all sizes are in bytes but where they are elements."""

    def __init__(
        self, config: TemporalEigenstateConfig, sharding: Sharding, work: Workload
    ) -> None:
        self.config, self.sharding, self.work = config, sharding, work
        self.precision = Precision.of(work.precision)
        parameters = parameters_of(config, work.optimizer)
        self.elements = count(parameters)
        self.moment_elements = count_moments(config, work.optimizer)
        self.share = self.elements / sharding.ranks
        self.touched = touched_elements(parameters, sharding.ranks)
        self.persistent = sum(
            size
            for size in itertools.chain(*parameters)
            if size < sharding.persistence_threshold
        )
        self.head = config.vocab_size * config.dim
        self.tokens = work.rows * work.seq_len
        self.blocks = kept_by_blocks(config, self.precision, work.seq_len)
        self.held = self._held()

    def moments(self) -> Iterator[Memory]:
        """Every moment that may be the peak."""
        rows, kept, working = self.work.rows, self._kept(), self._working()
        loss = kept_by_loss(self.config, self.precision, self.work.seq_len).bytes(rows)
        gathered, bucket = self._gathered(), self._bucket()
        stage = self.sharding.stage
        yield self._at(
            "loss",
            parameters=gathered,
            activations=kept,
            loss=loss + self._logits(),
        )
        yield self._at(
            "head", parameters=gathered, activations=kept + working, loss=loss
        )
        yield self._at(
            "backward",
            parameters=gathered,
            gradients=self._gradients_of_backward(),
            activations=working,
            buffers=bucket if stage == 2 else 0.0,
        )
        # Stages without an accumulator of their own hold all gradients of a step now.
        fresh = 0.0 if self.held.gradients else _FLOAT * self.elements
        yield self._at(
            "update",
            gradients=self._gradients_of_update(fresh),
            buffers=self.held.buffers + self._orthogonalization(),
        )
        if stage == 3:
            # One that is scattered, beside the one that it is gathered in.
            yield self._at("reduction", parameters=gathered, buffers=bucket)
        elif stage > 0:
            # The bucket, beside the copy of it that is sent; then the gradients of the
            # rank's own part, beside the bucket, and with several buckets beside both.
            gradients: float = _FLOAT * self.touched
            if self.elements <= self.sharding.bucket:
                gradients = max(0.0, gradients - bucket)
            if stage == 1:
                gradients += max(0.0, fresh - bucket)
            yield self._at("reduction", gradients=gradients, buffers=2 * bucket)
        elif self.sharding.ranks > 1:
            bucket = _FLOAT * min(self.elements, _STAGE_0_BUCKET)
            yield self._at("reduction", gradients=fresh, buffers=bucket)

    def _at(self, moment: str, **more: float) -> Memory:
        """What is held, and more of some parts."""
        values = {name: getattr(self.held, name) + more[name] for name in more}
        return dataclasses.replace(self.held, moment_of_peak=moment, **values)

    def _held(self) -> Memory:
        """What is there from the first step to the last."""
        stage, low = self.sharding.stage, self.precision.parameters
        buffers = gradients = master = host = 0.0
        moments: float = _FLOAT * self.moment_elements
        parameters: float = low * self.elements
        if stage >= 1:
            master, moments = _FLOAT * self.share, moments / self.sharding.ranks
        if stage == 3:
            parameters = low * (self.share + self.persistent)
            gradients, buffers = _FLOAT * self.share, self._bucket()
            if self.sharding.offload_parameters:
                host += low * self.share
                parameters = low * self.persistent
        if self.sharding.offload:
            # The gradients are there twice: as they come, and as the optimizer has them.
            host += master + moments + 2 * _FLOAT * self.share
            master = moments = gradients = 0.0
        # With parameters in bfloat16, stage 1 keeps float32 gradients of its own.
        accumulates = self.work.accumulation_steps > 1
        if stage == 1 and low < _FLOAT or accumulates and stage < 2:
            gradients = _FLOAT * self.elements
        elif accumulates and stage == 2:
            gradients = _FLOAT * self.touched
        # What a checkpoint is written from.
        host += _FLOAT * (self.share + self.moment_elements / self.sharding.ranks)
        return Memory(parameters, master, moments, gradients, 0.0, 0.0, buffers, host)

    def _orthogonalization(self) -> float:
        """What Muon works with: the matrices of a round that a rank owns, and what is sent
        for them and comes back; then a matrix as the products take it, and their factors."""
        if self.work.optimizer != "muon":
            return 0.0
        ranks = self.sharding.ranks
        rounds = rounds_of_muon(self.config, ranks)
        owned = max(
            sum(m.elements for owner, m in taken if owner == rank)
            for taken in rounds
            for rank in {owner for owner, _ in taken}
        )
        # At stage 0 what a rank has made goes to every other.
        sent = 2.0 if self.sharding.stage else 2.0 * ranks
        copies = 1 + (sent if ranks > 1 else 0)
        largest = max(
            3 * m.elements + 3 * min(m.rows, m.columns) ** 2
            for m in matrices_of(self.config)
        )
        number = _FLOAT if self.work.on_cpu else self.precision.products
        return _FLOAT * copies * owned + number * largest

    def _bucket(self) -> float:
        """A buffer of `bucket` elements."""
        size = self.sharding.bucket
        if self.work.on_cpu:
            size = min(size, self.elements)
        return size * (
            _FLOAT if self.sharding.stage == 1 else self.precision.parameters
        )

    def _gathered(self) -> float:
        """Whole parameters at the end of forward, at stage 3."""
        if self.sharding.stage < 3:
            return 0.0
        again = gathered_again(self.config, self.sharding)
        whole = self.elements - self.persistent - again
        # Those that come next are gathered before they are needed.
        ahead = min(again, self.sharding.bucket)
        return self.precision.parameters * (whole + ahead)

    def _kept(self) -> float:
        network = kept_by_network(self.config, self.precision, self.work.seq_len)
        kept = network.bytes(self.work.rows)
        if self.config.gradient_checkpointing == "block":
            # Autocast keeps its copies of weights to the end of forward.
            kept += sum(block.copies for block in self.blocks)
        return kept

    def _logits(self) -> float:
        """What the loss works with."""
        config, p = self.config, self.precision
        rows = rows_at_once(self.tokens, config.vocab_size, p.products)
        # The weight as the products take it, and its gradient of a piece, which products
        # in float32 add to the whole by themselves, but not every library on CPUs.
        copied = p.products < _FLOAT or fills_up(config.vocab_size) > 0
        apart = p.products < _FLOAT or self.work.on_cpu
        logits = p.products * rows * config.vocab_size
        logits += p.products * self.head * (copied + apart)
        if p.products < _FLOAT and not self.work.on_cpu:
            # In float32; on a CPU the operator needs no memory of its own.
            logits += _FLOAT * rows * config.vocab_size
        # The normed stream is there beside its gradient.
        return logits + _FLOAT * self.tokens * config.dim

    def _working(self) -> float:
        """What the backward of a block works with."""
        config, p = self.config, self.precision
        eigenstates = max(map(config.eigenstates_of, range(config.n_layers)))
        # Gradients of the states of all levels wait for their scans.
        states = max(4, len(config.levels or ()) + 2)
        width = max(
            (4 if config.ffn_gate else 2) * config.ffn_dim,
            2 * states * eigenstates + 4 * config.num_heads * (config.state_dim or 0),
        )
        working = self.tokens * (p.products * width + 2 * p.parameters * config.dim)
        if config.gradient_checkpointing == "block":
            return working + max(block.bytes(self.work.rows) for block in self.blocks)
        return working

    def _gradients_of_backward(self) -> float:
        """Gradients of a micro-batch when its backward ends."""
        low = self.precision.parameters
        if self.sharding.stage >= 2 or self.held.gradients:
            # The others are in a bucket already, or were added to those before.
            return 2 * low * self.head
        return low * (self.elements + self.head)

    def _gradients_of_update(self, fresh: float) -> float:
        """Gradients in the optimizer's own layout; `fresh` are those of stage 0."""
        stage = self.sharding.stage
        if stage == 0:
            return fresh
        if self.sharding.offload:
            return 0.0
        return _FLOAT * (self.share if stage == 3 else self.share + self.touched)
