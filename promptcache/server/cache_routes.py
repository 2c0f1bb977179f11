"""The cache API: what a server's cache holds, and why a prompt hits or misses."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from promptcache.errors import PromptCacheError
from promptcache.explain.explain import explain_prompt
from promptcache.server.api import chat_completions, text_completions
from promptcache.server.api.fields import Body, Name
from promptcache.server.completion import Completion
from promptcache.server.models import Models
from promptcache.server.service import CompletionService
from promptcache.store import PrefixStore
from promptcache.store.reports import PinQuota, Prefix


class PinRequest(Body):
    """The body of `POST /v1/cache/pin`."""

    key: Name
    name: Annotated[str, Field(min_length=1)]


class UnpinRequest(Body):
    """The body of `POST /v1/cache/unpin`."""

    name: Annotated[str, Field(min_length=1)]


class CacheApi:
    """Answers questions about the cache, each as if its namespace were alone."""

    def __init__(
        self,
        store: PrefixStore | None,
        models: Models,
        service: CompletionService,
        quota: PinQuota | None,
    ) -> None:
        self._store = store
        self._models = models
        self._service = service
        self._quota = quota

    def prefixes(self, namespace: str) -> dict[str, Any]:
        """Return the prefixes of a namespace. Raises StoreError."""
        prefixes = self._usable().prefixes(namespace=namespace)
        return {
            "object": "list",
            "data": [_as_json(prefix) for prefix in prefixes],
        }

    def explain(self, namespace: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Explain what a request with this body would reuse, and why not more.

        Raises:
            UsageError: The request is malformed.
            UnavailableError: Its model is not loaded.
            StoreError: The store cannot be read.
        """
        completion = _completion_of(body)
        served = self._models.loaded(completion)
        rendered = self._service.render(served, completion)
        generator = served.generator
        settings = generator.settings(**served.read_options)
        fingerprint = generator.fingerprint(replace(settings, namespace=namespace))
        explanation = explain_prompt(
            self._usable(), generator.tokenizer, rendered, fingerprint
        )
        return explanation.to_json()

    def pin(self, namespace: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Pin a prefix under a name.

        Raises:
            UsageError: There is no such prefix, or the name cannot be used.
            QuotaError: More would be pinned than may be.
            StoreError: The store cannot be written.
        """
        request = PinRequest.model_validate(body)
        prefix = self._usable().pin(
            request.key, request.name, namespace=namespace, quota=self._quota
        )
        return _as_json(prefix)

    def unpin(self, namespace: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Unpin the prefix of a name. Raises as `pin` does."""
        request = UnpinRequest.model_validate(body)
        return _as_json(self._usable().unpin(request.name, namespace=namespace))

    def _usable(self) -> PrefixStore:
        if self._store is None:
            raise PromptCacheError("this server has no store")
        return self._store


def _completion_of(body: Mapping[str, Any]) -> Completion:
    """Return what a request for a chat or text completion asks for."""
    if "messages" in body:
        chat = chat_completions.ChatRequest.model_validate(body)
        return chat_completions.completion_of(chat)
    text = text_completions.TextRequest.model_validate(body)
    return text_completions.completion_of(text)


def _as_json(prefix: Prefix) -> dict[str, Any]:
    """Return a prefix as JSON shows it to a client, who knows of no namespaces."""
    fields = prefix.to_json()
    del fields["namespace"]
    return fields
