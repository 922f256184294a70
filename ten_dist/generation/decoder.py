"""Continuous batching: sequences that come and go, each one step of the model a token.

A recurrent model keeps of a sequence a state of fixed size, so that a batch is the states of
its rows one above the other: a sequence joins at any step and leaves at any step, without
padding, at whatever position it is. A step reads one piece of the prompts that wait, all but
the last token of each, and then one token of every row.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ten_dist.generation.sampling import Sampler, Sampling, draw
from ten_dist.model.network import NetworkState, TemporalEigenstateNetwork
from ten_dist.model.state import empty_like, join_states, row_of, select_rows

PROMPT_PIECE = 2048
"""Most tokens of waiting prompts that a step reads: what the other rows wait for."""


class StateCache(Protocol):
    """States by the tokens that led to them."""

    def longest_prefix(self, tokens: Sequence[int]) -> tuple[int, NetworkState | None]:
        """How many of the first tokens the longest known prefix has, and its state; all of
        them at most."""

    def put(self, tokens: Sequence[int], state: NetworkState) -> None:
        """Remember the state of one row that has read these tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to be continued.

    Raises:
        ValueError: there is nothing to continue, or nothing to add.
    """

    prompt: Sequence[int]
    """Token ids, at least one: a document starts with the separator."""
    max_new_tokens: int
    """Most tokens to add."""
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stop_ids: Collection[int] = ()
    """Tokens that end the continuation, and are its last one."""
    logprobs: int | None = None
    """Alternatives whose log-probabilities are wanted beside that of each token; None wants
    none at all."""
    state: NetworkState | None = None
    """State of one row before the prompt; by default that of a model that has read nothing."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("a prompt has at least one token")
        if self.max_new_tokens < 1:
            raise ValueError("max_new_tokens must be at least 1")


class Token(NamedTuple):
    """A token of a continuation."""

    id: int
    logprob: float | None = None
    """Log-probability that the model gave it, in nats, before any setting of sampling."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """The most likely tokens and their log-probabilities, likeliest first."""


class Generated:
    """The continuation of a request, as far as it has come."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tokens: list[Token] = []
        self.finish_reason: Literal["stop", "length", "cancelled"] | None = None
        """Why it has ended: a stop token, max_new_tokens, or :meth:`Decoder.cancel`."""
        self.state: NetworkState | None = None
        """At its end, the state of one row that has read all but the last token."""
        self._sampler = Sampler(request.sampling, request.prompt)
        # Tokens of the prompt that its state has read; None before its turn has come.
        self._read: int | None = None
        self._state = request.state

    @property
    def ids(self) -> list[int]:
        """Ids of the tokens so far."""
        return [token.id for token in self.tokens]

    def _last_token(self) -> int:
        return self.tokens[-1].id if self.tokens else self.request.prompt[-1]

    def _add(self, token: Token) -> None:
        self.tokens.append(token)
        if token.id in self.request.stop_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.request.max_new_tokens:
            self.finish_reason = "length"


