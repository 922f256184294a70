"""The DigitalOcean API through PyDo: the token, pages, retries and dry runs."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ten_dist.arguments import LONGEST_SECONDS
from ten_dist.errors import ConfigurationError, TrainingError
from ten_dist.monitor.console import say, warn

_Result = TypeVar("_Result")
TOKEN_VARIABLES = ("DIGITALOCEAN_TOKEN", "DIGITALOCEAN_ACCESS_TOKEN")
ENDPOINT_VARIABLE = "DIGITALOCEAN_API_URL"
_ENDPOINT = "https://api.digitalocean.com"
INSTALL_COMMAND = "pip install 'ten_dist[droplets]'"
_PER_PAGE = 200
_LONGEST_WAIT_SECONDS = 60.0
# That the API may ask for.
_LONGEST_ASKED_SECONDS = 900.0
# Statuses below 500 that the same request may not get again: timeout, too early, too many.
_PASSING_STATUSES = (408, 425, 429)
RATE_LIMITED = 429


@dataclasses.dataclass(frozen=True, kw_only=True)
class ApiConfig:
    """How the API is reached; each field is an option of `ten-dist droplets`."""

    endpoint: str | None = None
    """URL of the API, by default that in DIGITALOCEAN_API_URL or
    https://api.digitalocean.com; AMD's developer cloud has another."""
    attempts: int = 6
    """Attempts at a request that fails for reasons that pass, before giving up."""
    retry_wait: float = 1.0
    """Seconds before the second attempt, doubled each time up to a minute. Where the
    API names a time, that counts."""
    request_timeout: float = 60.0
    """Seconds without an answer after which a request has failed."""
    dry_run: bool = False
    """Show every request that would change something, and make none of them."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ConfigurationError(
                f"--attempts must be 1 or more, not {self.attempts}"
            )
        for name in ("retry_wait", "request_timeout"):
            if not 0 < getattr(self, name) <= LONGEST_SECONDS:
                raise ConfigurationError(
                    f"--{name} must be more than 0 and at most {LONGEST_SECONDS:,.0f}, "
                    f"not {getattr(self, name)}"
                )


class ApiError(TrainingError):
    """A request that was refused, or that got no usable answer."""

    def __init__(
        self, message: str, status: int | None = None, wait: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status; None where there was no answer."""
        self.wait = wait
        """Seconds after which the API wants the next attempt, where it says so."""

    @property
    def passing(self) -> bool:
        """Whether the same request may succeed later."""
        return (
            self.status is None
            or self.status >= 500
            or self.status in _PASSING_STATUSES
        )

    @property
    def unknown_outcome(self) -> bool:
        """Whether the API may have done what was asked."""
        return self.passing and self.status != RATE_LIMITED


class NotSent(Exception):
    """A request that a dry run shows instead of sending it; the message is the request."""


