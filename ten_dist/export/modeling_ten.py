"""The Temporal Eigenstate Network (TEN, and its hierarchy HTEN) for transformers.

This file stands alone: it needs torch and transformers, and an exported model brings it
along. Mathematics as in the ten_dist library that trained the model; the recurrence is

    c_k(t) = lambda_k(t) c_k(t-1) + g_k(t) beta_k(t)
    lambda_k(t) = sigmoid(alpha_k + s_a tanh p_k(t)) exp(i (omega_k + s_w tanh q_k(t)))

with complex eigenstates c, stored as two real halves. In layers with `state_dim` they carry
vectors: a key writes values into them and a query reads them. What `generate` keeps, a
:class:`TenCache`, does not grow with the text (that of `mixer` "attention" does).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

ROTARY_BASE = 10000.0
# Steps of a matrix layer that are computed by products of all with all.
MATRIX_BLOCK = 16
# What `generate` calls the cache that beam search reorders, by the version of transformers.
_CACHE_NAME = "cache" if "cache" in ALL_CACHE_NAMES else "past_key_values"


class TenConfig(PreTrainedConfig):
    """Shape and mathematics of a TEN; fields have the names and meanings that they have
    in ten_dist (docs/model.md there)."""

    model_type = "ten"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "num_heads",
    }

    vocab_size: int = 50257
    dim: int = 320
    n_layers: int = 12
    num_eigenstates: int = 240
    num_heads: int = 4
    mixer: str = "eigenstate"
    hten_scales: list[int] | None = None
    levels: list[int] | None = None
    state_dim: int | None = None
    matrix_layers: list[int] | None = None
    matrix_eigenstates: int | None = None
    ffn_multiplier: float = 4.0
    ffn_gate: bool = False
    dropout: float = 0.0
    eigenvalue_init: str = "timescale"
    max_timescale: float = 2048.0
    depth_increasing_memory: bool = True
    selection_range: list[float] | tuple[float, float] = (8.0, 0.1)
    learnable_selection_range: bool = True
    input_norm: str = "dynamic"
    short_convolution: int = 0
    document_separator_id: int | None = None
    gate: str = "output"
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @property
    def scales(self) -> tuple[int, ...]:
        """Scales of every layer; (1,) for the one-scale TEN."""
        return tuple(self.hten_scales or (1,))

    @property
    def period(self) -> int:
        """Tokens after which scales and blocks of levels are at the phase they were."""
        return max(*self.scales, *(self.levels or (1,)))

    def carries_matrices(self, layer: int) -> bool:
        """Whether the eigenstates of a layer, from 0, carry vectors."""
        layers = self.matrix_layers
        return self.state_dim is not None and (layers is None or layer in layers)

    def eigenstates_per_scale(self, layer: int) -> int:
        """Eigenstates of one scale of a layer, from 0."""
        number = self.num_eigenstates
        if self.carries_matrices(layer):
            number = self.matrix_eigenstates or number
        return number // len(self.scales)


class TenCache:
    """What a model keeps of the text so far; rows can be at different positions of theirs.

    Args:
        layers: for each layer its tensors, whose first dimension is the batch; empty where
            nothing was seen.
        phases: for each row its position, modulo the period of the model.
        started: for each row whether it has seen more than padding.
        after_separator: [B] bool, whether the last token ended a document.
        seen_tokens: columns of `input_ids` so far, padding included.
    """

    is_compileable = False
    is_croppable = False
    is_linear = (False,)

    def __init__(
        self,
        layers: list[list[Tensor]],
        phases: list[int],
        started: list[bool],
        after_separator: Tensor,
        seen_tokens: int = 0,
    ) -> None:
        self.layers = layers
        self.phases = phases
        self.started = started
        self.after_separator = after_separator
        self.seen_tokens = seen_tokens

    @classmethod
    def of_nothing(cls, batch: int, device: torch.device) -> TenCache:
        """That of rows that have seen nothing."""
        after = torch.zeros(batch, dtype=torch.bool, device=device)
        return cls([], [0] * batch, [False] * batch, after)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included."""
        return self.seen_tokens

    def select(self, rows: Tensor) -> TenCache:
        """The rows of a batch with these indices, in this order."""
        numbers = rows.tolist()
        return TenCache(
            [
                [tensor[rows.to(tensor.device)] for tensor in layer]
                for layer in self.layers
            ],
            [self.phases[row] for row in numbers],
            [self.started[row] for row in numbers],
            self.after_separator[rows],
            self.seen_tokens,
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows that beam search goes on with."""
        self.__dict__.update(self.select(beam_idx).__dict__)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        rows = torch.arange(len(self.phases)).repeat_interleave(repeats)
        self.reorder_cache(rows.to(self.after_separator.device))

    def crop(self, max_length: int) -> None:
        """Not possible: what was forgotten does not come back."""
        raise ValueError("the state of a recurrent model cannot be cropped")


@dataclasses.dataclass
class TenOutput(ModelOutput):
    """Hidden states [B, T, d] after the final norm, and the cache."""

    last_hidden_state: Tensor | None = None
    cache: TenCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclasses.dataclass
class TenCausalLMOutput(ModelOutput):
    """Logits [B, T, V], the loss where there were labels, and the cache."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: TenCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


def affine_scan(coefficient: Tensor, drive: Tensor, entering: Tensor) -> Tensor:
    """c_t = coefficient_t c_{t-1} + drive_t with c_{-1} = entering.

    T steps are cut into about sqrt(T) blocks of about sqrt(T) steps; the recurrence runs
    inside all blocks at once, then from block to block. Operators are those of torch,
    for autograd.

    Args:
        coefficient, drive: [B, T, K] complex.
        entering: [B, K] complex.

    Returns:
        [B, T, K] complex.
    """
    batch, steps, width = drive.shape
    block = math.isqrt(steps - 1) + 1
    blocks = -(-steps // block)
    padding = (0, 0, 0, blocks * block - steps)
    shape = (batch, blocks, block, width)
    drive = F.pad(drive, padding).reshape(shape)
    coefficient = F.pad(coefficient, padding).reshape(shape)
    local, decay = [drive[:, :, 0]], [coefficient[:, :, 0]]
    for step in range(1, block):
        factor = coefficient[:, :, step]
        local.append(factor * local[-1] + drive[:, :, step])
        decay.append(factor * decay[-1])
    carried = []
    for index in range(blocks):
        carried.append(entering)
        entering = decay[-1][:, index] * entering + local[-1][:, index]
    inside = torch.stack(carried, dim=1).unsqueeze(2)
    states = torch.stack(local, dim=2) + torch.stack(decay, dim=2) * inside
    return states.reshape(batch, blocks * block, width)[:, :steps]


def matrix_scan(
    eigenvalue: Tensor, key: Tensor, query: Tensor, value: Tensor, entering: Tensor
) -> tuple[Tensor, Tensor]:
    """S_t = eigenvalue_t S_{t-1} + key_t value_t^T with S_{-1} = entering, and what is read,
    o_t = Re(query_t^* S_t).

    Within a block of steps every key, decayed up to the step that reads, meets every later
    query; what a block leaves goes on to the next. Decays are multiplied, never divided by:
    nothing overflows, however fast it is forgotten.

    Args:
        eigenvalue, key, query: [B, T, H, E] complex.
        value: [B, T, H, N] real.
        entering: [B, H, 2E, N] real; real and imaginary parts alternate.

    Returns:
        o, [B, T, H, N], and the last S, [B, H, 2E, N].
    """
    steps = value.shape[1]
    blocks = -(-steps // MATRIX_BLOCK)
    missing = blocks * MATRIX_BLOCK - steps if blocks > 1 else 0

    def cut(tensor: Tensor, fill: float = 0.0) -> tuple[Tensor, ...]:
        padded = F.pad(tensor, (0, 0, 0, 0, 0, missing), value=fill)
        return padded.unflatten(1, (blocks, -1)).unbind(2)

    # A step that is not there keeps the state as it is.
    eigenvalues, keys = cut(eigenvalue, 1.0), cut(key)
    queries, values = cut(query), torch.stack(cut(value), dim=-2)
    # [B, J, H, s, E]: the keys of a block so far, decayed up to now; [B, J, H, E]: decay since
    # the block began.
    decayed, decay = keys[0].unsqueeze(-2)[..., :0, :], torch.ones_like(keys[0])
    within, since = [], []
    for factor, new, asks in zip(eigenvalues, keys, queries):
        decay = factor * decay
        decayed = torch.cat([factor.unsqueeze(-2) * decayed, new.unsqueeze(-2)], dim=-2)
        match = real_pairs(asks).unsqueeze(-2) @ real_pairs(decayed).mT
        within.append(match @ values[..., : decayed.shape[-2], :])
        since.append(real_pairs(asks * decay.conj()))
    written = real_pairs(decayed).mT @ values
    carried = []
    # A complex number times each entry of a vector.
    factors = torch.view_as_real(decay).unsqueeze(-1)
    for index in range(blocks):
        carried.append(entering)
        real, imaginary = entering.unflatten(-2, (-1, 2)).unbind(-2)
        by_real, by_imaginary = factors[:, index].unbind(-2)
        kept = [
            by_real * real - by_imaginary * imaginary,
            by_real * imaginary + by_imaginary * real,
        ]
        entering = torch.stack(kept, dim=-2).flatten(-3, -2) + written[:, index]
    before = torch.stack(since, dim=-2) @ torch.stack(carried, dim=1)
    read = (torch.cat(within, dim=-2) + before).transpose(2, 3).flatten(1, 2)
    return read[:, :steps], entering


def real_pairs(values: Tensor) -> Tensor:
    """[..., E] complex to [..., 2E], real and imaginary parts in turn; of two such, the
    product of rows is Re(conj(a) b), summed up."""
    return torch.view_as_real(values).flatten(-2)


def to_complex(halves: Tensor) -> Tensor:
    """[..., 2K] real and imaginary halves to [..., K] complex."""
    real, imaginary = halves.chunk(2, dim=-1)
    return torch.complex(real.contiguous(), imaginary.contiguous())


def to_halves(values: Tensor) -> Tensor:
    """[..., K] complex to [..., 2K] real and imaginary halves."""
    return torch.cat([values.real, values.imag], dim=-1)


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or in float64 where it already is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class ScaleMixing(nn.Linear):
    """W_s, which starts so that the sum over scales has the variance of one scale."""


class BranchEnd(nn.Linear):
    """The last product of one of the 2 n_layers branches that add to the residual stream,
    whose variance at the start does not grow with their number."""


class TenEigenstates(nn.Module):
    """The eigenvalues of one scale of one layer, and what they have in common."""

    alpha_base: Tensor
    omega_base: Tensor
    in_proj: nn.Linear
    out_proj: nn.Linear
    gate_bias: nn.Parameter

    def __init__(self, config: TenConfig, layer: int, scale: int) -> None:
        super().__init__()
        self.num_eigenstates = config.eigenstates_per_scale(layer)
        self.num_heads = config.num_heads
        self.input_norm = config.input_norm
        self.selection_range = tuple(config.selection_range)
        self.layer, self.scale = layer, scale
        self.alpha_offset = nn.Parameter(torch.zeros(self.num_eigenstates))
        self.omega_offset = nn.Parameter(torch.zeros(self.num_eigenstates))
        self.register_buffer("alpha_base", torch.zeros(self.num_eigenstates))
        self.register_buffer("omega_base", torch.zeros(self.num_eigenstates))
        self.selection = None
        if config.learnable_selection_range:
            self.selection = nn.Parameter(torch.zeros(2, self.num_eigenstates))

    def initial_state(self, inputs: Tensor) -> list[Tensor]:
        """Zeros: [B, 2K] eigenstates."""
        shape = (inputs.shape[0], 2 * self.num_eigenstates)
        return [wide(inputs.new_zeros(())).new_zeros(shape)]

    def _eigenvalues(self, modulation: Tensor) -> tuple[Tensor, Tensor | None]:
        """lambda [B, T, K], complex, and the input gain, None for 1."""
        p, q = wide(modulation).chunk(2, dim=-1)
        ranges = (
            self.selection_range if self.selection is None else wide(self.selection)
        )
        alpha = wide(self.alpha_base) + wide(self.alpha_offset)
        omega = wide(self.omega_base) + wide(self.omega_offset)
        logit = alpha + ranges[0] * torch.tanh(p)
        rotation = omega + ranges[1] * torch.tanh(q)
        eigenvalue = torch.polar(torch.sigmoid(logit), rotation)
        if self.input_norm == "none":
            return eigenvalue, None
        of = alpha if self.input_norm == "static" else logit
        # sqrt(1 - rho^2), exact also where rho is near 1.
        return eigenvalue, torch.sqrt(torch.sigmoid(-of) * (1 + torch.sigmoid(of)))


class TenMixer(TenEigenstates):
    """u -> sigmoid(gate) * W_out R c, c the scanned eigenstates of one scale of one layer.

    `in_proj` gives beta (2K), the modulation (2K) and the gate (d, or 2K where the gate
    acts on the states).

    With levels, of lengths B_1 < B_2 < ..., every level has a scan of its own, which
    restarts at multiples of its length, the last one never. In place of c stands
    sum_l mu_l (c_l - c_(l-1)), c_0 = 0, with mu = 2 sigmoid(levels(u)) of every head.
    """

    def __init__(self, config: TenConfig, layer: int, scale: int = 1) -> None:
        super().__init__(config, layer, scale)
        self.gates_state = config.gate == "state"
        width, head = 2 * self.num_eigenstates, self.num_eigenstates // self.num_heads
        gate_width = width if self.gates_state else config.dim
        self.in_proj = nn.Linear(config.dim, 2 * width + gate_width, bias=False)
        self.out_proj = nn.Linear(width, config.dim, bias=False)
        self.gate_bias = nn.Parameter(torch.zeros(gate_width))
        self.coupling = nn.Parameter(torch.zeros(self.num_heads, head, head))
        self.coupling_strength = nn.Parameter(torch.zeros(1))
        self.lengths = tuple(config.levels or ())
        self.levels = None
        if self.lengths:
            rows = (len(self.lengths) + 1) * self.num_heads
            self.levels = nn.Linear(config.dim, rows)

    def initial_state(self, inputs: Tensor) -> list[Tensor]:
        """Zeros: [B, 2K] eigenstates of each level."""
        return super().initial_state(inputs) * (len(self.lengths) + 1)

    def forward(
        self, inputs: Tensor, state: list[Tensor], phase: int, resets: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Mix a piece of a sequence.

        Args:
            inputs: [B, T, d], normed.
            state: [B, 2K] eigenstates before the piece, of each level.
            phase: position of the first step, modulo the longest block.
            resets: [B, T] bool, steps before which the eigenstates are dropped.

        Returns:
            outputs [B, T, d] and the state after the piece.
        """
        width = 2 * self.num_eigenstates
        projected = self.in_proj(inputs)
        beta, modulation, gate = projected.split(
            [width, width, projected.shape[-1] - 2 * width], dim=-1
        )
        eigenvalue, gain = self._eigenvalues(modulation)
        drive = to_complex(wide(beta))
        if gain is not None:
            drive = gain * drive
        if resets is not None:
            eigenvalue = eigenvalue.masked_fill(resets.unsqueeze(-1), 0.0)
        scanned = self._scanned(eigenvalue.expand_as(drive), drive, state, phase)
        states = to_halves(scanned[-1])
        if self.levels is not None:
            states = self._read([to_halves(c) for c in scanned], inputs)
        gate = gate + self.gate_bias.to(gate.dtype)
        if self.gates_state:
            states = F.silu(gate) * states
        outputs = self.out_proj(self._coupled(states).to(inputs.dtype))
        if not self.gates_state:
            outputs = torch.sigmoid(gate) * outputs
        return outputs, [to_halves(c[:, -1]) for c in scanned]

    def _scanned(
        self, eigenvalue: Tensor, drive: Tensor, state: list[Tensor], phase: int
    ) -> list[Tensor]:
        """[B, T, K] complex eigenstates of each level; the last one has no blocks."""
        index = phase + torch.arange(drive.shape[1], device=drive.device)
        restarts = [index % length == 0 for length in self.lengths]
        kept = [eigenvalue.masked_fill(at.unsqueeze(-1), 0.0) for at in restarts]
        return [
            affine_scan(of_level, drive, to_complex(before.to(drive.real.dtype)))
            for of_level, before in zip([*kept, eigenvalue], state)
        ]

    def _read(self, levels: list[Tensor], inputs: Tensor) -> Tensor:
        """What heads read of the states [B, T, 2K] of all levels, of the same shape."""
        assert self.levels is not None
        heads = self.num_heads
        mu = 2 * torch.sigmoid(wide(self.levels(inputs)).unflatten(-1, (-1, heads)))
        weights = mu - F.pad(mu[..., 1:, :], (0, 0, 0, 1))
        split = torch.stack(levels, dim=2).unflatten(-1, (2, heads, -1))
        return (weights[..., None, :, None] * split).sum(dim=2).flatten(-3)

    def _coupled(self, states: Tensor) -> Tensor:
        """R c by head, real and imaginary halves alike: [..., 2K] to [..., 2K]."""
        heads, head = self.num_heads, self.num_eigenstates // self.num_heads
        split = states.unflatten(-1, (2, heads, head))
        mixed = torch.einsum("btphk,hjk->btphj", split, wide(self.coupling))
        return (split + wide(self.coupling_strength) * mixed).flatten(-3)


class TenMatrixMixer(TenEigenstates):
    """u -> W_out (silu(gate) * RMSNorm(o)), o what queries read of eigenstates that carry
    `state_dim` N numbers each; the norm is of each head.

    `in_proj` gives keys (2K), the modulation (2K), queries (2K), values (H N) and the gate
    (H N).
    """

    def __init__(self, config: TenConfig, layer: int, scale: int = 1) -> None:
        super().__init__(config, layer, scale)
        assert config.state_dim is not None, "a matrix layer carries vectors"
        self.state_dim = config.state_dim
        values = self.num_heads * self.state_dim
        self.rows = [2 * self.num_eigenstates] * 3 + [values] * 2
        self.in_proj = nn.Linear(config.dim, sum(self.rows), bias=False)
        self.out_proj = nn.Linear(values, config.dim, bias=False)
        self.gate_bias = nn.Parameter(torch.zeros(values))

    def initial_state(self, inputs: Tensor) -> list[Tensor]:
        """Zeros: [B, 2K N] eigenstates."""
        return [
            state.repeat(1, self.state_dim) for state in super().initial_state(inputs)
        ]

    def forward(
        self, inputs: Tensor, state: list[Tensor], phase: int, resets: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Mix a piece of a sequence, as :class:`TenMixer`."""
        key, modulation, query, value, gate = self.in_proj(inputs).split(self.rows, -1)
        eigenvalue, gain = self._eigenvalues(modulation)
        key = to_complex(wide(key)) * (1.0 if gain is None else gain)
        if resets is not None:
            eigenvalue = eigenvalue.masked_fill(resets.unsqueeze(-1), 0.0)
        heads = (self.num_heads, -1)
        parts = (eigenvalue.expand_as(key), key, to_complex(wide(query)), wide(value))
        decays, keys, queries, values = (p.unflatten(-1, heads) for p in parts)
        entering = state[0].unflatten(-1, (self.num_heads, -1, self.state_dim))
        # The recurrence is in float32 whatever the products around it are in; the meta
        # device has no autocast.
        device = inputs.device.type.replace("meta", "cpu")
        with torch.autocast(device, enabled=False):
            read, after = matrix_scan(decays, keys, queries, values, entering)
        # Of a head with E eigenstates.
        read = read * (self.num_heads / self.num_eigenstates) ** 0.5
        normed = F.rms_norm(read, (self.state_dim,), eps=1e-5).flatten(-2)
        gate = F.silu(gate + self.gate_bias.to(gate.dtype))
        outputs = self.out_proj(gate * normed.to(inputs.dtype))
        return outputs, [after.flatten(1)]


def make_mixer(config: TenConfig, layer: int, scale: int = 1) -> TenEigenstates:
    """The mixer of one scale of a layer, from 0."""
    kind = TenMatrixMixer if config.carries_matrices(layer) else TenMixer
    return kind(config, layer, scale)


class TenScale(nn.Module):
    """One scale of the hierarchy: a mixer at the coarse rate, and its mixing matrix.

    Coarse step j averages the tokens js-s+1 .. js; its output is faded in over the s
    positions from js on. State: eigenstates [B, 2K], or [B, 2K N], the sum of inputs since the last
    coarse step [B, d], and the outputs of the last two coarse steps [B, d].
    """

    def __init__(self, config: TenConfig, layer: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.ten = make_mixer(config, layer, scale)
        self.mixing = ScaleMixing(config.dim, config.dim, bias=False)

    def initial_state(self, inputs: Tensor) -> list[Tensor]:
        """Zeros."""
        zeros = wide(inputs.new_zeros(inputs.shape[0], inputs.shape[2]))
        return [*self.ten.initial_state(inputs), zeros, zeros, zeros]

    def forward(
        self, inputs: Tensor, state: list[Tensor], phase: int, numbers: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Mix a piece that starts at `phase`; `numbers` [B, T] are those of documents."""
        scale, steps = self.scale, inputs.shape[1]
        eigenstates, pending, previous, current = state
        first = -phase % scale
        ticks = max(0, -(-(steps - first) // scale))
        resets = coarse_numbers = None
        if numbers is not None:
            # Of the two outputs that are carried, then of the steps in this piece.
            coarse_numbers = F.pad(numbers[:, first::scale], (2, 0))
            resets = coarse_numbers[:, 2:] != coarse_numbers[:, 1:-1]
            inputs, pending = self._of_one_document(inputs, first, pending, numbers)
        pooled, pending = self._pool(inputs, first, ticks, pending)
        coarse = [previous.unsqueeze(1), current.unsqueeze(1)]
        if pooled is not None:
            pooled = pooled.to(inputs.dtype)
            mixed, (eigenstates,) = self.ten(pooled, [eigenstates], 0, resets)
            coarse.append(wide(self.mixing(mixed)))
        joined = torch.cat(coarse, dim=1)
        outputs = self._faded(joined, scale - first, steps, numbers, coarse_numbers)
        previous, current = joined[:, -2], joined[:, -1]
        if numbers is not None and coarse_numbers is not None:
            foreign = coarse_numbers[:, -2:] != numbers[:, -1:]
            previous = previous.masked_fill(foreign[:, :1], 0.0)
            current = current.masked_fill(foreign[:, 1:], 0.0)
            eigenstates = eigenstates.masked_fill(foreign[:, 1:], 0.0)
        return outputs.to(inputs.dtype), [eigenstates, pending, previous, current]

    def _of_one_document(
        self, inputs: Tensor, first: int, pending: Tensor, numbers: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Inputs and pending sum, zero where they are of another document than the end
        of their window, or of the piece where that comes first."""
        if self.scale == 1:
            return inputs, pending
        scale, steps = self.scale, inputs.shape[1]
        index = torch.arange(steps, device=inputs.device)
        end = first + (index - first + scale - 1) // scale * scale
        of_end = numbers[:, end.clamp(max=steps - 1)]
        return (
            inputs.masked_fill((numbers != of_end).unsqueeze(-1), 0.0),
            pending.masked_fill(of_end[:, :1] != 0, 0.0),
        )

    def _pool(
        self, inputs: Tensor, first: int, ticks: int, pending: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """Means of the windows that end in this piece, and the sum of what is left."""
        if not ticks:
            return None, pending + wide(inputs).sum(dim=1)
        if self.scale == 1:
            return inputs, pending
        whole = first + 1 + (ticks - 1) * self.scale
        head = pending + wide(inputs[:, : first + 1]).sum(dim=1)
        body = wide(inputs[:, first + 1 : whole]).unflatten(1, (ticks - 1, self.scale))
        sums = torch.cat([head.unsqueeze(1), body.sum(dim=2)], dim=1)
        return sums / self.scale, wide(inputs[:, whole:]).sum(dim=1)

    def _faded(
        self,
        coarse: Tensor,
        before: int,
        steps: int,
        numbers: Tensor | None,
        coarse_numbers: Tensor | None,
    ) -> Tensor:
        """From each coarse value to the next in s steps: [B, J+1, d] to [B, steps, d]."""
        scale = self.scale
        rising = torch.arange(1, scale + 1, device=coarse.device, dtype=coarse.dtype)
        rising = (rising / scale).unsqueeze(-1)
        falling = 1 - rising
        if numbers is not None and coarse_numbers is not None:
            after = (coarse_numbers.shape[1] - 1) * scale - before - steps
            around = F.pad(numbers, (before, after)).unflatten(1, (-1, scale))
            of_past, of_next = coarse_numbers[:, :-1], coarse_numbers[:, 1:]
            falling = falling * (around == of_past.unsqueeze(2)).unsqueeze(3)
            rising = rising * (around == of_next.unsqueeze(2)).unsqueeze(3)
        faded = falling * coarse[:, :-1].unsqueeze(2) + rising * coarse[
            :, 1:
        ].unsqueeze(2)
        return faded.flatten(1, 2)[:, before : before + steps]


class TenHierarchy(nn.Module):
    """Sum of the scales of one layer."""

    def __init__(self, config: TenConfig, layer: int) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            TenScale(config, layer, scale) for scale in config.scales
        )

    def initial_state(self, inputs: Tensor) -> list[Tensor]:
        """Zeros of every scale, one scale after the other."""
        state: list[Tensor] = []
        for scale in self.scales:
            assert isinstance(scale, TenScale)
            state += scale.initial_state(inputs)
        return state

    def forward(
        self, inputs: Tensor, state: list[Tensor], phase: int, resets: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Mix a piece of a sequence that starts at `phase`, as :class:`TenMixer`."""
        numbers = None if resets is None else resets.cumsum(dim=1)
        outputs: Any = 0
        new_state: list[Tensor] = []
        for index, scale in enumerate(self.scales):
            own = state[4 * index : 4 * index + 4]
            mixed, own = scale(inputs, own, phase, numbers)
            outputs = outputs + mixed
            new_state += own
        return outputs, new_state


class TenAttention(nn.Module):
    """Causal attention with rotary positions: the baseline that TEN is compared with.

    State: keys and values [B, H, S, d/H], and the document of each token [B, S].
    """

    def __init__(self, config: TenConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.in_proj = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out_proj = BranchEnd(config.dim, config.dim, bias=False)

    def initial_state(self, inputs: Tensor) -> list[Tensor]:
        """No tokens."""
        batch, _, dim = inputs.shape
        empty = inputs.new_zeros(batch, self.num_heads, 0, dim // self.num_heads)
        documents = torch.zeros(batch, 0, dtype=torch.long, device=inputs.device)
        return [empty, empty, documents]

    def forward(
        self, inputs: Tensor, state: list[Tensor], phase: int, resets: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Mix a piece of a sequence, as :class:`TenMixer`; `phase` is not used."""
        query, keys, values = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.in_proj(inputs).chunk(3, dim=-1)
        )
        old_keys, old_values, old_documents = state
        before = old_keys.shape[2]
        query, keys = _rotated(query, before), _rotated(keys, before)
        keys = torch.cat([old_keys, keys], dim=2)
        values = torch.cat([old_values, values], dim=2)
        documents = torch.zeros_like(inputs[..., 0], dtype=torch.long)
        if resets is not None:
            documents = resets.cumsum(dim=1)
        if before:
            documents = documents + old_documents[:, -1:]
        known = torch.cat([old_documents, documents], dim=1)
        same = documents.unsqueeze(2) == known.unsqueeze(1)
        causal = torch.ones(same.shape[1:], dtype=torch.bool, device=same.device)
        mask = (same & causal.tril(before)).unsqueeze(1)
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        outputs = self.out_proj(mixed.transpose(1, 2).flatten(-2))
        return outputs, [keys, values, known]


def _rotated(heads: Tensor, position: int) -> Tensor:
    """Rotary position embedding of [B, H, T, e] from `position` on."""
    steps, half = heads.shape[2], heads.shape[3] // 2
    exponent = torch.arange(half, device=heads.device, dtype=torch.float32) / half
    index = torch.arange(position, position + steps, device=heads.device)
    angle = index.float()[:, None] * ROTARY_BASE**-exponent
    cosine, sine = angle.cos().to(heads.dtype), angle.sin().to(heads.dtype)
    first, second = heads.chunk(2, dim=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return torch.cat(turned, dim=-1)


class TenShortConvolution(nn.Module):
    """v_t = sum_i f_i * u_{t-i}, one filter a channel; state: the last inputs."""

    def __init__(self, config: TenConfig) -> None:
        super().__init__()
        self.width = config.short_convolution
        self.filter = nn.Parameter(torch.zeros(self.width, config.dim))

    def forward(
        self, inputs: Tensor, past: Tensor, resets: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """[B, T, d] and [B, width - 1, d] to the same."""
        steps, before = inputs.shape[1], self.width - 1
        extended = torch.cat([past.to(inputs.dtype), inputs], dim=1)
        weights = self.filter.to(inputs.dtype)
        known = None if resets is None else F.pad(resets.cumsum(dim=1), (before, 0))
        outputs = weights[0] * inputs
        for lag in range(1, self.width):
            first = before - lag
            lagged = extended[:, first : first + steps]
            if known is not None:
                foreign = known[:, first : first + steps].ne(known[:, before:])
                lagged = lagged.masked_fill(foreign.unsqueeze(-1), 0.0)
            outputs = outputs + weights[lag] * lagged
        past = extended[:, steps:]
        if known is not None:
            foreign = known[:, steps:].ne(known[:, -1:])
            past = past.masked_fill(foreign.unsqueeze(-1), 0.0)
        return outputs, past


class TenFeedForward(nn.Module):
    """MLP d -> ffn_multiplier d -> d with SiLU, or SwiGLU with as many weights."""

    def __init__(self, config: TenConfig) -> None:
        super().__init__()
        width = int(config.ffn_multiplier * config.dim)
        self.gated = config.ffn_gate
        if self.gated:
            width = max(8, round(2 * width / 3 / 8) * 8)
        self.up = nn.Linear(config.dim, 2 * width if self.gated else width)
        self.down = BranchEnd(width, config.dim)

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, T, d] -> [B, T, d]."""
        hidden = self.up(inputs)
        if not self.gated:
            return self.down(F.silu(hidden))
        gate, up = hidden.chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class TenBlock(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TenConfig, layer: int) -> None:
        super().__init__()
        self.mixer_norm = nn.LayerNorm(config.dim)
        self.convolution = None
        if config.short_convolution:
            self.convolution = TenShortConvolution(config)
        if config.mixer == "attention":
            self.mixer: TenAttention | TenEigenstates | TenHierarchy = TenAttention(
                config
            )
        elif config.hten_scales is None:
            self.mixer = make_mixer(config, layer)
        else:
            self.mixer = TenHierarchy(config, layer)
        self.feed_forward_norm = nn.LayerNorm(config.dim)
        self.feed_forward = TenFeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def initial_state(self, hidden: Tensor) -> list[Tensor]:
        """State before the first token."""
        past = []
        if self.convolution is not None:
            batch, _, dim = hidden.shape
            past = [hidden.new_zeros(batch, self.convolution.width - 1, dim)]
        return [*past, *self.mixer.initial_state(hidden)]

    def forward(
        self,
        hidden: Tensor,
        state: list[Tensor] | None,
        phase: int,
        resets: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """[B, T, d] and the state before to [B, T, d] and the state after."""
        state = self.initial_state(hidden) if state is None else state
        inputs = self.mixer_norm(hidden)
        past: list[Tensor] = []
        if self.convolution is not None:
            inputs, first = self.convolution(inputs, state[0], resets)
            past, state = [first], state[1:]
        mixed, state = self.mixer(inputs, state, phase, resets)
        hidden = hidden + self.dropout(mixed)
        mixed = self.feed_forward(self.feed_forward_norm(hidden))
        return hidden + self.dropout(mixed), [*past, *state]


class TenPreTrainedModel(PreTrainedModel):
    """Base of the models of this file."""

    config_class = TenConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["TenBlock"]
    _is_stateful = True
    _can_compile_fullgraph = False
    # A rounded rotation would be wrong by more with every step.
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["alpha_base", "omega_base"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TenShortConvolution):
            module.filter.zero_()
            module.filter[0] = 1.0
        if isinstance(module, TenEigenstates):
            self._init_mixer(module)
        # transformers does not call this for modules without parameters of their own.
        if isinstance(module, ScaleMixing):
            nn.init.eye_(module.weight)
            module.weight.div_(len(self.config.scales) ** 0.5)
        if isinstance(module, BranchEnd):
            std = self.config.initializer_range / (2 * self.config.n_layers) ** 0.5
            module.weight.normal_(0.0, std)

    def _init_mixer(self, mixer: TenEigenstates) -> None:
        """Initial values of the recurrence, those of ten_dist up to the random draws."""
        config, states = self.config, mixer.num_eigenstates
        width = 2 * states
        nn.init.orthogonal_(mixer.in_proj.weight[:width])
        mixer.in_proj.weight[width : 2 * width].zero_()
        nn.init.orthogonal_(mixer.out_proj.weight)
        mixer.gate_bias.zero_()
        if isinstance(mixer, TenMixer):
            mixer.coupling.normal_(0.0, states**-0.5)
            mixer.coupling_strength.fill_(0.01)
            if mixer.gates_state:
                mixer.in_proj.weight[2 * width :].normal_(0.0, config.dim**-0.5)
            else:
                mixer.gate_bias.fill_(-2.0)
        if isinstance(mixer, TenMatrixMixer):
            _, _, query, value, gate = mixer.in_proj.weight.split(mixer.rows)
            nn.init.orthogonal_(query)
            nn.init.orthogonal_(value)
            gate.normal_(0.0, config.dim**-0.5)
        if mixer.selection is not None:
            for row, initial in zip(mixer.selection, mixer.selection_range):
                row.fill_(initial)
        for offset in (mixer.alpha_offset, mixer.omega_offset):
            offset.zero_()
        if isinstance(mixer, TenMixer) and mixer.levels is not None:
            mixer.levels.weight.zero_()
            mixer.levels.bias.zero_()
        self._init_eigenvalues(mixer)
        if isinstance(mixer, TenMatrixMixer):
            # Each head has memories of all lengths, and nothing rotates.
            by_length = mixer.alpha_base.unflatten(0, (-1, mixer.num_heads))
            mixer.alpha_base.copy_(by_length.T.flatten())
            mixer.omega_base.zero_()

    def _init_eigenvalues(self, mixer: TenEigenstates) -> None:
        config, states = self.config, mixer.num_eigenstates
        index = torch.arange(states, device=mixer.alpha_base.device)
        if config.eigenvalue_init == "paper":
            mixer.alpha_base.uniform_(-3, 0)
            mixer.omega_base.copy_(2 * math.pi * index / states)
            return
        depth = 1.0
        if config.depth_increasing_memory:
            depth = (mixer.layer + 1) / config.n_layers
        longest = max(config.max_timescale**depth / mixer.scale, 2.0)
        log_memory = math.log(longest) * (index + 0.5) / states
        mixer.alpha_base.copy_(log_memory.expm1().log())
        golden = (1 + math.sqrt(5)) / 2
        angle = math.pi * (2 * torch.remainder(index / golden, 1.0) - 1)
        mixer.omega_base.copy_(angle * (4 / log_memory.exp()).clamp(max=1))


class TenModel(TenPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: TenConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            TenBlock(config, layer) for layer in range(config.n_layers)
        )
        self.final_norm = nn.LayerNorm(config.dim)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of the tokens."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace it."""
        self.embedding = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: TenCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: TenCache | None = None,
        **_: Any,
    ) -> TenOutput:
        """Run the blocks over a piece of each sequence.

        Args:
            input_ids: [B, T] int64; or `inputs_embeds` [B, T, d] in their place, whose
                documents cannot be told apart.
            attention_mask: [B, S], S >= T, 0 for padding on the left of the piece, which
                has no effect on what follows, be it the start of the text or, but for
                attention, more of it. Padding on the right has none either, as the model
                is causal, but is part of the cache.
            cache: what an earlier call returned for the tokens before these;
                `past_key_values` is another name of it.
            use_cache: return the cache after these tokens.
            output_hidden_states: return those before each block and after the final norm,
                [B, T, d] each; at padding they mean nothing.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        hidden = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = self.dropout(hidden)
        batch, steps = hidden.shape[:2]
        before = TenCache.of_nothing(batch, hidden.device) if cache is None else cache
        padding = self._padding(attention_mask, batch, steps)
        drops = self._drops(padding, steps, before)
        resets, after = self._resets(input_ids, padding, drops, steps, before)
        states, layers = self._run_groups(
            hidden, before, drops, resets, bool(output_hidden_states)
        )
        last = self.final_norm(states[-1])
        new_cache = None
        if use_cache:
            seen = before.seen_tokens + steps
            phases, started = self._ends(padding, drops, steps, before)
            new_cache = TenCache(layers, phases, started, after, seen)
        all_hidden = (*states[:-1], last) if output_hidden_states else None
        return TenOutput(last, new_cache, all_hidden)

    def _run_groups(
        self,
        hidden: Tensor,
        before: TenCache,
        drops: list[int],
        resets: Tensor | None,
        keep_all: bool,
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Run rows together that are at the same phase and leave out as much.

        Returns:
            Hidden states [B, T, d] as :meth:`_run`, zeros where a row leaves out padding,
            and the state of each layer after the piece.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for row, key in enumerate(zip(before.phases, drops)):
            groups.setdefault(key, []).append(row)
        if len(groups) == 1 and not drops[0]:
            (phase, _), *_ = groups
            return self._run(hidden, before.layers, phase, resets, keep_all)
        states: list[Tensor] = []
        parts: list[list[list[Tensor]]] = []
        for (phase, drop), members in groups.items():
            rows = torch.tensor(members, device=hidden.device)
            layers = before.select(rows).layers
            if drop < hidden.shape[1]:
                own = None if resets is None else resets[rows][:, drop:]
                ran, layers = self._run(
                    hidden[rows][:, drop:], layers, phase, own, keep_all
                )
                states = states or [torch.zeros_like(hidden) for _ in ran]
                states = [
                    state.index_copy(0, rows, F.pad(of_rows, (0, 0, drop, 0)).to(state))
                    for state, of_rows in zip(states, ran)
                ]
            parts.append(layers)
        order = torch.tensor(
            [row for rows in groups.values() for row in rows]
        ).argsort()
        joined = [
            [torch.cat(pieces)[order.to(pieces[0].device)] for pieces in zip(*layers)]
            for layers in zip(*parts)
        ]
        count = len(self.blocks) + 1 if keep_all else 1
        return states or [torch.zeros_like(hidden)] * count, joined

    def _run(
        self,
        hidden: Tensor,
        layers: list[list[Tensor]],
        phase: int,
        resets: Tensor | None,
        keep_all: bool,
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """All blocks over rows that are at the same phase.

        Returns:
            Hidden states after the last block, with `keep_all` behind those before each,
            and the state of each layer after the piece.
        """
        states, new_layers = [hidden], []
        for index, block in enumerate(self.blocks):
            state = layers[index] if layers else None
            hidden, state = block(hidden, state, phase, resets)
            states = [*states, hidden] if keep_all else [hidden]
            new_layers.append(state)
        return states, new_layers

    def _padding(
        self, attention_mask: Tensor | None, batch: int, steps: int
    ) -> list[int]:
        """Padded tokens on the left of each row of this piece: all of them where it has no
        other."""
        if attention_mask is None:
            return [0] * batch
        if attention_mask.dim() != 2 or attention_mask.shape[1] < steps:
            raise ValueError("attention_mask must be [B, S], S >= T, 0 for padding")
        mask = attention_mask[:, -steps:].bool()
        first = mask.int().argmax(dim=1)
        return first.masked_fill(~mask.any(dim=1), steps).tolist()

    def _drops(self, padding: list[int], steps: int, before: TenCache) -> list[int]:
        """Padded tokens that each row leaves out.

        A row that begins behind them leaves out what brings its first token to a multiple
        of the period, where pooling and blocks begin for a row by itself: so rows of all
        lengths make few groups. One that goes on leaves out all.
        """
        period = self.config.period
        if self.config.mixer == "attention" and any(
            pad and started for pad, started in zip(padding, before.started)
        ):
            raise ValueError(
                "attention takes no padding behind tokens that it has seen"
            )
        begun = [0 if pad == steps else pad % period for pad in padding]
        return [
            pad if started else drop
            for pad, drop, started in zip(padding, begun, before.started)
        ]

    def _resets(
        self,
        input_ids: Tensor | None,
        padding: list[int],
        drops: list[int],
        steps: int,
        before: TenCache,
    ) -> tuple[Tensor | None, Tensor]:
        """Steps before which a row forgets everything: where a document starts, and at the
        first token behind padding of a row that begins there.

        Returns:
            [B, T] bool, None for none, and [B] bool, whether the last token ended a
            document.
        """
        after = before.after_separator
        # Rows that have seen padding alone; those that have seen nothing are empty anyway.
        begins = [
            pad if (pad or before.layers) and not started else steps
            for pad, started in zip(padding, before.started)
        ]
        separator = self.config.document_separator_id
        if separator is None and min(begins) == steps:
            return None, after
        index = torch.arange(steps, device=after.device)
        pads, firsts, starts = (
            torch.tensor(columns, device=after.device).unsqueeze(1)
            for columns in (padding, drops, begins)
        )
        resets = index == starts
        if separator is None:
            return resets, after
        # What embeddings stand for is not known.
        ends = torch.zeros_like(resets)
        if input_ids is not None:
            ends = (input_ids == separator) & (index >= pads)
        resets |= (index == firsts) & after.unsqueeze(1)
        resets[:, 1:] |= ends[:, :-1]
        return resets, torch.where(pads.squeeze(1) < steps, ends[:, -1], after)

    def _ends(
        self, padding: list[int], drops: list[int], steps: int, before: TenCache
    ) -> tuple[list[int], list[bool]]:
        """Phases after a piece, and which rows have begun."""
        period = self.config.period
        started = [was or pad < steps for was, pad in zip(before.started, padding)]
        phases = [
            (phase + steps - drop) % period if begun else 0
            for phase, drop, begun in zip(before.phases, drops, started)
        ]
        return phases, started


class TenForCausalLM(TenPreTrainedModel, GenerationMixin):
    """A language model: :class:`TenModel` and a head that shares the embedding."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "lm_head.weight": "model.embedding.weight"
    }

    def __init__(self, config: TenConfig) -> None:
        super().__init__(config)
        self.model = TenModel(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace it."""
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: TenCache | None = None,
        past_key_values: TenCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> TenCausalLMOutput | tuple:
        """Logits of the next token at each position.

        Args:
            past_key_values: what transformers before 5.24 calls `cache`.
            labels: [B, T]; the loss is the cross-entropy of label t + 1 given tokens up to
                t, without those of -100. The energy term of training is not in it.
            logits_to_keep: logits of the last so many positions only; 0 for all.
            Others: as :meth:`TenModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cache=past_key_values if cache is None else cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        hidden = outputs.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        result = TenCausalLMOutput(loss, logits, outputs.cache, outputs.hidden_states)
        return result if return_dict is not False else result.to_tuple()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        cache: TenCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Arguments of the next call: tokens that the cache has not seen yet."""
        cache = kwargs.get(_CACHE_NAME, cache)
        inputs: dict[str, Any] = {
            "cache": cache,
            "use_cache": use_cache is not False,
            "attention_mask": attention_mask,
        }
        if inputs_embeds is not None and cache is None:
            inputs["inputs_embeds"] = inputs_embeds
        else:
            unseen = 0 if cache is None else cache.seen_tokens
            if inputs_embeds is not None:
                # `input_ids` have only what was generated after the embeddings.
                unseen = input_ids.shape[1] - 1
            # Of a continued text, all of it or what is new can be given.
            new = input_ids[:, unseen:]
            inputs["input_ids"] = new if new.shape[1] else input_ids
        if "logits_to_keep" in kwargs:
            inputs["logits_to_keep"] = kwargs["logits_to_keep"]
        return inputs

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        updated = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *args, **kwargs
        )
        if outputs.cache is not None:
            updated[_CACHE_NAME] = outputs.cache
        return updated

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: a first call without a cache makes it."""

    @staticmethod
    def _reorder_cache(cache: TenCache, beam_idx: Tensor) -> TenCache:
        return cache.select(beam_idx.to(cache.after_separator.device))


__all__ = ["TenCache", "TenConfig", "TenForCausalLM", "TenModel", "TenPreTrainedModel"]
