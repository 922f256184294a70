"""The content of a run's `config.json`: everything that was resolved before its first step."""

from __future__ import annotations

import dataclasses
from typing import Any

from ten_dist.config.model import TemporalEigenstateConfig
from ten_dist.config.options import Options
from ten_dist.config.training import RUN_FORMAT, TrainingConfig
from ten_dist.errors import ConfigurationError
from ten_dist.schedule import Schedule

BEFORE_OPTIONS: dict[str, Any] = {
    "ffn_gate": False,
    "optimizer": "adamw",
    "schedule": "cosine",
    "decay_fraction": None,
}
"""What runs did before there was an option for it, by its name in their identity."""
_VERSION = 2


@dataclasses.dataclass(frozen=True)
class DataRecord:
    """Which tokens a run reads."""

    train: dict[str, str]
    """Where the token sets lie, by source of the mixture; of a single set under ""."""
    validation: dict[str, str]
    """The same of held-out sets; empty where there are none."""
    shares: dict[str, float] | None
    """Shares of the rows by source, None without a mixture."""
    fingerprint: str
    tokenizer_sha256: str
    separator_id: int


@dataclasses.dataclass(frozen=True)
class Origin:
    """Whose weights a run began with, where `--init_from` has given them."""

    path: str
    """What the option named, absolute."""
    step: int | None
    """Steps that its checkpoint had done; None of an exported model."""
    digest: str
    """sha256 over names, sizes and checksums of the files of weights."""
    embedding_rows: int | None = None
    """Tokens that kept their embedding, where the tokenizer was another."""


@dataclasses.dataclass(frozen=True)
class Extension:
    """That a run was given another length, mostly a greater one with `--extend`."""

    step: int
    """Steps it had done: later ones have the learning rates of the new length."""
    steps_before: int
    """Its length until then."""


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run as it was resolved."""

    model: TemporalEigenstateConfig
    training: TrainingConfig
    schedule: Schedule
    deepspeed: dict[str, Any]
    data: DataRecord
    identity: dict[str, Any]
    """What must be the same for the run to go on as the same run, by option name."""
    versions: dict[str, str]
    """Of Python and of the packages that decide a run's numbers."""
    attempts: int = 1
    """How often the run was started, going back to a checkpoint included."""
    origin: Origin | None = None
    """What it began with; None of a run that began anew or with `--resume PATH`."""
    extensions: tuple[Extension, ...] = ()
    """How it came to its length, oldest first."""

    def common_steps(self, schedule: Schedule) -> int:
        """Steps, from the first on, that had the learning rates of another schedule.

        A run that was extended had those of each of its lengths up to that step.
        """
        common = self.schedule.common_steps(schedule)
        for length in self.extensions:
            then = dataclasses.replace(self.schedule, steps=length.steps_before)
            had = then.common_steps(schedule)
            common = min(common, had) if had < length.step else common
        return common

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "format": RUN_FORMAT,
            "version": _VERSION,
            **dataclasses.asdict(self),
            "model": self.model.to_dict(),
            "training": self.training.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Any) -> RunRecord:
        """Build from what :meth:`to_dict` gave.

        Raises:
            ConfigurationError: it is something else, or of another version.
        """
        if not isinstance(values, dict) or values.get("format") != RUN_FORMAT:
            raise ConfigurationError("is another's")
        if values.get("version") != _VERSION:
            raise ConfigurationError(
                f"is of version {values.get('version')}, not {_VERSION}: use the ten_dist "
                "that wrote it, or go on in another --output_dir with --resume CHECKPOINT"
            )
        try:
            # Records of earlier releases lack what has a default.
            fields = {
                field.name: values[field.name]
                for field in dataclasses.fields(cls)
                if field.default is dataclasses.MISSING or field.name in values
            }
            fields["model"] = TemporalEigenstateConfig.from_dict(
                with_earlier_ways(TemporalEigenstateConfig, fields["model"])
            )
            fields["training"] = TrainingConfig.from_dict(
                with_earlier_ways(TrainingConfig, fields["training"])
            )
            fields["schedule"] = Schedule(**fields["schedule"])
            fields["identity"] = {**BEFORE_OPTIONS, **fields["identity"]}
            fields["data"] = DataRecord(**fields["data"])
            if fields.get("origin") is not None:
                fields["origin"] = Origin(**fields["origin"])
            extensions = fields.get("extensions", ())
            fields["extensions"] = tuple(Extension(**e) for e in extensions)
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise ConfigurationError(f"is incomplete: {error!r}") from None


def with_earlier_ways(options: type[Options], values: dict[str, Any]) -> dict[str, Any]:
    """Recorded options with what was done before there was an option for it."""
    names = {field.name for field in dataclasses.fields(options)}
    earlier = {n: value for n, value in BEFORE_OPTIONS.items() if n in names}
    return earlier | values