class Api:
    """A connection to the API, until :meth:`close`.

    Args:
        config: how it is reached.
        environment: where the token is read from.

    Raises:
        ConfigurationError: there is no token or PyDo, or the endpoint is no URL.
    """

    def __init__(
        self, config: ApiConfig, environment: Mapping[str, str] = os.environ
    ) -> None:
        try:
            import tenacity  # noqa: F401 - found missing now rather than when needed
            from azure.core.credentials import AzureKeyCredential
            from azure.core.pipeline.policies import AzureKeyCredentialPolicy
            from pydo import Client

            from launch.droplets.exchange import Exchange
        except ImportError as error:
            raise ConfigurationError(
                f"a package is not installed that `ten-dist droplets` needs ({error}): "
                f"{INSTALL_COMMAND}"
            ) from None
        token = _token(environment)
        self.config = config
        self._exchange = Exchange(token, config.dry_run)
        self.client = Client(
            token=token,
            endpoint=_checked_endpoint(
                config.endpoint or environment.get(ENDPOINT_VARIABLE) or _ENDPOINT
            ),
            per_call_policies=[self._exchange],
            # PyDo's own sends the token over https only, also to this machine; that the
            # endpoint is https or this machine has been checked.
            authentication_policy=AzureKeyCredentialPolicy(
                AzureKeyCredential(token), "Authorization", prefix="Bearer"
            ),
            # Attempts are counted and announced here; and a redirected request would
            # take the token to another server.
            retry_total=0,
            permit_redirects=False,
            connection_timeout=config.request_timeout,
            read_timeout=config.request_timeout,
            timeout=config.request_timeout,
        )

    def close(self) -> None:
        """Close its connections."""
        self.client.close()

    def now(self) -> float:
        """Seconds since 1970 by the API's clock, which expiries are told by.

        Before the first answer, by that of this machine.
        """
        return time.time() + self._exchange.clock_offset

    def read(self, call: Callable[..., _Result], **arguments: Any) -> _Result:
        """Make a request that can be repeated, again and again while it fails passingly.

        Args:
            call: PyDo's method.
            arguments: of the method.

        Raises:
            ApiError: it was refused, or failed in all attempts.
            ConfigurationError: the token was refused.
        """
        return self._insist(lambda error: error.passing, call, arguments)

    def pages(
        self, call: Callable[..., dict[str, Any]], key: str, **filters: Any
    ) -> list[dict[str, Any]]:
        """All objects of a listing, from all of its pages.

        Args:
            call: PyDo's method.
            key: of the objects in its answers.
            filters: arguments of the method.

        Raises:
            ApiError, ConfigurationError: as :meth:`read`.
        """
        for _ in range(3):
            found: dict[Any, dict[str, Any]] = {}
            number, last, total = 1, False, 0
            while not last:
                answer = self.read(call, per_page=_PER_PAGE, page=number, **filters)
                items = answer.get(key) or []
                found |= {item.get("id", item.get("slug")): item for item in items}
                links = (answer.get("links") or {}).get("pages") or {}
                last = not items or "next" not in links
                total = (answer.get("meta") or {}).get("total") or 0
                number += 1
            # What goes while pages are read moves others to pages that were read already.
            if len(found) >= total:
                break
        return list(found.values())

    def change(self, call: Callable[..., _Result], **arguments: Any) -> _Result | None:
        """Make a request that changes something, and that may be repeated.

        Args:
            call: PyDo's method.
            arguments: of the method.

        Returns:
            Its answer; None for a dry run, which shows it and does not send it.

        Raises:
            ApiError, ConfigurationError: as :meth:`read`.
        """
        return self._changed(lambda error: error.passing, call, arguments)

    def change_once(
        self, call: Callable[..., _Result], **arguments: Any
    ) -> _Result | None:
        """As :meth:`change`, for a request that must not be carried out twice.

        It is repeated only after the API has said that it did nothing.

        Raises:
            ApiError: also where it is not known whether it was carried out.
            ConfigurationError: as :meth:`read`.
        """
        return self._changed(
            lambda error: error.passing and not error.unknown_outcome, call, arguments
        )

    def ensure(
        self,
        find: Callable[[], dict[str, Any] | None],
        call: Callable[..., dict[str, Any]],
        key: str,
        body: dict[str, Any],
        placeholder: dict[str, Any],
    ) -> dict[str, Any]:
        """Find something or make it, once also where the answer of making it is lost.

        Args:
            find: looks for it.
            call: PyDo's method that makes it.
            key: of what was made in the answer.
            body: argument of the method.
            placeholder: what a dry run has in place of what it does not make.

        Raises:
            ApiError, ConfigurationError: as :meth:`change_once`.
        """
        attempt = 0
        while True:
            found = find()
            if found is not None:
                return found
            attempt += 1
            try:
                answer = self.change_once(call, body=body)
            except ApiError as error:
                if not error.unknown_outcome or self.is_last(attempt, error):
                    raise
                self.pause(attempt, error)
            else:
                return placeholder if answer is None else answer[key]

    def is_last(self, attempt: int, error: ApiError) -> bool:
        """Whether there is no attempt after this one, which has failed."""
        return (
            attempt >= self.config.attempts
            or (error.wait or 0) > _LONGEST_ASKED_SECONDS
        )

    def pause(self, attempt: int, error: ApiError) -> None:
        """Say that an attempt has failed, and wait before the next."""
        seconds = self._wait_seconds(attempt, error)
        warn(_announcement(error, seconds, attempt, self.config.attempts))
        time.sleep(seconds)

    def _changed(
        self,
        again: Callable[[ApiError], bool],
        call: Callable[..., _Result],
        arguments: dict[str, Any],
    ) -> _Result | None:
        try:
            return self._insist(again, call, arguments)
        except NotSent as shown:
            say(f"would {shown}")
            return None

    def _insist(
        self,
        again: Callable[[ApiError], bool],
        call: Callable[..., _Result],
        arguments: dict[str, Any],
    ) -> _Result:
        from tenacity import (
            RetryCallState,
            Retrying,
            retry_if_exception,
        )

        def give_up(state: RetryCallState) -> bool:
            return self.is_last(state.attempt_number, state.outcome.exception())

        def repeatable(error: BaseException) -> bool:
            return isinstance(error, ApiError) and again(error)

        def wait(state: RetryCallState) -> float:
            return self._wait_seconds(state.attempt_number, state.outcome.exception())

        def announce(state: RetryCallState) -> None:
            warn(
                _announcement(
                    state.outcome.exception(),
                    state.next_action.sleep,
                    state.attempt_number,
                    self.config.attempts,
                )
            )

        return Retrying(
            stop=give_up,
            wait=wait,
            retry=retry_if_exception(repeatable),
            before_sleep=announce,
            reraise=True,
        )(call, **arguments)

    def _wait_seconds(self, attempt: int, error: ApiError) -> float:
        doubled = self.config.retry_wait * 2 ** min(attempt - 1, 30)
        return max(min(doubled, _LONGEST_WAIT_SECONDS), error.wait or 0)


