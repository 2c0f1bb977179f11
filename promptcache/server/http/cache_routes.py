"""The cache API: what a server's cache holds, and why a prompt hits or misses."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from promptcache.errors import PromptCacheError
from promptcache.explain.explain import explain_prompt
from promptcache.prompts.render import render_prompt
from promptcache.server.backend.model_provider import (
    IdentifiedModelProvider,
    ServedModel,
    UnavailableError,
)
from promptcache.server.http.validation import BadRequestError, check_completion
from promptcache.store import PrefixStore
from promptcache.store.reports import PinQuota, Prefix


class CacheApi:
    """Answers questions about the cache, each as if its namespace were alone."""

    def __init__(
        self,
        store: PrefixStore | None,
        provider: IdentifiedModelProvider,
        quota: PinQuota | None,
    ) -> None:
        self._store = store
        self._provider = provider
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
        is_chat = "messages" in body
        check_completion(body, is_chat=is_chat)
        current = self._model(body)
        config = self._provider.cli_args.chat_template_args
        rendered = render_prompt(
            current.tokenizer,
            body["messages"] if is_chat else body["prompt"],
            tools=body.get("tools"),
            chat_template_config=config | (body.get("chat_template_kwargs") or {}),
            every_message=current.loaded.needs_checkpoints(current.settings),
        )
        current.loaded.check_token_ids(rendered.token_ids)
        settings = replace(current.settings, namespace=namespace)
        fingerprint = current.loaded.fingerprint(settings)
        store = self._usable()
        explanation = explain_prompt(store, current.tokenizer, rendered, fingerprint)
        return explanation.to_json()

    def _model(self, body: Mapping[str, Any]) -> ServedModel:
        """Return the model of a request, if it is the one that is loaded.

        A different one may be loaded for other clients, which stays their secret.
        """
        current = self._provider.current
        name, draft = (body.get(n, "default_model") for n in ("model", "draft_model"))
        if not isinstance(name, str) or not isinstance(draft, str | None):
            raise BadRequestError("model and draft_model must be names")
        is_loaded = self._provider.serves(name, body.get("adapters"), draft)
        if current is None or not is_loaded:
            raise UnavailableError("this model is not loaded now, ask again later")
        return current

    def pin(self, namespace: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Pin a prefix under a name.

        Raises:
            UsageError: There is no such prefix, or the name cannot be used.
            QuotaError: More would be pinned than may be.
            StoreError: The store cannot be written.
        """
        key, name = body.get("key"), body.get("name")
        if not isinstance(key, str) or not isinstance(name, str):
            raise BadRequestError("give a key and a name to pin it under")
        prefix = self._usable().pin(key, name, namespace=namespace, quota=self._quota)
        return _as_json(prefix)

    def unpin(self, namespace: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Unpin the prefix of a name. Raises as `pin` does."""
        name = body.get("name")
        if not isinstance(name, str):
            raise BadRequestError("give the name to give up")
        return _as_json(self._usable().unpin(name, namespace=namespace))

    def _usable(self) -> PrefixStore:
        if self._store is None:
            raise PromptCacheError("this server has no store")
        return self._store


def _as_json(prefix: Prefix) -> dict[str, Any]:
    """Return a prefix as JSON shows it to a client, who knows of no namespaces."""
    fields = prefix.to_json()
    del fields["namespace"]
    return fields
