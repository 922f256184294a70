"""Texts that a model writes in the course of its training, for TensorBoard."""

from __future__ import annotations

from pathlib import Path

import deepspeed

from ten_dist.config.training import TrainingConfig
from ten_dist.data import Manifest
from ten_dist.data.tokenizer import set_tokenizer
from ten_dist.engine.evaluating import evaluating
from ten_dist.engine.reporter import Reporter
from ten_dist.engine.resolution import ResolvedRun
from ten_dist.errors import ConfigurationError, DataError
from ten_dist.files import printable
from ten_dist.generation import Decoder, Request, Sampling
from ten_dist.inference.prompt_lines import STANDARD, check_prompts, read_prompts
from ten_dist.monitor.run_description import text_summary

_OPTION = "--sample_prompts"
_NEW_TOKENS = 100
_MOST_PROMPTS = 16


def load_sample_prompts(
    training: TrainingConfig, manifest: Manifest
) -> tuple[tuple[int, ...], ...]:
    """Token ids of the prompts of `--sample_prompts`; none without it.

    Args:
        training: options of the run.
        manifest: of data whose tokenizer is the run's.

    Raises:
        ConfigurationError: the file cannot be read, or has too many prompts.
        DataError: a line is no prompt.
    """
    place = training.sample_prompts
    if place is None:
        return ()
    if place == STANDARD or Path(place).exists() and not Path(place).is_file():
        raise ConfigurationError(
            f"{_OPTION} {printable(place)} is no file: a run may start many times"
        )
    check_prompts(place, _OPTION)
    tokenizer = set_tokenizer(manifest)
    prompts = []
    for where, fields in read_prompts(place):
        try:
            ids = tokenizer.encode([fields["prompt"]])[0].tolist()
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        # A document starts where another has ended.
        prompts.append(tuple(ids) or (tokenizer.separator_id,))
    if len(prompts) > _MOST_PROMPTS:
        raise ConfigurationError(
            f"{_OPTION} has {len(prompts)} prompts, and each delays training: "
            f"leave {_MOST_PROMPTS} at most"
        )
    return tuple(prompts)


class Samples:
    """Continues the prompts of a run at an interval and at its end. Every rank has one.

    Args:
        engine: of the model.
        run, reporter: of the training.
    """

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, run: ResolvedRun, reporter: Reporter
    ) -> None:
        self._engine = engine
        self._run = run
        self._reporter = reporter
        if run.sample_prompts:
            self._tokenizer = set_tokenizer(run.manifests()[0])

    def write_if_due(self, step: int) -> None:
        """After a step, continue the prompts if it is time; every rank must call this."""
        interval = self._run.training.analysis_interval
        due = interval and step % interval == 0 or step == self._run.schedule.steps
        if due and self._run.sample_prompts:
            for number, text in enumerate(self._texts(step), start=1):
                self._reporter.show(step, text_summary(f"samples/{number}", text))

    def _texts(self, step: int) -> list[str]:
        """Prompts and continuations, in Markdown."""
        # With a stop token, ranks whose arithmetic differs in the last bit could compute
        # unequal numbers of steps, and those of a sharded model wait for each other.
        requests = [
            Request(
                prompt=prompt,
                max_new_tokens=_NEW_TOKENS,
                sampling=Sampling(seed=self._run.training.seed),
            )
            for prompt in self._run.sample_prompts
        ]
        with evaluating(self._engine, self._run):
            decoder = Decoder(self._engine.module, compute=self._engine)
            results = [decoder.add(request) for request in requests]
            while len(decoder):
                self._reporter.progress("samples", step)
                decoder.step()
        separator, decode = self._tokenizer.separator_id, self._tokenizer.decode
        texts = []
        for result in results:
            ids = result.ids
            if separator in ids:
                ids = ids[: ids.index(separator)]
            prompt = list(result.request.prompt)
            shown, whole = decode(prompt), decode(prompt + ids)
            new = whole.removeprefix(shown)
            texts.append(f"prompt\n\n{_block(shown)}\n\ncontinuation\n\n{_block(new)}")
        return texts


def _block(text: str) -> str:
    """Markdown that shows a text as it is."""
    return "\n".join(f"    {line}" for line in text.split("\n"))
