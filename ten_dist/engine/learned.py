"""What a model has learned so far, looked at while it trains."""

from __future__ import annotations

import importlib.util

import deepspeed
import torch

from ten_dist.analysis.places import Place, places_of
from ten_dist.analysis.spectrum import Spectrum, spectrum_of
from ten_dist.analysis.summaries import summary_of
from ten_dist.analysis.usage import UsageCounter
from ten_dist.console import say
from ten_dist.data import BatchShape, TokenBatch, evaluation_batches
from ten_dist.engine.distributed import Ranks
from ten_dist.engine.reporter import Reporter
from ten_dist.engine.resolution import ResolvedRun
from ten_dist.engine.validation import readable
from ten_dist.engine.watched_scans import watched
from ten_dist.recurrence.observer import InTurn

_ROWS = 2


class Learned:
    """Looks at the eigenstates of a model at an interval. Every rank has one.

    Args:
        engine: of the model.
        ranks, run, reporter: of the training.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        ranks: Ranks,
        run: ResolvedRun,
        reporter: Reporter,
    ) -> None:
        self._engine = engine
        self._ranks = ranks
        self._run = run
        self._reporter = reporter
        self._interval = run.training.analysis_interval
        self._looks = self._interval > 0 and run.model_config.mixer == "eigenstate"
        self._batch: TokenBatch | None = None
        self._draws = importlib.util.find_spec("matplotlib") is not None
        if self._looks and not self._draws and run.schedule.steps >= self._interval:
            say(
                "TensorBoard gets no pictures of eigenvalues and memory, which need "
                "matplotlib: pip install 'ten_dist[analysis]'"
            )

    def look_if_due(self, step: int) -> None:
        """After a step, look if it is time; every rank must call this."""
        if self._looks and step % self._interval == 0:
            self._reporter.progress("validation", step)
            self._look(step)

    @torch.no_grad()
    def _look(self, step: int) -> None:
        places = places_of(self._engine.module)
        counters = [UsageCounter(place) for place in places]
        batch = self._rows()
        device = self._engine.device
        with watched(self._engine, self._run, InTurn(counters)):
            self._engine(batch.inputs.to(device), targets=batch.targets.to(device))
        spectra = _spectra(places)
        if not self._ranks.is_first:
            return
        usages = [counter.usage() for counter in counters]
        energies = {
            f"energy/layer{place.layer}/scale{place.scale}": float(usage.energy.mean())
            for place, usage in zip(places, usages)
        }
        self._reporter.record({"step": step, **energies})
        self._reporter.show(step, summary_of(places, spectra, usages, self._draws))

    def _rows(self) -> TokenBatch:
        """Held-out rows, or rows of the data; the same on all ranks and at every look."""
        if self._batch is None:
            manifest = [*self._run.validation.values(), *self._run.manifests()][0]
            shape = BatchShape(self._run.schedule.seq_len, _ROWS)
            batches = readable(evaluation_batches(manifest, shape, max_rows=_ROWS))
            self._batch = next(batches)
        return self._batch


def _spectra(places: list[Place]) -> list[Spectrum]:
    """Of all places; ZeRO stage 3 has the parameters gathered for it."""
    offsets = [
        offset
        for place in places
        for offset in (place.mixer.alpha_offset, place.mixer.omega_offset)
    ]
    with deepspeed.zero.GatheredParameters(offsets):
        return [spectrum_of(place) for place in places]
