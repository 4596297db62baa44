"""The endpoint's routes.

Owns what answers which path. All that takes long, tokenizing and counting among it, runs in threads; the session has
its own (``service``).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from crypten_llm import limits, records
from crypten_llm.models.tokenizer import has_chat_template
from crypten_llm.serving import asking, bodies, page, refusals, streams
from crypten_llm.serving.answers import Writer
from crypten_llm.serving.bodies import ChatBody, TextBody
from crypten_llm.serving.calling import Calling
from crypten_llm.serving.fair_queue import Caller
from crypten_llm.serving.guard import Guard
from crypten_llm.serving.job import Broken, Ended, Job
from crypten_llm.serving.kept import Talk
from crypten_llm.serving.refusals import Refusal
from crypten_llm.serving.service import Service, State
from crypten_llm.serving.shelf import Shelf
from crypten_llm.session.request import Asked

DEADLINE = "x-deadline"  # seconds from now
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
Answer = Callable[[Request], Awaitable[Response]]


@dataclass
class Endpoint:
    """service: the session. guard: who may ask. model: the name that it goes by. usual: of requests that do not say.
    shelf: receipts of the last answers.
    """

    service: Service
    guard: Guard
    model: str
    usual: asking.Usual = field(default_factory=asking.Usual)
    shelf: Shelf = field(default_factory=Shelf)

    def app(self) -> Starlette:
        posts = {
            "/v1/chat/completions": lambda request: self.complete(request, ChatBody),
            "/v1/completions": lambda request: self.complete(request, TextBody),
            "/v1/price": self.price,
        }
        gets = {
            "/": self.page,
            "/health": self.health,
            "/metrics": self.metrics,
            "/v1/models": self.models,
            "/v1/models/{name:path}": self.one_model,
            "/v1/receipts/{name}": self.receipt,
        }
        routes = [Route(path, self._guarded(run), methods=["POST"]) for path, run in posts.items()]
        routes += [Route(path, self._guarded(run), methods=["GET"]) for path, run in gets.items()]
        return Starlette(routes=routes, exception_handlers={HTTPException: _no_such})

    async def complete(self, request: Request, kind: type[ChatBody] | type[TextBody]) -> Response:
        """An answer, whole or streamed."""
        body, asked, talk, calling = await self._asked(request, kind)
        await self._check_deadline(request, asked)
        caller = _caller(request, body)
        job = Job(asked, caller, talk)
        self.service.submit(job)
        writer = Writer(body, self.service.ready(), self.model, calling)
        keep = partial(self.shelf.put, request.state.key, writer.id)
        if body.stream:
            events = streams.events(job, writer, self.service.leave, keep)
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        ended = await self._wait(request, job)
        keep(ended.results)
        return _json(writer.whole(ended))

    async def receipt(self, request: Request) -> Response:
        """What the parties have signed of an answer, by its id."""
        return _json(self.shelf.get(request.state.key, request.path_params["name"]))

    async def _asked(
        self, request: Request, kind: type[ChatBody] | type[TextBody] | None
    ) -> tuple[ChatBody | TextBody, list[Asked], Talk | None, Calling | None]:
        """What is asked, as it would be run now; what conversation it may go on with, how its answers are read."""
        llama = self.service.ready()
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "the body must be JSON; send Content-Type: application/json")
        body = bodies.read(await _read(request), kind)
        if body.model not in (None, self.model):
            raise Refusal(404, f"there is no model {body.model[:80]!r} here; it is {self.model!r}", "model_not_found")
        asked, calling = await run_in_threadpool(asking.prepare, llama, body, self.usual)
        talk = await run_in_threadpool(self.service.kept.talk, llama, _caller(request, body), asked)
        return body, [talk.asked] if talk else asked, talk, calling

    async def _check_deadline(self, request: Request, asked: Sequence[Asked]) -> None:
        if (text := request.headers.get(DEADLINE)) is None:
            return
        try:
            deadline = float(text)
        except ValueError:
            deadline = math.nan
        if not 0 < deadline < math.inf:
            raise Refusal(400, f"X-Deadline is {text[:40]!r}; give the seconds in which the answer is needed")
        self.service.pricer.check(await self._price(asked), deadline)

    async def _price(self, asked: Sequence[Asked]) -> dict[str, Any]:
        llama = self.service.ready()
        ahead = [*self.service.queue.items(), *self.service.running]
        return await run_in_threadpool(self.service.stocking.price, llama, asked, ahead)

    async def price(self, request: Request) -> Response:
        """Of a request, from its very body, before it is sent."""
        _, asked, *_ = await self._asked(request, None)
        return _json(await self._price(asked))

    async def _wait(self, request: Request, job: Job) -> Ended:
        """All answers; the caller's end ends the request."""
        gone = asyncio.create_task(_disconnected(request))
        try:
            while True:
                coming = asyncio.create_task(job.next())
                await asyncio.wait({coming, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    coming.cancel()
                    raise ClientDisconnect
                match coming.result():
                    case Ended() as ended:
                        return ended
                    case Broken(why):
                        raise why
        finally:
            gone.cancel()
            self.service.leave(job)

    async def models(self, request: Request) -> Response:
        """The one model; ``chat``: whether it has a chat template."""
        return _json({"object": "list", "data": [self._model()]})

    async def one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.model:
            raise Refusal(404, f"there is no model {name[:80]!r} here; it is {self.model!r}", "model_not_found")
        return _json(self._model())

    def _model(self) -> dict[str, Any]:
        llama = self.service.ready()
        return {
            "id": self.model,
            "object": "model",
            "created": 0,
            "owned_by": "owner",
            "context_length": llama.config.context,
            "chat": llama.has_tokenizer and has_chat_template(llama.tokenizer),
            "engine": llama.protocol.engine,
            "reveal": llama.protocol.reveal,
        }

    async def health(self, request: Request) -> Response:
        """200 where requests are answered, 503 where not; the state says whether they will be."""
        service = self.service
        running = len(service.running)
        body = {"state": service.state, "reason": service.reason, "waiting": len(service.queue), "running": running}
        return _json(body, 200 if service.state is State.AVAILABLE else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self.service.metrics.text(), media_type=PROMETHEUS)

    async def page(self, request: Request) -> Response:
        return Response(page.TEXT, media_type="text/html; charset=utf-8", headers=page.HEADERS)

    def _guarded(self, run: Answer) -> Answer:
        """The answer, or what is said instead."""

        async def answer(request: Request) -> Response:
            try:
                request.state.key = self.guard.check(request)
                return await run(request)
            except ClientDisconnect:
                return Response(status_code=499)  # nobody reads it
            except Exception as error:
                refusal = refusals.of(error)
                if refusal.code != "queue_full":  # the service has counted it
                    self.service.metrics.refused(refusal.code or str(refusal.status))
                return _json(refusal.body, refusal.status, refusal.headers)

        return answer


def _caller(request: Request, body: ChatBody | TextBody) -> Caller:
    return Caller(request.state.key, body.user or "")


async def _no_such(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    what = "takes another method" if status == 405 else "is not here"
    refusal = Refusal(status, f"{request.url.path[:80]} {what}; see docs/serving.md")
    return _json(refusal.body, status)


async def _read(request: Request) -> bytes:
    """The body; raises Refusal for one that is too large, before all of it has come."""
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > limits.MESSAGE_BYTES:
            raise Refusal(413, f"the body has more than {limits.MESSAGE_BYTES:,} bytes; ask for less at once")
    return bytes(data)


async def _disconnected(request: Request) -> None:
    """Returns when the caller is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    kept = {"Cache-Control": "no-store", **(headers or {})}
    return Response(records.encode(value), status, kept, "application/json")
