"""Make the pictures of the README from a run with several scales.

    python -m docs.generate.pictures RUN

That of the README was pico with `--hten_scales 1,2,4 --steps 150 --global_batch_size 16 --seq_len 256
--learning_rate 2e-3` on 1.1 MB of Shakespeare, with a vocabulary of 2,048.
"""

from __future__ import annotations

import sys

from docs.generate.pages import ROOT
from ten_dist.analysis import HeldOutRows, observe_usage, places_of, spectrum_of
from ten_dist.analysis.figures import eigenvalue_figure, memory_figure
from ten_dist.analysis.page import svg_of
from ten_dist.analysis.usage import PERCENTILES
from ten_dist.data import Manifest
from ten_dist.files import write_text
from ten_dist.run_folder import RunFolder
from ten_dist.trained_model import TrainedModel

_STYLE = (
    "<style>svg { color: #1d1f24; } "
    "@media (prefers-color-scheme: dark) { svg { color: #e7e8ea; } }</style>"
)
"""An image does not have the colours of the page around it."""


def main(path: str) -> None:
    """Make the pictures of a run."""
    folder = RunFolder(path)
    record, model = folder.read(), TrainedModel.load(folder)
    manifest = Manifest.load(record.data.validation[""])
    rows = HeldOutRows.read(manifest, record.schedule.seq_len, 32, model.device)
    places = places_of(model.network)
    spectra = [spectrum_of(place) for place in places]
    used = [u.memory_of_all(PERCENTILES) for u in observe_usage(model.network, rows)]
    # Of the first and the last layer, so that the file is small.
    ends = [n for n, place in enumerate(places) if place.layer in (1, places[-1].layer)]
    figures = {
        "eigenvalues": eigenvalue_figure(
            [places[n] for n in ends], [spectra[n] for n in ends]
        ),
        "memory": memory_figure(places, spectra, used),
    }
    for name, figure in figures.items():
        start, end, rest = str(svg_of(figure)).partition(">")
        write_text(
            ROOT / "docs" / "pictures" / f"{name}.svg", start + end + _STYLE + rest
        )


if __name__ == "__main__":
    main(sys.argv[1])
