"""A model as lm_eval asks it: texts in, log-likelihoods and texts out."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from ten_dist.data.tokenizer import TextTokenizer
from ten_dist.errors import ConfigurationError
from ten_dist.generation import Decoder, Request, Sampling
from ten_dist.generation.completion import Completion
from ten_dist.harness.scoring import Score, Scorer, TokenSequence

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance


_MOST_TOKENS = 256
"""Written for a task that does not say how many, as lm_eval's own models do."""


class HarnessModel(TemplateLM):
    """Answers the requests of lm_eval's tasks.

    A text is encoded as lm_eval's own models do it: a context and its continuation as one
    text, whose tokens beyond those of the context are scored. A text without a context,
    and each document of a rolling log-likelihood, starts at a separator. There is no
    limit to the length of either.

    Args:
        scorer: with the model, shared among the ranks. lm_eval sees one rank, which asks
            everything.
        tokenizer: of the model.
        decoder: with the model, for tasks that have it write.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: TextTokenizer,
        decoder: Decoder | None = None,
    ) -> None:
        super().__init__()
        self._scorer = scorer
        self._tokenizer = tokenizer
        self._decoder = decoder

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document, and that one starts at."""
        return self._tokenizer.separator_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Tokens of a text, to which none are ever added."""
        return self._tokenizer.encode([string])[0].tolist()

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        sequences = [
            TokenSequence([*context, *continuation], len(context))
            for _, context, continuation in requests
        ]
        scores = self._score(sequences, "log-likelihoods", disable_tqdm)
        return [(score.log_likelihood, score.greedy) for score in scores]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of each whole text, in nats."""
        sequences = [
            TokenSequence([self.prefix_token_id, *self.tok_encode(request.args[0])], 1)
            for request in requests
        ]
        scores = self._score(sequences, "rolling log-likelihoods", disable_tqdm)
        return [score.log_likelihood for score in scores]

    def _score(
        self, sequences: Sequence[TokenSequence], what: str, silent: bool
    ) -> list[Score]:
        with tqdm(total=len(sequences), desc=what, disable=silent) as bar:
            return self._scorer.score(sequences, bar.update)

    def generate_until(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        """What the model writes after each text, until a stop string or a separator.

        Raises:
            ConfigurationError: a task asks for a way of sampling that is not known.
        """
        decoder = self._decoder
        assert decoder is not None, "such tasks are refused where there is none"
        waiting = deque(enumerate(requests))
        running: list[tuple[int, Completion]] = []
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="texts", disable=disable_tqdm) as bar:
            while waiting or running:
                while waiting and len(running) < self._scorer.batch_size:
                    number, request = waiting.popleft()
                    text, options = request.args
                    completion = self._complete(decoder, text, options, number)
                    running.append((number, completion))
                decoder.step()
                for number, completion in running:
                    texts[number] += completion.take()
                going = [pair for pair in running if pair[1].finish_reason is None]
                bar.update(len(running) - len(going))
                running = going
        return texts

    def _complete(
        self, decoder: Decoder, text: str, options: dict[str, Any], number: int
    ) -> Completion:
        """Have the decoder take the request of lm_eval with this number."""
        known: dict[str, Any] = dict(normalize_gen_kwargs(options, _MOST_TOKENS))
        most, sampled = known.pop("max_gen_toks"), known.pop("do_sample")
        until = known.pop("until")
        if not sampled:
            known["temperature"] = 0.0
        try:
            sampling = Sampling.from_dict(known)
        except ConfigurationError as error:
            raise ConfigurationError(f"generation_kwargs of a task: {error}") from None
        request = Request(
            # A document starts where another has ended.
            prompt=self.tok_encode(text) or [self.eot_token_id],
            max_new_tokens=most,
            # Each repetition of a request draws anew.
            sampling=dataclasses.replace(sampling, seed=sampling.seed + number),
            stop_ids=(self.eot_token_id,),
        )
        return Completion(decoder, request, self._tokenizer.decode, until)
