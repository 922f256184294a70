"""What a network has learned so far, for TensorBoard."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from tensorboard.compat.proto.histogram_pb2 import HistogramProto
from tensorboard.compat.proto.summary_pb2 import Summary

from ten_dist.analysis.figures import (
    eigenvalue_figure,
    memory_figure,
    styled,
)
from ten_dist.analysis.places import Place
from ten_dist.analysis.spectrum import Spectrum
from ten_dist.analysis.usage import PERCENTILES, Usage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BINS = 30
_RGBA = 4


def summary_of(
    places: Sequence[Place],
    spectra: Sequence[Spectrum],
    usages: Sequence[Usage],
    pictures: bool,
) -> Summary:
    """Histograms of memory, and pictures of eigenvalues and memory.

    Args:
        places, spectra, usages: P of them.
        pictures: whether to draw, which needs matplotlib and a second.
    """
    values = [*_histograms(places, spectra)]
    if pictures:
        planes = [usage.plane_counts for usage in usages]
        used = [usage.memory_of_all(PERCENTILES) for usage in usages]
        figures = {
            "eigenvalues": eigenvalue_figure(places, spectra, planes),
            "memory": memory_figure(places, spectra, used),
        }
        values += [_image(f"analysis/{n}", figure) for n, figure in figures.items()]
    return Summary(value=values)


def _histograms(
    places: Sequence[Place], spectra: Sequence[Spectrum]
) -> Iterator[Summary.Value]:
    for place, spectrum in zip(places, spectra):
        # A linear axis would show the longest alone.
        values = np.log10(spectrum.memory)
        counts, edges = np.histogram(values, bins=_BINS)
        histogram = HistogramProto(
            min=values.min(),
            max=values.max(),
            num=values.size,
            sum=values.sum(),
            sum_squares=np.square(values).sum(),
            bucket_limit=edges[1:].tolist(),
            bucket=counts.tolist(),
        )
        yield Summary.Value(tag=f"log10_memory_tokens/{place}", histo=histogram)


def _image(tag: str, figure: Figure) -> Summary.Value:
    file = io.BytesIO()
    with styled():
        figure.savefig(file, format="png", dpi=110)
    width, height = (figure.get_size_inches() * 110).astype(int).tolist()
    image = Summary.Image(
        width=width,
        height=height,
        colorspace=_RGBA,
        encoded_image_string=file.getvalue(),
    )
    return Summary.Value(tag=tag, image=image)
