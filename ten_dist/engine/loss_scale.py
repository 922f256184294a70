"""The loss scale of training in float16, which adapts itself.

Gradients of activations are float16 there: below 6e-8 they are zero, beyond 65504
infinite. Multiplied by a power of two, which is exact, they lie in between; gradients of
parameters are divided by it again, in float32, before they are used. Where the scale is too
large a gradient is not finite: the update is skipped, on all ranks as all have the same
norm, and the scale is halved. After :data:`GROWTH_STEPS` steps without it is doubled.

DeepSpeed 0.19 has two such scales, and neither serves. Its `fp16` casts all parameters,
those of the recurrence included, and refuses CPUs without float16 arithmetic. With
`torch_autocast` to float16 its sharded optimizers report and clip the norm of gradients
that are still scaled, and return from a step whose norm is not finite before its scaler
has seen it, so that the scale never falls.
"""

from __future__ import annotations

from ten_dist.checkpoint import LossScaleState

INITIAL = 2.0**16
FLOOR = 1.0
GROWTH_STEPS = 2000
"""Steps in a row without overflow, after which the scale is doubled."""


class LossScale:
    """What the loss is multiplied with before backward; the same on all ranks.

    Args:
        state: as :meth:`state` gave it, or None at the start of a run.
    """

    def __init__(self, state: LossScaleState | None = None) -> None:
        state = state or LossScaleState(INITIAL, 0, 0)
        self.value = state.value
        """A power of two."""
        self.overflowed_steps = state.overflowed_steps
        """Steps of the run whose update was left out because of the scale."""
        self._since = state.steps_since_change

    @property
    def at_floor(self) -> bool:
        """Whether it cannot be halved: what overflows then does so by itself."""
        return self.value <= FLOOR

    def update(self, overflowed: bool) -> None:
        """Adapt to a step whose loss was finite, and whose gradient perhaps overflowed."""
        self._since = 0 if overflowed else self._since + 1
        if overflowed:
            self.overflowed_steps += 1
            self.value = max(self.value / 2, FLOOR)
        elif self._since == GROWTH_STEPS:
            self.value *= 2
            self._since = 0

    def state(self) -> LossScaleState:
        """What a checkpoint keeps."""
        return LossScaleState(self.value, self.overflowed_steps, self._since)
