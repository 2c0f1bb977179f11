"""The cache API: what a server's cache holds, and why a prompt hits or misses."""

from collections.abc import Mapping
from typing import Any

from promptcache import json_form
from promptcache.errors import KeyNotFoundError, PromptCacheError
from promptcache.generator import CachedGenerator
from promptcache.reports import Prefix
from promptcache.server.model_provider import (
    IdentifiedModelProvider,
    UnavailableError,
)
from promptcache.server.request_check import BadRequestError, check_completion
from promptcache.store import PrefixStore, check_name


class CacheApi:
    """Answers questions about the cache, each within one namespace."""

    def __init__(
        self, store: PrefixStore | None, provider: IdentifiedModelProvider
    ) -> None:
        """Take the store, and what has the model."""
        self._store = store
        self._provider = provider

    def prefixes(self, namespace: str) -> dict[str, Any]:
        """Return the prefixes of a namespace. Raises StoreError."""
        found = self._usable().prefixes(namespace=namespace)
        return {
            "object": "list",
            "data": [json_form.of_prefix(prefix) for prefix in found],
        }

    def explain(self, namespace: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Say what a request with this body would reuse, and why not more.

        Raises:
            UsageError: It is no request.
            UnavailableError: No model is loaded.
            StoreError: The store cannot be read.
        """
        is_chat = "messages" in body
        check_completion(body, is_chat=is_chat)
        current = self._provider.current
        if current is None:
            raise UnavailableError("no model is loaded now, ask again later")
        template_args = self._provider.cli_args.chat_template_args
        generator = CachedGenerator(
            current.model,
            current.tokenizer,
            store=self._usable(),
            memory_limit=0,
            namespace=namespace,
            identity=current.identity,
            chat_template_config=template_args
            | (body.get("chat_template_kwargs") or {}),
        )
        settings = current.settings
        explanation = generator.explain(
            body["messages"] if is_chat else body["prompt"],
            tools=body.get("tools"),
            kv_bits=settings.kv.bits,
            kv_group_size=settings.kv.group_size,
            quantized_kv_start=settings.kv.start,
            prefill_step_size=settings.step_size,
            store_bits=settings.store_bits,
        )
        return json_form.of_explanation(explanation)

    def pin(self, namespace: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Pin a prefix under a name.

        Raises:
            UsageError: There is no such prefix, or the name cannot be used.
            StoreError: The store cannot be written.
        """
        key, name = body.get("key"), body.get("name")
        if not isinstance(key, str) or not isinstance(name, str):
            raise BadRequestError("give a key and a name to pin it under")
        check_name(name)
        prefix = self._own(namespace, key)
        self._check_free(namespace, name)
        return json_form.of_prefix(self._usable().pin(prefix.key, name))

    def unpin(self, namespace: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Give up a name. Raises as `pin` does."""
        name = body.get("name")
        if not isinstance(name, str):
            raise BadRequestError("give the name to give up")
        for prefix in self._usable().prefixes(namespace=namespace):
            if prefix.name == name:
                return json_form.of_prefix(self._usable().unpin(name))
        raise KeyNotFoundError(f"nothing is pinned as {name!r}")

    def _own(self, namespace: str, key: str) -> Prefix:
        """Return the prefix of a namespace whose key begins so."""
        prefixes = self._usable().prefixes(namespace=namespace)
        found = [prefix for prefix in prefixes if key and prefix.key.startswith(key)]
        if len(found) != 1:
            raise KeyNotFoundError(f"{len(found)} prefixes have a key like {key!r}")
        return found[0]

    def _check_free(self, namespace: str, name: str) -> None:
        """Raise if a name is used in another namespace, whose pin would go."""
        store = self._usable()
        own = {prefix.name for prefix in store.prefixes(namespace=namespace)}
        if name not in own and name in {prefix.name for prefix in store.prefixes()}:
            raise BadRequestError(f"the name {name!r} cannot be used")

    def _usable(self) -> PrefixStore:
        if self._store is None:
            raise PromptCacheError("this server has no store")
        return self._store