class Decoder:
    """Continues many sequences at once. Not for several threads.

    Args:
        network: in evaluation mode, not sharded.
        autocast: makes the context in which it computes.
        cache: of states, to read what prompts have in common once.
        compute: is called for the logits, as the network is, and then the network may be
            sharded: an engine that has it whole while it computes.
    """

    def __init__(
        self,
        network: TemporalEigenstateNetwork,
        autocast: Callable[
            [], contextlib.AbstractContextManager
        ] = contextlib.nullcontext,
        cache: StateCache | None = None,
        compute: Callable[..., Any] | None = None,
    ) -> None:
        self._compute = network if compute is None else compute
        # Weights that are gathered in inference mode could not be trained afterwards.
        self._gradless = torch.inference_mode if compute is None else torch.no_grad
        self._autocast = autocast
        self._cache = cache
        self._device = network.embedding.weight.device
        self._waiting: deque[Generated] = deque()
        self._running: list[Generated] = []
        attends = network.config.mixer == "attention"
        self._rows: _JoinedRows | _SeparateRows
        self._rows = _SeparateRows() if attends else _JoinedRows(self.empty_state())

    def __len__(self) -> int:
        """Sequences that have not ended."""
        return len(self._waiting) + len(self._running)

    def add(self, request: Request) -> Generated:
        """Take a request; :meth:`step` continues it from now on."""
        generated = Generated(request)
        self._waiting.append(generated)
        return generated

    def cancel(self, generated: Generated) -> None:
        """End a sequence before the next step; one that has ended stays as it is."""
        if generated.finish_reason is None:
            generated.finish_reason = "cancelled"
            self._remove_ended()

    def step(self) -> list[Generated]:
        """One token more of every sequence whose prompt is read.

        Returns:
            those sequences; they have ended where they have a finish_reason.
        """
        with self._gradless():
            return self._step()

    def _step(self) -> list[Generated]:
        with self._autocast():
            self._read_prompts()
            if not self._running:
                return []
            ids = [generated._last_token() for generated in self._running]
            column = torch.tensor(ids, device=self._device).unsqueeze(1)
            logits = self._rows.step(self._compute, column).float()
        drawn = draw(logits, [generated._sampler for generated in self._running])
        continued = list(self._running)
        for generated, row, token in zip(continued, logits, drawn, strict=True):
            generated._add(_token(row, token, generated.request.logprobs))
        self._remove_ended()
        return continued

    def empty_state(self) -> NetworkState:
        """The state of one row that has read nothing."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=self._device)
        with self._gradless(), self._autocast():
            _, state = self._compute(token, return_state=True, last_only=True)
        return empty_like(state)

    def _read_prompts(self) -> None:
        """Read a piece of what waits; what is read becomes a row."""
        left = PROMPT_PIECE
        while self._waiting and left > 0:
            generated = self._waiting[0]
            prompt = generated.request.prompt[:-1]
            if generated._read is None:
                generated._read = self._look_up(generated, prompt)
            piece = prompt[generated._read : generated._read + left]
            left -= max(len(piece), 1)
            if piece:
                _, generated._state = self._compute(
                    torch.tensor([piece], device=self._device),
                    state=generated._state,
                    return_state=True,
                    last_only=True,
                )
                generated._read += len(piece)
            if generated._read == len(prompt):
                self._waiting.popleft()
                self._remember(generated, prompt, generated._state)
                self._rows.add(generated._state)
                self._running.append(generated)
                generated._state = None

    def _look_up(self, generated: Generated, prompt: Sequence[int]) -> int:
        """Give it the state of what is known of its prompt; returns how many tokens."""
        if self._cache is None or generated.request.state is not None:
            return 0
        known, generated._state = self._cache.longest_prefix(prompt)
        return known

    def _remember(
        self, generated: Generated, tokens: Sequence[int], state: NetworkState | None
    ) -> None:
        if self._cache is None or generated.request.state is not None:
            return
        if tokens and state is not None:
            self._cache.put(tokens, state)

    def _remove_ended(self) -> None:
        self._waiting = deque(g for g in self._waiting if g.finish_reason is None)
        kept = []
        for row, generated in enumerate(self._running):
            if generated.finish_reason is None:
                kept.append(row)
            else:
                generated.state = self._rows.state(row)
                read = [*generated.request.prompt, *generated.ids][:-1]
                self._remember(generated, read, generated.state)
        if len(kept) < len(self._running):
            self._rows.keep(kept)
            self._running = [self._running[row] for row in kept]


class _JoinedRows:
    """Rows of a recurrent model: one state, one call a step."""

    def __init__(self, empty: NetworkState) -> None:
        self._empty = empty
        self._joined: NetworkState | None = None

    def add(self, state: NetworkState | None) -> None:
        new = [self._empty if state is None else state]
        self._joined = join_states(
            new if self._joined is None else [self._joined, *new]
        )

    def step(self, compute: Callable[..., Any], ids: Tensor) -> Tensor:
        """Logits [B, V] after one token more of each row, [B, 1]."""
        logits, self._joined = compute(ids, state=self._joined, return_state=True)
        return logits[:, -1]

    def state(self, row: int) -> NetworkState:
        assert self._joined is not None, "a row was added"
        return row_of(self._joined, row)

    def keep(self, rows: list[int]) -> None:
        self._joined = select_rows(self._joined, rows) if rows else None


class _SeparateRows:
    """Rows of attention, whose states are as long as the sequences: one call a row."""

    def __init__(self) -> None:
        self._states: list[NetworkState | None] = []

    def add(self, state: NetworkState | None) -> None:
        self._states.append(state)

    def step(self, compute: Callable[..., Any], ids: Tensor) -> Tensor:
        """Logits [B, V] after one token more of each row, [B, 1]."""
        all_logits = []
        for row, token in enumerate(ids.split(1)):
            logits, self._states[row] = compute(
                token, state=self._states[row], return_state=True
            )
            all_logits.append(logits[:, -1])
        return torch.cat(all_logits)

    def state(self, row: int) -> NetworkState | None:
        return self._states[row]

    def keep(self, rows: list[int]) -> None:
        self._states = [self._states[row] for row in rows]


def _token(logits: Tensor, token: int, alternatives: int | None) -> Token:
    if alternatives is None:
        return Token(token)
    logprobs = logits.log_softmax(dim=0)
    best = logprobs.topk(min(alternatives, len(logprobs)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return Token(token, logprobs[token].item(), tuple(pairs))


def generate(
    network: TemporalEigenstateNetwork,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
) -> list[list[int]]:
    """Continue prompts of any lengths, as each alone would be.

    Args:
        network: not sharded; it computes in evaluation mode.
        prompts: token ids, at least one each.
        max_new_tokens: most tokens to add to each.
        sampling: how, by default as :class:`Sampling` says; prompt i is drawn with seed + i.
        stop_ids: tokens that end a continuation, and are its last one.

    Returns:
        the ids added to each prompt, at most `max_new_tokens`.

    Raises:
        ValueError: a prompt is empty, or `max_new_tokens` is not positive.
    """
    sampling = sampling or Sampling()
    with _evaluating(network):
        decoder = Decoder(network)
        results = [
            decoder.add(
                Request(
                    prompt=prompt,
                    max_new_tokens=max_new_tokens,
                    sampling=dataclasses.replace(sampling, seed=sampling.seed + number),
                    stop_ids=stop_ids,
                )
            )
            for number, prompt in enumerate(prompts)
        ]
        while len(decoder):
            decoder.step()
    return [result.ids for result in results]


@contextlib.contextmanager
def _evaluating(network: TemporalEigenstateNetwork) -> Iterator[None]:
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)
