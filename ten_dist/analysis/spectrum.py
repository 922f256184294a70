"""The base eigenvalues of a network: where they began and where they are."""

from __future__ import annotations

import dataclasses

import numpy as np

from ten_dist.analysis.places import Place, as_array


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The K base eigenvalues of a place, sigmoid(alpha) exp(i omega) a step."""

    scale: int
    """Tokens a step."""
    initial_alpha: np.ndarray
    """[K] float32."""
    initial_omega: np.ndarray
    """[K] float32, radians a step."""
    alpha: np.ndarray
    """[K] float32, now."""
    omega: np.ndarray
    """[K] float32, radians a step, now."""

    @property
    def initial(self) -> np.ndarray:
        """[K] complex, the initial eigenvalues."""
        return _eigenvalues(self.initial_alpha, self.initial_omega)

    @property
    def now(self) -> np.ndarray:
        """[K] complex, the eigenvalues now."""
        return _eigenvalues(self.alpha, self.omega)

    @property
    def initial_memory(self) -> np.ndarray:
        """[K] initial memory 1 / (1 - |lambda|), in tokens."""
        return self.scale * (1 + np.exp(self.initial_alpha.astype(np.float64)))

    @property
    def memory(self) -> np.ndarray:
        """[K] memory now, in tokens."""
        return self.scale * (1 + np.exp(self.alpha.astype(np.float64)))


def spectrum_of(place: Place) -> Spectrum:
    """The base eigenvalues of a place."""
    mixer = place.mixer
    return Spectrum(
        place.scale,
        as_array(mixer.alpha_base),
        as_array(mixer.omega_base),
        as_array(mixer.alpha),
        as_array(mixer.omega),
    )


def _eigenvalues(alpha: np.ndarray, omega: np.ndarray) -> np.ndarray:
    return np.exp(1j * omega) / (1 + np.exp(-alpha))
