"""The routes: completions, chat, models, health, metrics, and the page."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import math
from collections.abc import AsyncIterator, Coroutine, Iterator
from importlib import resources
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.requests import ClientDisconnect

from ten_dist.serving.answer import Answer, ModelFailed, TimedOut
from ten_dist.serving.formats import ChatFormat, CompletionFormat
from ten_dist.serving.measurements import Measurements
from ten_dist.serving.protocol import (
    BadRequest,
    ChatRequest,
    CompletionRequest,
    parse,
)
from ten_dist.serving.served_model import ServedModel
from ten_dist.serving.worker import Draining, QueueFull, Worker

MOST_BODY_BYTES = 8 * 2**20
_CLIENT_GONE = 499
"""Status of answers that nobody waited for, as web servers write it in their logs."""


def make_app(
    served: ServedModel,
    worker: Worker,
    measurements: Measurements,
    seconds: float,
    api_key: str | None,
) -> FastAPI:
    """The application.

    Args:
        served: the model.
        worker: decodes with it.
        measurements: what is told of it.
        seconds: longest time of a request.
        api_key: what clients have to send, or None where everybody is served.
    """
    app = FastAPI(title="ten_dist", openapi_url=None, docs_url=None, redoc_url=None)
    page = resources.files("ten_dist.serving").joinpath("page.html").read_text("utf-8")
    service = _Service(served, worker, measurements, seconds)
    app.include_router(_api(service, measurements, api_key))

    @app.exception_handler(BadRequest)
    async def refuse(request: Request, problem: BadRequest) -> Response:
        measurements.count_request(problem.status)
        return _error(problem)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def unknown(request: Request, problem: Any) -> Response:
        what = f"{request.method} {request.url.path[:100]}"
        return _error(
            BadRequest(f"there is no {what} here", status=problem.status_code)
        )

    @app.get("/health")
    async def health() -> Response:
        state = "draining" if worker.draining else "ok"
        if worker.failure is not None:
            state = "failed"
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    @app.get("/", response_class=HTMLResponse)
    async def show() -> str:
        return page

    return app


def _api(
    service: _Service, measurements: Measurements, api_key: str | None
) -> APIRouter:
    """The routes for which a key is needed, if there is one."""

    async def authorized(request: Request) -> None:
        given = request.headers.get("authorization", "")
        # In constant time: how long a refusal takes says nothing of the key.
        if api_key is not None and not hmac.compare_digest(
            given.encode(), f"Bearer {api_key}".encode()
        ):
            raise BadRequest(
                "the API key is missing or wrong", status=401, code="invalid_api_key"
            )

    api = APIRouter(dependencies=[Depends(authorized)])

    @api.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await service.answer(request, CompletionRequest)

    @api.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await service.answer(request, ChatRequest)

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.description()]}

    @api.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.served.check_name(name)
        return service.description()

    @api.get("/metrics")
    async def metrics() -> Response:
        return Response(measurements.text(), media_type=measurements.media_type)

    return api


class _Service:
    """Answers the two kinds of requests."""

    def __init__(
        self,
        served: ServedModel,
        worker: Worker,
        measurements: Measurements,
        seconds: float,
    ) -> None:
        self.served = served
        self._worker = worker
        self._measurements = measurements
        self._seconds = seconds

    def description(self) -> dict[str, Any]:
        """The model, as `/v1/models` lists it."""
        return {
            "id": self.served.name,
            "object": "model",
            "created": 0,
            "owned_by": "ten_dist",
        }

    async def answer(
        self, request: Request, kind: type[CompletionRequest | ChatRequest]
    ) -> Response:
        """Answer a request.

        Raises:
            BadRequest: it cannot be answered, now or ever.
        """
        served = self.served
        asked = parse(await _body(request, self._seconds), kind)
        form = ChatFormat if isinstance(asked, ChatRequest) else CompletionFormat
        # In a thread: to tokenize a long prompt takes longer than others should wait.
        task = await asyncio.to_thread(served.task, asked)
        decode = served.tokenizer.decode
        with _refusals(self._seconds):
            answer = Answer(self._worker, *task, decode, self._seconds)
        logprobs = task.requests[0].logprobs is not None
        shape = form(served.name, lambda token: decode([token]), logprobs)
        if asked.stream:
            stream = self._stream(answer, shape, asked.includes_usage)
            # Proxies keep nothing back.
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            response: Response = StreamingResponse(
                stream, media_type="text/event-stream", headers=headers
            )
        else:
            content = await _unless_gone(request, self._whole(answer, shape))
            response = JSONResponse(content)
            self._measurements.count_request(response.status_code)
        return response

    async def _whole(self, answer: Answer, shape: CompletionFormat) -> dict[str, Any]:
        with _refusals(self._seconds):
            pieces = [piece async for piece in self._measurements.pieces(answer)]
        return shape.whole(pieces, answer)

    async def _stream(
        self, answer: Answer, shape: CompletionFormat, usage: bool
    ) -> AsyncIterator[bytes]:
        # Where nobody listens to the end, the client has gone away.
        status = _CLIENT_GONE
        try:
            for chunk in shape.first_chunks(len(answer.choices)):
                yield _event(chunk)
            with _refusals(self._seconds):
                async for piece in self._measurements.pieces(answer):
                    yield _event(shape.chunk(piece))
            if usage:
                yield _event(shape.last_chunk(answer))
            yield b"data: [DONE]\n\n"
            status = 200
        except BadRequest as problem:
            status = problem.status
            yield _event(_problem(problem))
        finally:
            self._measurements.count_request(status)


@contextlib.contextmanager
def _refusals(seconds: float) -> Iterator[None]:
    """Turn what keeps a request from its answer into a :class:`BadRequest`."""
    try:
        yield
    except QueueFull:
        raise BadRequest(
            "too many requests wait already", status=429, retry_after=1
        ) from None
    except Draining:
        raise BadRequest("the server is about to end", status=503) from None
    except TimedOut:
        raise BadRequest(f"it took longer than {seconds:g} s", status=504) from None
    except ModelFailed as failure:
        raise BadRequest(str(failure), status=500) from failure


async def _unless_gone(
    request: Request, work: Coroutine[Any, Any, dict[str, Any]]
) -> dict[str, Any]:
    """What `work` gives, unless the client goes away first.

    Raises:
        BadRequest: it has.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise BadRequest("the client has gone away", status=_CLIENT_GONE)
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request, seconds: float) -> bytes:
    """The body of a request.

    Raises:
        BadRequest: it is too long, does not come in time, or its client goes away.
    """
    body = asyncio.ensure_future(_whole_body(request))
    try:
        await asyncio.wait([body], timeout=seconds)
        if not body.done():
            raise BadRequest(f"the body took longer than {seconds:g} s", status=408)
        return body.result()
    except ClientDisconnect:
        raise BadRequest("the client has gone away", status=_CLIENT_GONE) from None
    finally:
        body.cancel()


async def _whole_body(request: Request) -> bytes:
    declared = request.headers.get("content-length", "0")
    size = int(declared) if declared.isdecimal() else math.inf
    parts: list[bytes] = []
    if size <= MOST_BODY_BYTES:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > MOST_BODY_BYTES:
                break
            parts.append(part)
    if size > MOST_BODY_BYTES:
        raise BadRequest(
            f"the body is longer than {MOST_BODY_BYTES // 2**20} MB", status=413
        )
    return b"".join(parts)


def _event(content: dict[str, Any]) -> bytes:
    """An event of a stream."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    # A lone half of a surrogate pair has no bytes of its own.
    return f"data: {text}\n\n".encode("utf-8", errors="replace")


def _problem(problem: BadRequest) -> dict[str, Any]:
    """The body of a refusal."""
    internal = problem.status >= 500
    content = {
        "message": str(problem),
        "type": "server_error" if internal else "invalid_request_error",
        "param": problem.parameter,
        "code": problem.code,
    }
    return {"error": content}


def _error(problem: BadRequest) -> Response:
    headers = {}
    if problem.retry_after is not None:
        headers["Retry-After"] = str(problem.retry_after)
    return JSONResponse(_problem(problem), problem.status, headers)
