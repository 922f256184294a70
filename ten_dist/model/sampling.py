"""Sampling from a model, at a constant cost a token."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

PROMPT_PIECE = 2048
"""Tokens of a prompt that are read at once."""
# Logits divided by less could overflow, and no token but the likeliest would be drawn.
_LEAST_TEMPERATURE = 1e-6


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue each prompt by up to `max_new_tokens` tokens.

    The prompt is read once, in pieces; after it each token costs one step of the
    recurrence. Memory grows with the length of neither.

    Args:
        model: called as model(ids, state=..., return_state=True, last_only=True).
        prompt_ids: [B, T] int64, T >= 1.
        max_new_tokens: most tokens to add.
        temperature: 0, or less than a millionth, takes the most likely token; otherwise
            logits are divided by it.
        top_k: sample among the k most likely tokens only.
        top_p: sample among the fewest most likely tokens of total probability top_p.
        stop_id: end when every sequence has produced this id; a sequence that has is
            filled with it.
        generator: source of randomness, on the device of the model.

    Returns:
        [B, T + n] int64, the prompts and what was added, n <= max_new_tokens.

    Raises:
        ValueError: the prompt is empty or a parameter is out of its range.
    """
    if prompt_ids.dim() != 2 or prompt_ids.shape[1] < 1:
        raise ValueError("prompt_ids must be [B, T] with at least one token")
    _check_options(temperature, top_k, top_p)
    was_training = model.training
    model.eval()
    pieces, ids, state = [prompt_ids], prompt_ids, None
    stopped = torch.zeros_like(prompt_ids[:, :1], dtype=torch.bool)
    try:
        for _ in range(max_new_tokens):
            for piece in ids.split(PROMPT_PIECE, dim=1):
                logits, state = model(
                    piece, state=state, return_state=True, last_only=True
                )
            ids = _sample(logits[:, -1].float(), temperature, top_k, top_p, generator)
            if stop_id is not None:
                ids = torch.where(stopped, stop_id, ids)
                stopped |= ids == stop_id
            pieces.append(ids)
            if stop_id is not None and bool(stopped.all()):
                break
    finally:
        model.train(was_training)
    return torch.cat(pieces, dim=1)


def _check_options(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or more, not {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be 1 or more, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], not {top_p}")


def _sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """[B, V] logits to [B, 1] ids."""
    if temperature < _LEAST_TEMPERATURE:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        # A token is dropped where those before it already reach top_p, so that the most
        # likely one always stays.
        dropped = probabilities.cumsum(dim=-1) - probabilities >= top_p
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
