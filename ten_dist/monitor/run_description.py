"""What TensorBoard knows of a run besides its curves: options, and what to look at first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.hparams import summary_v2 as hparams
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.util.tensor_util import make_tensor_proto

from ten_dist.files import printable
from ten_dist.run_record import RunRecord

_COMPARED = ("validation/loss", "train/ce_loss", "speed/tokens_per_second")
"""What the table of runs has of each."""
_LAYOUT: dict[str, dict[str, tuple[str, ...]]] = {
    "learning": {
        "loss": ("train/ce_loss", "validation/loss"),
        "energy": ("train/energy_raw",),
        "gradient norm": ("train/gradient_norm",),
        "learning rate": ("train/learning_rate",),
    },
    "speed": {
        "tokens a second": ("speed/tokens_per_second",),
        "utilization": ("speed/mfu",),
        "shares of a step": ("speed/data_share", "speed/communication_share"),
        "memory": ("speed/memory_bytes", "speed/memory_reserved_bytes"),
    },
    "health and cost": {
        "steps left out": ("health/skipped_steps", "health/overflowed_steps"),
        "seconds of the slowest rank": (
            "speed/slowest_rank_seconds",
            "speed/median_rank_seconds",
        ),
        "dollars": ("cost/dollars", "cost/estimated_dollars"),
    },
}
"""Of the page CUSTOM SCALARS: by category, the curves of each chart."""


def describe(record: RunRecord, name: str) -> list[Summary]:
    """Options as text and for the table of runs, and the layout of the most important curves.

    Args:
        record: of the run.
        name: that the table gives the run.
    """
    options = dict(_options(record))
    metrics = [hparams.Metric(tag) for tag in _COMPARED]
    # Lists of values would offer to filter by what no other run has.
    columns = [hparams.HParam(option) for option in options]
    return [
        hparams.hparams_config_pb(columns, metrics),
        hparams.hparams_pb(options, trial_id=printable(name)),
        text_summary("options", _table(options)),
        _layout(),
    ]


def _options(record: RunRecord) -> Iterator[tuple[str, Any]]:
    """Options by name, as numbers, truth values or text; those that are not set left out."""
    content = record.to_dict()
    for group in ("model", "training"):
        for name, value in content[group].items():
            if value is None:
                continue
            # Names of folders may have bytes that are no text.
            plain = isinstance(value, (bool, int, float))
            yield f"{group}/{name}", value if plain else printable(str(value))


def _table(options: dict[str, Any]) -> str:
    """In Markdown, which TensorBoard shows."""
    rows = [
        f"| {name} | {str(value).replace('|', chr(92) + '|')} |"
        for name, value in options.items()
    ]
    return "\n".join(["| option | value |", "|---|---|", *rows])


def text_summary(tag: str, text: str) -> Summary:
    """Text in Markdown."""
    metadata = text_metadata.create_summary_metadata(tag, "")
    tensor = make_tensor_proto(text.encode())
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=tensor)])


def _layout() -> Summary:
    layout = layout_pb2.Layout(
        category=[
            layout_pb2.Category(
                title=title,
                chart=[
                    layout_pb2.Chart(
                        title=chart,
                        multiline=layout_pb2.MultilineChartContent(
                            tag=[f"^{tag}$" for tag in tags]
                        ),
                    )
                    for chart, tags in charts.items()
                ],
            )
            for title, charts in _LAYOUT.items()
        ]
    )
    value = Summary.Value(
        tag=layout_metadata.CONFIG_SUMMARY_TAG,
        metadata=layout_metadata.create_summary_metadata(),
        tensor=make_tensor_proto(layout.SerializeToString()),
    )
    return Summary(value=[value])
