"""Options of `ten-dist serve`."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from ten_dist.config.options import at_least, metavar, more_than
from ten_dist.trained_model import CheckpointOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingOptions(CheckpointOptions):
    """Where and how a model is served; each field is an option of `ten-dist serve`."""

    host: Annotated[str, metavar("ADDRESS")] = "127.0.0.1"
    """Address to listen at; the default takes connections of this machine alone."""
    port: Annotated[int, at_least(0, most=65535)] = 8000
    """Port to listen at; 0 takes a free one, which a line names."""
    model_name: Annotated[str | None, metavar("NAME")] = None
    """What clients call the model; by default the name of the folder."""
    slots: Annotated[int, at_least(1)] = 64
    """Sequences that are continued at once."""
    queue: Annotated[int, at_least(0)] = 256
    """Sequences that wait for a slot at most; further ones are refused with status 429."""
    max_new_tokens: Annotated[int, at_least(1)] = 4096
    """Most tokens that a request can ask for."""
    request_timeout: Annotated[float, more_than(0), metavar("SECONDS")] = 600.0
    """Longest time that a request can take, waiting for a slot included."""
    grace_period: Annotated[float, at_least(0), metavar("SECONDS")] = 30.0
    """How long requests under way can go on after SIGTERM."""
    cache_megabytes: Annotated[int, at_least(0)] = 256
    """Memory for states of prompts, so that what prompts have in common is read once; taken
    as a whole when the first prompt is read."""
    api_key_variable: Annotated[str, metavar("NAME")] = "TEN_DIST_API_KEY"
    """Variable of the environment with the key that clients have to send; where it is not
    set, everybody is served."""
