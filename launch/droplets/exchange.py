"""What every request passes: dry runs, errors in words, and the API's clock.

A policy at the start of PyDo's pipeline, before the token is added to a request: what is
shown or raised here does not hold the token.
"""

from __future__ import annotations

import email.utils
import re
import textwrap
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from azure.core.exceptions import AzureError
from azure.core.pipeline import PipelineRequest, PipelineResponse
from azure.core.pipeline.policies import HTTPPolicy

from launch.droplets.errors import RATE_LIMITED, TOKEN_VARIABLES, ApiError, NotSent
from ten_dist.errors import ConfigurationError


class Exchange(HTTPPolicy):
    """The policy: no message holds `token`, and a dry run changes nothing."""

    def __init__(self, token: str, dry_run: bool) -> None:
        super().__init__()
        self._token, self._dry_run = token, dry_run
        self.clock_offset = 0.0
        """Seconds that the API's clock is ahead of this machine's."""

    def send(self, request: PipelineRequest) -> PipelineResponse:
        """Send a request and look at its answer.

        Raises:
            NotSent: it is a dry run.
            ApiError: there was no answer, or one that is no success.
            ConfigurationError: the token was refused.
        """
        sent = request.http_request
        what = f"{sent.method} {urlsplit(sent.url).path}"
        if self._dry_run and sent.method != "GET":
            raise NotSent(f"{what} {sent.content or ''}".rstrip())
        try:
            response = self.next.send(request)
        except AzureError as error:
            reason = self._words(error.message) or type(error).__name__
            raise ApiError(f"{what}: no answer ({reason})") from None
        answer = response.http_response
        try:
            content = answer.json() if answer.content else {}
        except ValueError:
            content = None
        status, headers = answer.status_code, answer.headers
        date = email.utils.parsedate_tz(headers.get("Date", ""))
        if date is not None:
            self.clock_offset = email.utils.mktime_tz(date) - time.time()
        if 200 <= status < 300:
            if content is None:
                raise ApiError(f"{what}: no answer (what came is not JSON)")
            return response
        message = content.get("message") if isinstance(content, dict) else None
        reason = self._words(message or "no reason given")
        if status == 401:
            raise ConfigurationError(
                f"the API refuses the token ({reason}): set {TOKEN_VARIABLES[0]} to one "
                "that is valid"
            )
        wait = self._wait_seconds(status, headers)
        raise ApiError(f"{what}: status {status} ({reason})", status, wait)

    def _wait_seconds(self, status: int, headers: Mapping[str, str]) -> float | None:
        """Seconds after which the API wants to be asked again, where it says so."""
        after = headers.get("Retry-After", "")
        if after.isdigit():
            return float(after)
        reset = headers.get("ratelimit-reset", "")
        if status == RATE_LIMITED and reset.isdigit():
            return max(0.0, float(reset) - time.time() - self.clock_offset)
        return None

    def _words(self, text: object) -> str:
        """Text from elsewhere on one line, without the token, should it hold it."""
        # Representations of connections, such as <urllib3... at 0x7f...>.
        plain = re.sub(r"<[^<>]*>:? ?", "", str(text))
        return textwrap.shorten(plain.replace(self._token, "..."), 300)