def _token(environment: Mapping[str, str]) -> str:
    """The token of the environment.

    Raises:
        ConfigurationError: there is none, or it is none.
    """
    for name in TOKEN_VARIABLES:
        token = environment.get(name, "")
        if not token:
            continue
        if not re.fullmatch(r"[\x21-\x7e]+", token):
            # A library would quote the header in its complaint.
            raise ConfigurationError(
                f"{name} holds spaces, line ends or other characters that no token "
                "has: set it again"
            )
        return token
    raise ConfigurationError(
        f"there is no token: set {TOKEN_VARIABLES[0]} to a personal access token of the "
        "DigitalOcean account"
    )


def _checked_endpoint(endpoint: str) -> str:
    """The URL of an API to which a token may be sent.

    Raises:
        ConfigurationError: it is no such URL.
    """
    try:
        parts = urlsplit(endpoint)
        host = parts.hostname or ""
        local = host == "localhost" or (
            host[:1].isdigit() and ipaddress.ip_address(host).is_loopback
        )
    except ValueError:
        parts, local = urlsplit(""), False
    if not parts.netloc or not (
        parts.scheme == "https" or (parts.scheme == "http" and local)
    ):
        raise ConfigurationError(
            "--endpoint must be a URL such as https://api.digitalocean.com: the token is "
            "sent there, so it has to be https"
        )
    if "@" in parts.netloc or parts.query:
        raise ConfigurationError(
            "--endpoint must have no user, password or query in it: the token comes from "
            "the environment"
        )
    return endpoint.rstrip("/")


def _announcement(
    error: BaseException, seconds: float, attempt: int, attempts: int
) -> str:
    return f"{error}; trying again in {seconds:.1f} s (attempt {attempt} of {attempts})"
