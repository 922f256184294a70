"""The model of a run under the name `ten_dist`: `--model ten_dist --model_args run=RUN`."""

from __future__ import annotations

from typing import Any

from lm_eval.api.registry import register_model

from ten_dist.errors import ConfigurationError
from ten_dist.harness.language_model import HarnessModel
from ten_dist.harness.scoring import Scorer
from ten_dist.run_folder import RunFolder
from ten_dist.trained_model import TrainedModel, tokenizer_of

BATCH_SIZE = 32
"""Sequences at once, where nothing else is asked for."""


@register_model("ten_dist")
class RunModel(HarnessModel):
    """A checkpoint of a run.

    lm_eval gives what its command line says as keywords, in types of its own: `run=7` is a
    number.

    Args:
        run: folder of the run.
        checkpoint: its step, its folder, or best; by default the newest.
        batch_size: sequences at once; auto is the default of this class.
        device: the GPU if there is one, otherwise of no concern: lm_eval asks for one
            where nobody has.
        max_batch_size: of no concern, as auto searches for none.

    Raises:
        ConfigurationError: there is no such run or checkpoint, or a value is not valid.
    """

    def __init__(
        self,
        run: str | int,
        checkpoint: str | int | None = None,
        batch_size: str | int = "auto",
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        folder = RunFolder(str(run))
        named = None if checkpoint is None else str(checkpoint)
        self.model = TrainedModel.load(folder, named)
        computing = self.model.device
        if device == "cpu" and computing.type != "cpu":
            raise ConfigurationError(
                "--device cpu: the model computes on the GPU where there is one, hide it "
                "with an empty CUDA_VISIBLE_DEVICES"
            )
        network = self.model.network
        scorer = Scorer(
            self.model.autocast()(network.forward),
            network.config.vocab_size,
            computing,
            _sequences_at_once(batch_size),
        )
        super().__init__(scorer, tokenizer_of(folder), self.model.decoder())

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes of the model beside the results."""
        return {
            "checkpoint": str(self.model.checkpoint),
            "precision": self.model.precision,
        }


def _sequences_at_once(batch_size: str | int) -> int:
    text = str(batch_size)
    if text == "auto":
        return BATCH_SIZE
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ConfigurationError(
            f"--batch_size must be a whole number from 1, or auto, not {text!r}"
        )
    return int(text)
