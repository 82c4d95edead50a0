"""The web application of `mgcc serve`: its page, and the requests that the page makes.

Images, masks and maps are raw bytes, one per pixel: grey, 0 and 255, or 255 for 1 bit. Errors are JSON with one line in
`error`.
"""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from mgcc_dist.common.errors import DISK_FULL, EXTRAS, UserError, one_line, system_error
from mgcc_dist.data.images import BadFile
from mgcc_dist.serving.corrections import Conflict
from mgcc_dist.serving.predictions import measure
from mgcc_dist.serving.security import content_policy, middleware
from mgcc_dist.serving.session import NotFound, Session

PAGE = Path(__file__).with_name("page.html")
SCRIPT = "/* view.js, page.js */"
"""where these files go in page.html, so that the page is one file in the browser"""


def create_app(session: Session, token: str, max_upload: int) -> Starlette:
    """Return the application; `max_upload` is the size in bytes of the largest file that it accepts."""
    script = "".join(PAGE.with_name(name).read_text(encoding="utf-8") for name in ("view.js", "page.js"))
    page = PAGE.read_text(encoding="utf-8").replace(SCRIPT, script)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        session.open()
        yield
        await run_in_threadpool(session.close)

    handlers = Handlers(session, max_upload)
    routes = [
        Route("/", lambda _: HTMLResponse(page)),
        Route("/api/state", handlers.state),
        Route("/api/next", handlers.next),
        Route("/api/uploads", handlers.upload, methods=["POST"]),
        Route("/api/items/{name}", handlers.describe),
        Route("/api/items/{name}/image", handlers.image),
        Route("/api/items/{name}/predicted", handlers.predicted),
        Route("/api/items/{name}/uncertainty", handlers.uncertainty),
        Route("/api/items/{name}/saved", handlers.saved),
        Route("/api/items/{name}/measures", handlers.measures, methods=["POST"]),
        Route("/api/items/{name}/correction", handlers.save, methods=["PUT"]),
    ]
    errors: Any = {
        UserError: _explain,
        ModuleNotFoundError: _explain,
        OSError: _explain,
        HTTPException: lambda _, error: _error(error.status_code, error.detail),
        Exception: lambda *_: _error(500, "an error in mgcc serve; its terminal says more"),
    }
    return Starlette(
        routes=routes,
        middleware=middleware(token, content_policy(page)),
        exception_handlers=errors,
        lifespan=lifespan,
    )


class Json(JSONResponse):
    """JSON of ASCII, because file names that are not UTF-8 can't be encoded."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False).encode()


class Handlers:
    """One method per route; those that are not `async` run in a thread."""

    def __init__(self, session: Session, max_upload: int) -> None:
        self._session, self._max_upload = session, max_upload

    def state(self, _: Request) -> Response:
        segmenter, corrections = self._session.segmenter, self._session.corrections
        info = segmenter.predictor.info
        return Json(
            {
                "model": info.get("network", {}).get("name", ""),
                "method": info.get("method", ""),
                "dataset": info.get("dataset") or "",
                "device": str(segmenter.predictor.device),
                "uncertainty": segmenter.kind,
                "out": str(corrections.folder),
                "max_upload": self._max_upload,
                "queue": self._session.queue.progress(),
            }
        )

    def next(self, request: Request) -> Response:
        queue = self._session.queue
        index = queue.next(early=request.query_params.get("early") == "1")
        return Json({"id": None if index is None else f"q-{index}", "queue": queue.progress()})

    async def upload(self, request: Request) -> Response:
        name = unquote(request.headers.get("x-file-name", ""), errors="replace") or "file"
        path = await run_in_threadpool(self._session.receive, name)
        kept = False
        try:
            with path.open("wb") as file:
                async for chunk in _limited(request, self._max_upload, f"{name}: is larger than --max-upload-mb"):
                    file.write(chunk)
            ids = await run_in_threadpool(self._session.add, path, name)
            kept = True
            return Json({"ids": ids})
        except BadFile as bad:
            raise BadFile(Path(name), bad.reason) from bad
        finally:
            if not kept:
                path.unlink(missing_ok=True)

    def describe(self, request: Request) -> Response:
        return Json(self._session.describe(request.path_params["name"]))

    def image(self, request: Request) -> Response:
        return _raw(self._session.view(request.path_params["name"]).image)

    def predicted(self, request: Request) -> Response:
        return _raw(self._session.view(request.path_params["name"]).predicted.mask)

    def uncertainty(self, request: Request) -> Response:
        return _raw(self._session.view(request.path_params["name"]).predicted.uncertainty)

    def saved(self, request: Request) -> Response:
        return _raw(self._session.saved_mask(request.path_params["name"]))

    async def measures(self, request: Request) -> Response:
        name = request.path_params["name"]
        mask = await self._mask(request, name)
        view = await run_in_threadpool(self._session.view, name)
        return Json(await run_in_threadpool(measure, mask, view.spacing))

    async def save(self, request: Request) -> Response:
        name = request.path_params["name"]
        mask = await self._mask(request, name)
        query = request.query_params
        saved = await run_in_threadpool(self._session.save, name, mask, query.get("key", ""), query.get("revision", ""))
        return Json(saved)

    async def _mask(self, request: Request, name: str) -> np.ndarray:
        """Read the body as a mask uint8 [H,W] of 0 and 255 of the item `name`."""
        shape = (await run_in_threadpool(self._session.view, name)).image.shape
        wrong = f"mask: is not {shape[1]}x{shape[0]} bytes"
        body = b"".join([chunk async for chunk in _limited(request, shape[0] * shape[1], wrong)])
        if len(body) != shape[0] * shape[1]:
            raise HTTPException(400, wrong)
        return np.where(np.frombuffer(body, np.uint8).reshape(shape) > 127, np.uint8(255), np.uint8(0))


async def _limited(request: Request, limit: int, message: str) -> AsyncIterator[bytes]:
    """Yield the body of a request, up to `limit` bytes; a larger one is refused by its header if that says so."""
    length = request.headers.get("content-length", "0")
    received = int(length) if length.isdecimal() else 0
    if received > limit:
        raise HTTPException(413, message)
    received = 0
    try:
        async for chunk in request.stream():
            received += len(chunk)
            if received > limit:
                raise HTTPException(413, message)
            yield chunk
    except ClientDisconnect as error:
        raise HTTPException(400, "the upload was cut off") from error


def _raw(pixels: np.ndarray | None) -> Response:
    if pixels is None:
        raise HTTPException(404, "this image has none")
    return Response(pixels.tobytes(), media_type="application/octet-stream")


def _explain(_: Request, error: Exception) -> Response:
    """Answer with one line what the user can do something about."""
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return _error(400, f"{error.name} is not installed. Run `pip install 'mgcc-dist[{EXTRAS[error.name]}]'`.")
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return _error(507, f"{error.strerror}. Free some space and try again; nothing on this page is lost.")
    if isinstance(error, OSError) and (message := system_error(error)):
        return _error(507, message)
    if isinstance(error, UserError):
        status = {NotFound: 404, Conflict: 409, BadFile: 415}.get(type(error), 400)
        return _error(status, str(error))
    raise error


def _error(status: int, message: str) -> Response:
    return Json({"error": one_line(message)}, status)
