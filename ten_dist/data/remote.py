"""Files behind a URL: fetched with fsspec, checked, and tried again when that fails.

Errors are ``OSError`` with a ``strerror`` in words, as from local files, so that what
reads both words them once. No message holds the query of a URL or a password.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import os
import re
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from ten_dist.console import warn
from ten_dist.data.cache import ShardCache
from ten_dist.errors import DataError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")
INSTALL_COMMAND = "pip install 'ten_dist[remote]'"
_LONGEST_WAIT_SECONDS = 60.0
# Statuses below 500 that the same request may not get again: timeout, too early, too many.
_PASSING_STATUSES = (408, 425, 429)
_LASTING_ERRORS = (ValueError, TypeError, NotImplementedError, ImportError)
# Of botocore, which is there for S3 only: named rather than imported.
_LASTING_NAMES = ("ParamValidationError", "NoRegionError")
_CREDENTIAL_ERRORS = ("NoCredentialsError", "PartialCredentialsError")


@dataclasses.dataclass(frozen=True)
class RemoteAccess:
    """How files behind a URL are fetched."""

    cache: ShardCache | None = None
    """Where shards are kept on local disk; None fetches them each time."""
    timeout_seconds: float = 30.0
    """A connection without a byte for so long is given up."""
    attempts: int = 6
    """Requests for a file, in all, before it counts as unreadable."""
    first_wait_seconds: float = 1.0
    """Wait before the second attempt; doubled each time, with jitter, up to a minute."""


class _Passing(Exception):
    """A failure that may be gone the next time; the message is its reason."""


@dataclasses.dataclass(frozen=True)
class RemotePath:
    """A folder or file behind a URL, with the few methods of a `Path` that are needed.

    Instances hold no connection, so that they cross into worker processes.
    """

    url: str
    root: str
    """The URL that the user has given, of the folder or of one above it."""
    access: RemoteAccess = dataclasses.field(compare=False)

    @classmethod
    def of(cls, url: str, access: RemoteAccess) -> RemotePath:
        """The path of a URL that a user has given; nothing is opened.

        Raises:
            DataError: the URL carries a password or query, which would be printed and
                recorded; or no installed package can open it.
        """
        try:
            parts = urlsplit(url)
        except ValueError as error:
            shown = url.rpartition("@")[2].partition("?")[0]
            raise DataError(
                f"{shown} is not a valid URL of a folder: {error}"
            ) from None
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise DataError(
                f"{shown} was given with a user, a query or a fragment, which would be "
                "recorded with the run: leave these out, and give credentials in the "
                "environment or in ~/.netrc"
            )
        scheme, _, place = url.partition("://")
        if "::" in scheme or "://" in place:
            raise DataError(f"{shown} is a chain of URLs: give a single one")
        root = f"{scheme.lower()}://{place.rstrip('/')}"
        path = cls(root, root, access)
        try:
            import tenacity  # noqa: F401 - found missing now rather than when needed

            path._open()
        except ImportError as error:
            raise DataError(
                f"{shown} needs a package that is not installed ({error}): "
                f"{INSTALL_COMMAND} brings those for http, https and s3"
            ) from None
        except Exception as error:  # noqa: BLE001 - each file system has its own
            raise DataError(f"{shown} cannot be opened: {_words(error)}") from None
        return path

    def __truediv__(self, name: str) -> RemotePath:
        return dataclasses.replace(self, url=f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rpartition("/")[2]

    def resolve(self) -> RemotePath:
        """Itself: a URL is absolute."""
        return self

    def read_bytes(self, size: int | None = None, sha256: str | None = None) -> bytes:
        """Fetch a file; other bytes than the expected are a failure like any other.

        Args:
            size: expected bytes.
            sha256: expected hash, in hex.

        Raises:
            FileNotFoundError, PermissionError: the server says so, at once.
            OSError: it could not be read, after all attempts.
        """

        def fetch(files: AbstractFileSystem, path: str) -> bytes:
            content = files.cat_file(path)
            if size is not None and len(content) != size:
                raise _Passing(f"{len(content)} bytes came, not {size}")
            if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
                raise _Passing("other bytes came: their sha256 is not the manifest's")
            return content

        return self._insist(fetch)

    def read_shard(self, size: int, sha256: str) -> bytes:
        """Like :meth:`read_bytes`, from the cache where there is one."""
        fetch = functools.partial(self.read_bytes, size, sha256)
        cache = self.access.cache
        return fetch() if cache is None else cache.read(sha256, size, fetch)

    def size(self) -> int | None:
        """Size in bytes, None where the server does not tell; raises as `read_bytes`."""
        return self._insist(lambda files, path: files.info(path).get("size"))

    def exists(self) -> bool:
        """Whether there is such a file.

        Raises:
            OSError: the server gives no answer.
        """
        try:
            self.size()
        except FileNotFoundError:
            return False
        except PermissionError as error:
            # What S3 answers for a missing file too, to whoever may not list the bucket.
            warn(f"{self}: {error.strerror}; taken as absent")
            return False
        return True

    def _open(self) -> tuple[AbstractFileSystem, str]:
        files = _file_system(os.getpid(), self.root, self.access.timeout_seconds)
        return files, files._strip_protocol(self.url)

    def _insist(self, action: Callable[[AbstractFileSystem, str], T]) -> T:
        """Do something with the file; again, after longer and longer waits, if it fails."""
        import tenacity

        first, attempts = self.access.first_wait_seconds, self.access.attempts

        def announce(state: tenacity.RetryCallState) -> None:
            error = state.outcome and state.outcome.exception()
            warn(
                f"{self}: {error}; trying again in {state.upcoming_sleep:.1f} s "
                f"(attempt {state.attempt_number} of {attempts})"
            )

        @tenacity.retry(
            stop=tenacity.stop_after_attempt(attempts),
            wait=tenacity.wait_exponential(first, max=_LONGEST_WAIT_SECONDS)
            + tenacity.wait_random(0, first),
            retry=tenacity.retry_if_exception_type(_Passing),
            before_sleep=announce,
            reraise=True,
        )
        def insist() -> T:
            try:
                return action(*self._open())
            except _Passing:
                raise
            except Exception as error:
                raise _classified(error, self.url) from error

        try:
            return insist()
        except _Passing as error:
            reason = f"given up after {attempts} attempts, the last: {error}"
            raise OSError(errno.EIO, reason, self.url) from None


@functools.cache
def _file_system(process: int, root: str, timeout_seconds: float) -> AbstractFileSystem:
    # Made anew in each process, and never let go of: a forked one that closed the
    # connections that it inherited would close its parent's.
    import fsspec

    options: dict[str, Any] = {}
    protocol = root.partition("://")[0]
    if protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=timeout_seconds, sock_read=timeout_seconds
        )
        options["client_kwargs"] = {
            "timeout": timeout,
            # A compressed answer has another length than the file.
            "headers": {"Accept-Encoding": "identity"},
            # Proxies and ~/.netrc, as for other programs.
            "trust_env": True,
        }
    elif protocol in ("s3", "s3a"):
        options["config_kwargs"] = {
            "connect_timeout": timeout_seconds,
            "read_timeout": timeout_seconds,
            "retries": {"total_max_attempts": 1},
        }
        options |= {"max_concurrency": 1, "use_listings_cache": False}
    files, _ = fsspec.url_to_fs(root, skip_instance_cache=True, **options)
    if protocol in ("s3", "s3a"):
        # Attempts are counted and announced here.
        files.retries = 1
    return files


def _classified(error: BaseException, url: str) -> Exception:
    """What a failure means: an ``OSError`` that lasts, or :class:`_Passing`."""
    over_http = url.startswith(("http://", "https://"))
    if over_http and isinstance(error, FileNotFoundError):
        # fsspec takes any failure to learn a size over HTTP for an absent file.
        error = error.__cause__ or error
    status, name, words = _status(error), type(error).__name__, _words(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        reason = f"the server has no such file ({words})"
        return FileNotFoundError(errno.ENOENT, reason, url)
    if isinstance(error, PermissionError) or status in (401, 403):
        return PermissionError(errno.EACCES, f"the server denies access ({words})", url)
    if name in _CREDENTIAL_ERRORS:
        reason = f"{words}: give credentials in the environment"
        return PermissionError(errno.EACCES, reason, url)
    if status is None:
        lasting = isinstance(error, _LASTING_ERRORS) or name in _LASTING_NAMES
    else:
        lasting = 300 <= status < 500 and status not in _PASSING_STATUSES
    return OSError(errno.EIO, words, url) if lasting else _Passing(words)


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of aiohttp or of s3fs, where there is one."""
    for candidate in (error, error.__cause__):
        status = getattr(candidate, "status", None)
        if isinstance(status, int):
            return status
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return None


def _words(error: BaseException) -> str:
    """An error on one line, without the queries of URLs, which may hold signatures."""
    status = _status(error)
    kind = type(error).__name__ if status is None else f"HTTP status {status}"
    # The message of aiohttp is what the server said, its string has the URL too.
    text = str(getattr(error, "message", error))
    text = textwrap.shorten(re.sub(r"\?[^\s'\"]+", "?...", text), 300)
    if not text and "Timeout" in kind:
        text = "nothing came in time"
    return f"{kind}: {text}" if text else kind
