"""The DigitalOcean API through PyDo: the token, pages, retries and dry runs."""

from __future__ import annotations

import dataclasses
import ipaddress
import math
import os
import re
import time
from collections.abc import Callable, Container, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar
from urllib.parse import urlsplit

from launch.droplets.errors import RATE_LIMITED, TOKEN_VARIABLES, ApiError, NotSent
from ten_dist.arguments import LONGEST_SECONDS
from ten_dist.config.options import Options, at_least, metavar, more_than
from ten_dist.console import say, warn
from ten_dist.errors import ConfigurationError

if TYPE_CHECKING:
    from tenacity import RetryCallState, Retrying

_Result = TypeVar("_Result")
ENDPOINT_VARIABLE = "DIGITALOCEAN_API_URL"
_ENDPOINT = "https://api.digitalocean.com"
INSTALL_COMMAND = "pip install 'ten_dist[droplets]'"
_PER_PAGE = 200
_LONGEST_WAIT_SECONDS = 60.0
# That the API may ask for.
_LONGEST_ASKED_SECONDS = 900.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ApiConfig(Options):
    """How the API is reached; each field is an option of `ten-dist droplets`."""

    GROUP: ClassVar[str] = "API"

    endpoint: Annotated[str | None, metavar("URL")] = None
    """URL of the API, by default that in DIGITALOCEAN_API_URL or
    https://api.digitalocean.com; AMD's developer cloud has another."""
    attempts: Annotated[int, at_least(1)] = 6
    """Attempts at a request that fails for reasons that pass, before giving up."""
    retry_wait: Annotated[float, more_than(0, most=LONGEST_SECONDS)] = 1.0
    """Seconds before the second attempt, doubled each time up to a minute. Where the
    API names a time, that counts."""
    request_timeout: Annotated[float, more_than(0, most=LONGEST_SECONDS)] = 60.0
    """Seconds without an answer after which a request has failed."""
    dry_run: bool = False
    """Show every request that would change something, and make none of them."""


class Api:
    """A connection to the API, until :meth:`close`.

    Raises:
        ConfigurationError: there is no token in `environment`, no PyDo, or the endpoint is
            no URL; methods raise it for a token that is refused.
        ApiError: of methods, a request was refused or has failed in all attempts.
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
            timeout=math.ceil(config.request_timeout),
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
        """Make a request that can be repeated: call a method of PyDo's."""
        return self._attempts(lambda error: error.passing)(call, **arguments)

    def pages(
        self, call: Callable[..., Mapping[str, Any]], key: str, **filters: Any
    ) -> list[dict[str, Any]]:
        """All objects of a listing, which stand under `key` in the answers of all pages."""
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

    def change(
        self,
        call: Callable[..., _Result],
        *,
        once: bool = False,
        done: Container[int | None] = (),
        **arguments: Any,
    ) -> _Result | None:
        """Make a request that changes something: call a method of PyDo's.

        Args:
            call: the method.
            once: whether it must not be carried out twice. It is then repeated only after
                the API has said that it did nothing, and a failure may be one of which it
                is not known whether it was carried out.
            done: statuses that say that an earlier attempt, or somebody else, did it.
            arguments: of the method.

        Returns:
            Its answer; None where it is done already, and for a dry run, which shows the
            request and does not send it.
        """

        def again(error: ApiError) -> bool:
            return error.status == RATE_LIMITED if once else error.passing

        try:
            return self._attempts(again)(call, **arguments)
        except NotSent as shown:
            say(f"would {shown}")
        except ApiError as error:
            if error.status not in done:
                raise
        return None

    def ensure(
        self,
        find: Callable[[], dict[str, Any] | None],
        call: Callable[..., Any],
        key: str,
        body: dict[str, Any],
        placeholder: dict[str, Any],
    ) -> dict[str, Any]:
        """Find something or make it, once also where the answer of making it is lost.

        PyDo's method `call` makes it from `body`, and its answer has it under `key`. A dry
        run has `placeholder` in place of what it does not make.
        """
        for attempt in self.attempts_at_making():
            found = find()
            if found is not None:
                return found
            with attempt:
                answer = self.change(call, once=True, body=body)
                return placeholder if answer is None else answer[key]
        raise AssertionError("tenacity raises what the last attempt did")

    def attempts_at_making(self) -> Retrying:
        """Attempts at a request that must not be carried out twice, to be iterated over.

        Look in each of them at what there is before the `with` block that makes the
        request: it is left for the next attempt where the outcome is not known.
        """
        return self._attempts(lambda error: error.unknown_outcome)

    def _attempts(self, again: Callable[[ApiError], bool]) -> Retrying:
        """Attempts, announced and with a wait between them, while `again` allows one."""
        from tenacity import Retrying, retry_if_exception, wait_exponential

        config = self.config
        doubled = wait_exponential(config.retry_wait, _LONGEST_WAIT_SECONDS)

        def failure(state: RetryCallState) -> ApiError:
            assert state.outcome is not None
            error = state.outcome.exception()
            assert isinstance(error, ApiError)
            return error

        def asked(state: RetryCallState) -> float:
            return failure(state).wait or 0.0

        def announce(state: RetryCallState) -> None:
            warn(
                f"{failure(state)}; trying again in {state.upcoming_sleep:.1f} s "
                f"(attempt {state.attempt_number} of {config.attempts})"
            )

        return Retrying(
            stop=lambda state: (
                state.attempt_number >= config.attempts
                or asked(state) > _LONGEST_ASKED_SECONDS
            ),
            wait=lambda state: max(doubled(state), asked(state)),
            retry=retry_if_exception(lambda e: isinstance(e, ApiError) and again(e)),
            before_sleep=announce,
            reraise=True,
        )


def _token(environment: Mapping[str, str]) -> str:
    """The token of the environment; ConfigurationError without one that can be sent."""
    for name in TOKEN_VARIABLES:
        token = environment.get(name, "")
        if re.fullmatch(r"[\x21-\x7e]+", token):
            return token
        if token:
            # A library would quote the header in its complaint.
            raise ConfigurationError(
                f"{name} holds spaces, line ends or other characters that no token "
                "has: set it again"
            )
    raise ConfigurationError(
        f"there is no token: set {TOKEN_VARIABLES[0]} to a personal access token of the "
        "DigitalOcean account"
    )


def _checked_endpoint(endpoint: str) -> str:
    """The URL of an API, if a token may be sent there; else ConfigurationError."""
    try:
        parts = urlsplit(endpoint)
        host = parts.hostname or ""
        local = host == "localhost" or (
            host[:1].isdigit() and ipaddress.ip_address(host).is_loopback
        )
    except ValueError:
        parts, local = urlsplit(""), False
    schemes = ("https", "http") if local else ("https",)
    if not parts.netloc or parts.scheme not in schemes:
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
