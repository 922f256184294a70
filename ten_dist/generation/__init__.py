"""Continuing prompts, many at once: sampling, and a decoder that takes them as they come."""

from ten_dist.generation.decoder import Decoder, Generated, Request, Token, generate
from ten_dist.generation.sampling import Sampling

__all__ = ["Decoder", "Generated", "Request", "Sampling", "Token", "generate"]
