"""Peak memory of a rank, by part, at every ZeRO stage.

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

from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.model.linear_cross_entropy import fills_up, rows_at_once
from ten_dist.planning.activations import (
    Precision,
    kept_by_block,
    kept_by_loss,
    kept_by_network,
)
from ten_dist.planning.parameters import count, parameters_of, touched_elements
from ten_dist.planning.sharding import Sharding, Workload, gathered_again

_FLOAT = 4
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
    """AdamW's two, in float32."""
    gradients: float
    activations: float
    """What autograd keeps, and what the last or the first block works with."""
    loss: float
    """Logits that exist at one time, and the head's gradients."""
    buffers: float
    """From which is communicated."""
    moment_of_peak: str = ""
    """When it is reached."""
    host: float = 0.0
    """Bytes in host memory: what is offloaded, and what a checkpoint is written from."""

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
    return max(_Moments(config, sharding, work).all(), key=lambda memory: memory.total)


def forward_memory(config: TemporalEigenstateConfig, work: Workload) -> float:
    """Bytes of tensors that one process needs for a loss without gradients."""
    p = Precision.of(work.precision)
    block = kept_by_block(config, p, work.seq_len).bytes(work.rows)
    logits = rows_at_once(work.rows * work.seq_len, config.vocab_size, p.products)
    return (
        p.parameters * count(parameters_of(config))
        + p.products * config.vocab_size * config.dim * p.copies_weights
        + block
        + (p.products + _FLOAT) * logits * config.vocab_size
    )


