"""The description of the server's paths, as OpenAPI has it."""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from promptcache.server.api.chat_completions import ChatRequest
from promptcache.server.api.messages import MessageRequest, TokenCountRequest
from promptcache.server.api.responses import ResponseRequest
from promptcache.server.api.text_completions import TextRequest
from promptcache.server.cache_routes import PinRequest, UnpinRequest

# By path, what it is for and what is posted to it.
POSTS: dict[str, tuple[str, type[BaseModel]]] = {
    "/v1/chat/completions": ("OpenAI's chat completions", ChatRequest),
    "/v1/completions": ("OpenAI's text completions", TextRequest),
    "/v1/responses": ("OpenAI's responses", ResponseRequest),
    "/v1/messages": ("Anthropic's messages", MessageRequest),
    "/v1/messages/count_tokens": ("Tokens of a message", TokenCountRequest),
    "/v1/cache/warm": ("Read and keep a prompt, and answer nothing", ChatRequest),
    "/v1/cache/explain": ("Why a prompt hits or misses", ChatRequest),
    "/v1/cache/pin": ("Keep a prefix under a name", PinRequest),
    "/v1/cache/unpin": ("Give up a name", UnpinRequest),
}
GETS = {
    "/v1/models": "The models",
    "/v1/cache": "The prefixes that are stored",
    "/metrics": "Metrics for Prometheus",
    "/health": "Whether the server answers",
}


def describe(version: str) -> dict[str, Any]:
    """Return the description of all paths, as JSON."""
    models = {model for _, model in POSTS.values()}
    template = "#/components/schemas/{model}"
    by_model, schemas = models_json_schema(
        [(model, "validation") for model in models], ref_template=template
    )
    paths: dict[str, Any] = {
        path: {"get": _operation(text)} for path, text in GETS.items()
    }
    for path, (text, model) in POSTS.items():
        content = {"application/json": {"schema": by_model[model, "validation"]}}
        body = {"required": True, "content": content}
        paths[path] = {"post": {**_operation(text), "requestBody": body}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "promptcache", "version": version},
        "paths": paths,
        "components": {"schemas": schemas.get("$defs", {})},
    }


def _operation(text: str) -> dict[str, Any]:
    return {
        "summary": text,
        "responses": {
            "200": {"description": "The answer"},
            "4XX": {"description": "What is wrong with the request"},
            "5XX": {"description": "What is wrong with the server"},
        },
    }
