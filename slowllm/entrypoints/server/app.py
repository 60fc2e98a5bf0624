"""The server's routes, and errors of every kind in OpenAI's shape."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from slowllm.entrypoints.openai.responses import error_body
from slowllm.entrypoints.openai.schemas import CHAT, COMPLETIONS, ChatBody, CompletionBody, RequestBody
from slowllm.entrypoints.server.answering import Answering
from slowllm.entrypoints.server.limits import HTTPError, check_key
from slowllm.entrypoints.server.metrics import CONTENT_TYPE
from slowllm.version import __version__

MODELS, EMBEDDINGS = "/v1/models", "/v1/embeddings"
_ERROR = {
    "type": "object", "required": ["error"],
    "properties": {
        "error": {
            "type": "object", "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}  # fmt: skip


def _described(schema: type[RequestBody]) -> dict[str, Any]:
    """Return what the OpenAPI description says of a route whose body is read as a schema has it."""
    document = schema.model_json_schema()
    document = _with_parts(document, document.pop("$defs", {}))
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": document}}}}


def _with_parts(document: Any, parts: dict[str, Any]) -> Any:
    """Return a schema with its parts in the places where they are named."""
    if isinstance(document, list):
        return [_with_parts(one, parts) for one in document]
    if not isinstance(document, dict):
        return document
    if "$ref" in document:
        return parts[document["$ref"].rpartition("/")[2]]
    return {name: _with_parts(value, parts) for name, value in document.items()}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {"application/json": {"schema": _ERROR}}
    return {status: {"description": "An error.", "content": content} for status in statuses}


def make_app(answering: Answering) -> FastAPI:
    """Return the application; it closes what answers when it ends.

    Args:
        answering: what answers requests.
    """
    served = answering.served

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        answering.close()

    app = FastAPI(
        title="slowllm", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None,
        summary="OpenAI's completions and chats of one streamed model.",
    )  # fmt: skip

    answers = _errors(400, 401, 408, 413, 415, 429, 500, 503)

    @app.post(COMPLETIONS, responses=answers, openapi_extra=_described(CompletionBody))
    async def completions(request: Request) -> Response:
        """Continue prompts, and score them."""
        return await answering.answer(request, COMPLETIONS)

    @app.post(CHAT, responses=answers, openapi_extra=_described(ChatBody))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        return await answering.answer(request, CHAT)

    @app.post(EMBEDDINGS, responses=_errors(401, 404))
    async def embeddings(request: Request) -> Response:
        """Say that there are none."""
        check_key(request, served.key)
        raise HTTPError(
            404, f"{EMBEDDINGS} is not supported: this server completes texts and answers chats, at {COMPLETIONS} and {CHAT}",
            "unsupported_endpoint",
        )  # fmt: skip

    def described() -> dict[str, Any]:
        return {"id": served.lm.name, "object": "model", "created": answering.started, "owned_by": "slowllm"}

    @app.get(MODELS, responses=_errors(401))
    async def models(request: Request) -> Response:
        """List the model."""
        check_key(request, served.key)
        return JSONResponse({"object": "list", "data": [described()]})

    @app.get(f"{MODELS}/{{model:path}}", responses=_errors(401, 404))
    async def model(request: Request, model: str) -> Response:
        """Describe the model."""
        check_key(request, served.key)
        if model != served.lm.name:
            raise HTTPError(
                404,
                f"there is no model {model!r} here, only {served.lm.name!r}",
                "model_not_found",
                param="model",
            )
        return JSONResponse(described())

    @app.get("/health", responses=_errors(503))
    async def health() -> Response:
        """Say whether requests are taken; asks for no key."""
        status = served.service.status()
        said = {
            "status": "ending" if answering.is_leaving else "ok", "model": served.lm.name, "riding": status.num_riding,
            "waiting": status.num_waiting, "place": answering.place(),
        }  # fmt: skip
        return JSONResponse(said, 503 if answering.is_leaving else 200)

    @app.get("/metrics", responses=_errors(401), response_class=PlainTextResponse)
    async def metrics(request: Request) -> Response:
        """Return counts in Prometheus's format."""
        check_key(request, served.key)
        return Response(answering.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi(request: Request) -> Response:
        check_key(request, served.key)
        return JSONResponse(app.openapi())

    app.add_exception_handler(HTTPError, _refused)
    app.add_exception_handler(HTTPException, _not_routed)
    app.add_exception_handler(RequestValidationError, _not_valid)
    app.add_exception_handler(Exception, _failed)
    return app


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPError), "it is registered for them"
    body = error_body(str(error), error.kind, error.param, error.code)
    return JSONResponse(body, error.status, headers=error.headers)


async def _not_routed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "it is registered for them"
    known = f"there are {COMPLETIONS}, {CHAT}, {MODELS}, /health and /metrics"
    if error.status_code == 404:
        message, code = f"{request.url.path} is not here; {known}", "unsupported_endpoint"
    elif error.status_code == 405:
        message, code = f"{request.url.path} takes no {request.method}", "method_not_allowed"
    else:
        message, code = str(error.detail), "invalid_request"
    body = error_body(message, "invalid_request_error", None, code)
    return JSONResponse(body, error.status_code, headers=error.headers)


async def _not_valid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError), "it is registered for them"
    first = error.errors()[0]
    return JSONResponse(
        error_body(first["msg"], "invalid_request_error", str(first["loc"][-1]), "invalid_value"), 422
    )


async def _failed(_: Request, error: Exception) -> Response:
    return JSONResponse(
        error_body("the request failed; the server's log says why", "server_error", None, "server_error"), 500
    )
