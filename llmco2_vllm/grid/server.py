"""Asking a provider's server for JSON: everything that can go wrong becomes a FeedError with one line."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

TIMEOUT_SECONDS = 10.0
LIMIT_BYTES = 4 * 1024 * 1024
LONGEST_WAIT_SECONDS = 86400.0


class FeedError(Exception):
    """No figure this time. The message holds no key, and no text of the answer: it may repeat what was sent.

    retry_after_seconds: how long the server asks to be left alone, None when it does not say.
    refused: the key was not accepted.
    """

    def __init__(self, message: str, retry_after_seconds: float | None = None, refused: bool = False) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds
        self.refused = refused


@dataclass(frozen=True, slots=True)
class Question:
    """One GET. credentials: user and password for basic authentication; neither they nor headers are shown."""

    path: str
    parameters: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    credentials: tuple[str, str] | None = field(default=None, repr=False)


class Server:
    """One provider's server. Redirects are not followed: the key is for this host."""

    def __init__(self, base_url: str, clock: Callable[[], float], timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        """Raises ValueError with one line when the address, the time or the environment's proxy cannot be used."""
        try:
            url = httpx.URL(base_url)
        except (httpx.InvalidURL, TypeError):
            url = httpx.URL("")
        host = re.fullmatch(r"[A-Za-z0-9.:_-]+", url.host)
        if url.scheme not in ("http", "https") or host is None or url.userinfo or url.query:
            raise ValueError("provider_url is not possible; allowed: https://host, without user, password and query")
        if not 0 < timeout_seconds < math.inf:
            raise ValueError(f"timeout_seconds={timeout_seconds!r} is not possible; allowed: more than 0")
        self.host = url.host
        self.clock = clock
        self.skew_seconds: float | None = None
        # What the last answer asked for, also where the one who asked can do without it.
        self.retry_after_seconds: float | None = None
        self._base, self._timeout = url, timeout_seconds
        # Made now, at start: reading the certificates takes tens of milliseconds. A connection for each question, as
        # they are minutes apart: nothing is left open between them.
        try:
            self._client = httpx.AsyncClient(timeout=timeout_seconds, limits=httpx.Limits(max_keepalive_connections=0))
        except (ImportError, ValueError, OSError, httpx.InvalidURL) as error:
            name = type(error).__name__
            raise ValueError(
                f"the proxy or the certificates named by the environment cannot be used ({name})"
            ) from None

    async def get(self, question: Question) -> Any:
        """The parsed answer. Raises FeedError."""
        try:
            async with asyncio.timeout(self._timeout):
                return await self._exchange(question)
        except (TimeoutError, httpx.TimeoutException):
            raise FeedError(f"{self.host} did not answer within {self._timeout:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            # The text of such an error may quote what was sent.
            raise FeedError(f"{self.host} could not be asked ({type(error).__name__})") from None

    async def _exchange(self, question: Question) -> Any:
        url = self._base.join(self._base.path.rstrip("/") + question.path)
        request = self._client.build_request(
            "GET", url, params=dict(question.parameters), headers=dict(question.headers)
        )
        credentials = question.credentials
        auth = httpx.USE_CLIENT_DEFAULT if credentials is None else httpx.BasicAuth(*credentials)
        response = await self._client.send(request, stream=True, auth=auth)
        try:
            self._note_clock(response)
            self.retry_after_seconds = None
            if response.status_code != httpx.codes.OK:
                raise self._failure(response)
            body = bytearray()
            async for part in response.aiter_bytes():
                body += part
                if len(body) > LIMIT_BYTES:
                    raise FeedError(f"{self.host} answered with more than {LIMIT_BYTES} bytes")
        finally:
            await response.aclose()
        try:
            return json.loads(bytes(body))
        except (ValueError, RecursionError):
            raise FeedError(f"{self.host} answered with something that is not JSON") from None

    def _note_clock(self, response: httpx.Response) -> None:
        """How far this host's clock is ahead of the server's, in seconds; a Date has whole seconds."""
        date = _http_date(response.headers.get("date"))
        self.skew_seconds = None if date is None else self.clock() - date

    def _failure(self, response: httpx.Response) -> FeedError:
        status = response.status_code
        wait = self.retry_after_seconds = retry_after_seconds(response.headers, self.clock())
        if status in (401, 403):
            return FeedError(f"{self.host} answered {status}: the key is not accepted for this", wait, refused=True)
        if status == 429:
            return FeedError(f"{self.host} answered 429: asked too often", wait)
        return FeedError(f"{self.host} answered {status}", wait)


def retry_after_seconds(headers: Mapping[str, str], now_epoch_seconds: float) -> float | None:
    """What Retry-After asks for (RFC 9110, 10.2.3): seconds, or a date, counted from the server's own Date.

    At most a day, so that a slip of theirs does not silence us for good; None when it says nothing that can be read.
    """
    text = headers.get("retry-after", "").strip()
    try:
        wait = float(text)
    except ValueError:
        until = _http_date(text)
        if until is None:
            return None
        asked = _http_date(headers.get("date"))
        wait = until - (now_epoch_seconds if asked is None else asked)
    return min(max(wait, 0.0), LONGEST_WAIT_SECONDS) if math.isfinite(wait) else None


def _http_date(text: str | None) -> float | None:
    try:
        date = parsedate_to_datetime(text or "")
    except (ValueError, TypeError):
        return None
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


def epoch_seconds(value: str, key: str) -> float:
    """An ISO 8601 time with its zone as epoch seconds. Raises FeedError that names the key."""
    try:
        moment = datetime.fromisoformat(value)
        if moment.tzinfo is None:
            raise FeedError(f"{key} does not say its time zone")
        return moment.timestamp()
    except (ValueError, OverflowError):
        raise FeedError(f"{key} is no ISO 8601 time") from None


def iso(epoch: float) -> str:
    """Epoch seconds as ISO 8601 in UTC, to the minute: 2026-01-31T12:30Z."""
    return datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%dT%H:%MZ")


def entry(content: Any, key: str, kind: type) -> Any:
    """``content[key]`` of the kind asked for. Raises FeedError that names the key."""
    if not isinstance(content, Mapping) or not isinstance(content.get(key), kind):
        raise FeedError(f"the answer has no {key!r} as expected")
    return content[key]
