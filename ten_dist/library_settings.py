"""Variables by which the libraries of a training are set, checked before they are imported.

DeepSpeed reads its own while it is imported, and an error of that is a traceback.
"""

from __future__ import annotations

import os

from ten_dist.errors import ConfigurationError
from ten_dist.own_rank import read_number


def check_library_settings() -> None:
    """Import DeepSpeed, whose settings are then known to be right.

    Raises:
        ConfigurationError: a variable has a value that cannot be used.
    """
    for name in ("DEEPSPEED_TIMEOUT", "DS_ACCELERATOR"):
        if not os.environ.get(name, "unset").strip():
            # As for every program of a shell, an empty variable is one that is not set.
            del os.environ[name]
    read_number(os.environ, "DEEPSPEED_TIMEOUT", 0)
    try:
        from deepspeed.accelerator import get_accelerator

        accelerator = get_accelerator()
    except ValueError as error:
        raise ConfigurationError(
            f"DeepSpeed refuses the environment: {' '.join(str(error).split())}"
        ) from None
    if not accelerator.is_available():
        raise ConfigurationError(
            f"DS_ACCELERATOR is {os.environ['DS_ACCELERATOR']}, which is not there: unset "
            "it, and what is there is found"
        )
