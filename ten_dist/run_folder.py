"""The folder of a run (docs/run_folder.md): where everything lies, and reading it back.

```
OUTPUT_DIR/
  config.json      everything that was resolved
  tokenizer.json   the tokenizer of the data, so that the run can be used without it
  metrics.jsonl    tensorboard/    ledger/
  anomalies.jsonl  steps whose loss or gradient was wrong, and their rows, if there were any
  checkpoints/     step_00000500/ ... and `latest`, the name of the newest complete one
  model.safetensors  weights of the end, float32, in one file
  hang/            where each rank is, and its stacks if it hung; gone after an orderly end
  profile/         traces of --profile_steps with tables; what lay in memory that ran out
  trackers/        with --tracker, what it was sent, and what its package printed
  supervisor.jsonl every start by `ten-dist supervise` or `ten-dist launch`
  logs/            start_001/ ... with what every rank printed, by `ten-dist launch`
  COMPLETED        final metrics, written last
```
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ten_dist.checkpoint import damage, read_record
from ten_dist.checkpoint.record import RECORD_NAME
from ten_dist.config.training import SavingOptions
from ten_dist.errors import ConfigurationError
from ten_dist.files import unwritable, write_json
from ten_dist.run_record import RunRecord


class RunFolder:
    """Paths of a run and what is written in its JSON files."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.json"
        self.tokenizer_file = self.path / "tokenizer.json"
        self.chat_template_file = self.path / "chat_template.jinja"
        self.metrics_file = self.path / "metrics.jsonl"
        self.anomalies_file = self.path / "anomalies.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.ledger = self.path / "ledger"
        self.checkpoints = self.path / "checkpoints"
        self.weights_file = self.path / "model.safetensors"
        self.hang = self.path / "hang"
        self.supervisor_log = self.path / "supervisor.jsonl"
        self.logs = self.path / "logs"
        self.profile = self.path / "profile"
        self.completed_file = self.path / "COMPLETED"

    def exists(self) -> bool:
        """Whether a run was started here."""
        return self.config_file.is_file()

    def check_writable(self) -> None:
        """Find out, without writing, whether the folder can be made and written to.

        Raises:
            ConfigurationError: it cannot, or there are other things in it.
        """
        reason = unwritable(self.path)
        if reason is not None:
            raise ConfigurationError(f"--output_dir {self.path} {reason}")
        # What a start leaves that was killed before it had written config.json.
        own = {
            self.checkpoints,
            self.config_file.with_name("config.json.tmp"),
            self.hang,
            self.supervisor_log,
            self.logs,
        }
        if (
            self.path.exists()
            and not self.exists()
            and not set(self.path.iterdir()) <= own
        ):
            raise ConfigurationError(
                f"--output_dir {self.path} holds files but no run: choose an empty or "
                "new folder"
            )

    def create(self) -> None:
        """Make the folder.

        Raises:
            ConfigurationError: the file system refuses.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"--output_dir {self.path} cannot be made: {error.strerror}"
            ) from None

    def read(self) -> RunRecord:
        """The content of `config.json`.

        Raises:
            ConfigurationError: there is no run here, or its configuration is damaged.
        """
        if not self.exists():
            raise ConfigurationError(
                f"{self.path} is not the folder of a run: it has no config.json"
            )
        try:
            values = json.loads(self.config_file.read_text(encoding="utf-8"))
            return RunRecord.from_dict(values)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"{self.path} is not the folder of a run to go on with: its "
                f"config.json {error}"
            ) from None
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"{self.config_file} cannot be read: {error}"
            ) from None

    def write(self, record: RunRecord) -> None:
        """Write `config.json`. Raises ``OSError``."""
        write_json(self.config_file, record.to_dict())

    def begin_attempt(self) -> int:
        """Count one more start of the run; returns its number, from 1."""
        record = self.read()
        attempts = record.attempts + 1
        self.write(dataclasses.replace(record, attempts=attempts))
        return attempts

    def completed(self) -> dict[str, Any] | None:
        """Final metrics of a run that reached its end, or None."""
        if not self.completed_file.is_file():
            return None
        try:
            return json.loads(self.completed_file.read_text(encoding="utf-8"))
        except ValueError:
            raise ConfigurationError(
                f"{self.completed_file} is damaged: remove it, and the run makes it anew"
            ) from None

    def newest_checkpoint(
        self, report: Callable[[str], None] = lambda damage: None
    ) -> Path | None:
        """The newest complete checkpoint, or None.

        Args:
            report: told what is wrong with each one that is passed over.
        """
        for path in self.all_checkpoints():
            if (found := damage(path)) is None:
                return path
            report(found)
        return None

    def all_checkpoints(self) -> list[Path]:
        """Checkpoints by their names, newest first, complete or not."""
        return sorted(self.checkpoints.glob(f"step_{'[0-9]' * 8}"), reverse=True)

    def usable_checkpoint(self) -> Path:
        """The newest complete checkpoint.

        Raises:
            ConfigurationError: the run has none.
        """
        path = self.newest_checkpoint()
        if path is None:
            raise ConfigurationError(
                f"{self.path} has no complete checkpoint yet: let the run reach its "
                "first one (--checkpoint_interval)"
            )
        return path

    def chosen_checkpoint(self, name: str | None) -> Path:
        """The checkpoint that an option names.

        Args:
            name: its step, its folder, "best" for the one with the lowest held-out loss, or
                None for the newest.

        Raises:
            ConfigurationError: there is none, it is damaged, or it is of another run.
        """
        if name is None:
            return self.usable_checkpoint()
        if name == "best":
            return self._best_checkpoint()
        path = Path(name)
        if name.isdecimal() and name.isascii() and len(name) <= 8:
            path = self.checkpoints / f"step_{int(name):08d}"
        if not (path / RECORD_NAME).is_file():
            there = [str(checkpoint_step(p)) for p in reversed(self.all_checkpoints())]
            raise ConfigurationError(
                f"--checkpoint {name} is not there: the run has those of the steps "
                f"{', '.join(there) or '(none)'}"
            )
        found = damage(path)
        if found is not None:
            raise ConfigurationError(f"--checkpoint {name} cannot be used: {found}")
        ours = self.read().identity
        differ = [
            f"{option} is {value} there and {ours.get(option)} in {self.path}"
            for option, value in read_record(path).state_identity.items()
            if value != ours.get(option)
        ]
        if differ:
            raise ConfigurationError(
                f"--checkpoint {name} is of another run: {', '.join(differ)}: name the "
                "folder of that run"
            )
        return path

    def _best_checkpoint(self) -> Path:
        losses = {}
        for path in self.all_checkpoints():
            if damage(path) is None:
                state = read_record(path).state
                loss = state.metrics.get("val_loss", math.nan)
                # Else it is that of an earlier step.
                validated = state.metrics.get("validated_step") == state.step
                if validated and math.isfinite(loss):
                    losses[path] = loss
        if not losses:
            raise ConfigurationError(
                "--checkpoint best needs a checkpoint of a step that was validated: the run "
                "has none (--checkpoint_interval a multiple of --eval_interval)"
            )
        return min(losses, key=losses.__getitem__)

    def delete_old_checkpoints(self, options: SavingOptions) -> None:
        """Delete all checkpoints but those that the options keep."""
        keep, every = options.keep_checkpoints, options.keep_checkpoint_every
        for path in self.all_checkpoints()[keep:] if keep is not None else []:
            if every and checkpoint_step(path) % every == 0:
                continue
            # First out of sight: a deletion that is cut off must not leave half of one.
            doomed = path.with_name(path.name + ".partial")
            os.rename(path, doomed)
            shutil.rmtree(doomed)

    def delete_partial_checkpoints(self) -> None:
        """Delete what killed starts of the run have left half written or half deleted."""
        for path in self.checkpoints.glob("step_*.partial"):
            shutil.rmtree(path)


def checkpoint_step(path: Path) -> int:
    """Steps that a checkpoint has done, by its name."""
    return int(path.name.removeprefix("step_"))