class _Moments:
    """The moments of a step."""

    def __init__(
        self, config: TemporalEigenstateConfig, sharding: Sharding, work: Workload
    ) -> None:
        self.config, self.sharding, self.work = config, sharding, work
        self.precision = Precision.of(work.precision)
        parameters = parameters_of(config)
        self.elements = count(parameters)
        self.share = self.elements / sharding.ranks
        self.touched = touched_elements(parameters, sharding.ranks)
        self.persistent = sum(
            p.elements
            for p in parameters
            if p.elements < sharding.persistence_threshold
        )
        self.head = config.vocab_size * config.dim
        self.tokens = work.rows * work.seq_len
        self.block = kept_by_block(config, self.precision, work.seq_len)
        self.kept = kept_by_network(config, self.precision, work.seq_len)
        self.kept_by_loss = kept_by_loss(config, self.precision, work.seq_len)
        self.held = self._held()

    def all(self) -> list[Memory]:
        """Every moment that may be the peak."""
        moments = [self._loss(), self._head(), self._backward(), self._update()]
        if self.sharding.ranks > 1 or self.sharding.stage > 0:
            moments.append(self._reduction())
        return moments

    def _held(self) -> Memory:
        """What is there from the first step to the last."""
        stage, low = self.sharding.stage, self.precision.parameters
        buffers, gradients, host = 0.0, 0.0, 0.0
        master = _FLOAT * self.share if stage >= 1 else 0.0
        moments = 2 * _FLOAT * (self.share if stage >= 1 else self.elements)
        parameters = low * self.elements
        if stage == 3:
            parameters = low * (self.share + self.persistent)
            gradients = _FLOAT * self.share
            buffers = self._bucket()
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
        host += 3 * _FLOAT * self.share
        return Memory(
            parameters, master, moments, gradients, 0.0, 0.0, buffers, "", host
        )

    def _bucket(self) -> float:
        """Bytes of a buffer of `bucket` elements."""
        size, number = self.sharding.bucket, self.precision.parameters
        if self.work.on_cpu:
            size = min(size, self.elements)
        return size * (_FLOAT if self.sharding.stage == 1 else number)

    def _gathered(self) -> float:
        """Bytes of whole parameters at the end of forward, at stage 3."""
        if self.sharding.stage < 3:
            return 0.0
        again = gathered_again(self.config, self.sharding)
        whole = self.elements - self.persistent - again
        # Those that come next are gathered before they are needed.
        ahead = min(again, self.sharding.bucket)
        return self.precision.parameters * (whole + ahead)

    def _at(self, moment: str, **more: float) -> Memory:
        """What is held, and more of some parts."""
        values = {name: getattr(self.held, name) + more[name] for name in more}
        return dataclasses.replace(self.held, moment_of_peak=moment, **values)

    def _activations(self) -> float:
        kept = self.kept.bytes(self.work.rows)
        if self.config.gradient_checkpointing == "block":
            # Autocast keeps its copies of weights to the end of forward.
            kept += self.config.n_layers * self.block.copies
        return kept

    def _loss(self) -> Memory:
        config, p = self.config, self.precision
        rows = rows_at_once(self.tokens, config.vocab_size, p.products)
        logits = p.products * rows * config.vocab_size
        # The weight as the products take it, and its gradient of a piece, which products
        # in float32 add to the whole by themselves, but not every library on CPUs.
        copied = p.products < _FLOAT or fills_up(config.vocab_size) > 0
        apart = p.products < _FLOAT or self.work.on_cpu
        logits += p.products * self.head * (copied + apart)
        if p.products < _FLOAT and not self.work.on_cpu:
            # In float32; on a CPU the operator needs no memory of its own.
            logits += _FLOAT * rows * config.vocab_size
        # The normed stream is there beside its gradient.
        logits += _FLOAT * self.tokens * config.dim
        return self._at(
            "loss",
            parameters=self._gathered(),
            activations=self._activations(),
            loss=self.kept_by_loss.bytes(self.work.rows) + logits,
        )

    def _head(self) -> Memory:
        return self._at(
            "head",
            parameters=self._gathered(),
            activations=self._activations() + self._working(),
            loss=self.kept_by_loss.bytes(self.work.rows),
        )

    def _working(self) -> float:
        """Bytes that the backward of a block works with."""
        config, p = self.config, self.precision
        width = max(2 * config.ffn_dim, 8 * config.num_eigenstates)
        working = self.tokens * (p.products * width + 2 * p.parameters * config.dim)
        if config.gradient_checkpointing == "block":
            working += self.block.bytes(self.work.rows)
        return working

    def _gradients_of_backward(self) -> float:
        """Bytes of the gradients of a micro-batch when its backward ends."""
        stage, low = self.sharding.stage, self.precision.parameters
        if stage >= 2 or self.held.gradients:
            # The others are in a bucket already, or were added to those before.
            return 2 * low * self.head
        return low * (self.elements + self.head)

    def _backward(self) -> Memory:
        bucket = self._bucket() if self.sharding.stage == 2 else 0.0
        return self._at(
            "backward",
            parameters=self._gathered(),
            gradients=self._gradients_of_backward(),
            activations=self._working(),
            buffers=bucket,
        )

    def _reduction(self) -> Memory:
        stage = self.sharding.stage
        if stage == 0:
            gradients = 0.0 if self.held.gradients else _FLOAT * self.elements
            bucket = _FLOAT * min(self.elements, _STAGE_0_BUCKET)
            return self._at("reduction", gradients=gradients, buffers=bucket)
        bucket = self._bucket()
        if stage == 3:
            # One that is scattered, beside the one that it is gathered in.
            return self._at("reduction", parameters=self._gathered(), buffers=bucket)
        # The bucket, beside the copy of it that is sent; then the gradients of the rank's
        # own part, beside the bucket, and with several buckets beside both.
        own = _FLOAT * self.touched
        if self.elements > self.sharding.bucket:
            gradients, buffers = own, 2 * bucket
        else:
            gradients, buffers = max(0.0, own - bucket), 2 * bucket
        if stage == 1 and not self.held.gradients:
            gradients += max(0.0, _FLOAT * self.elements - bucket)
        return self._at("reduction", gradients=gradients, buffers=buffers)

    def _update(self) -> Memory:
        stage = self.sharding.stage
        if stage == 0:
            gradients = 0.0 if self.held.gradients else _FLOAT * self.elements
        elif self.sharding.offload:
            gradients = 0.0
        elif stage == 3:
            gradients = _FLOAT * self.share
        else:
            gradients = _FLOAT * (self.share + self.touched)
        return self._at("update", gradients=gradients)
