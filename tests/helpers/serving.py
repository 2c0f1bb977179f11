"""A real server in a process of its own, and OpenAI's client for it."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import openai

from tests.helpers import served

Messages = list[dict[str, Any]]


class Answer(NamedTuple):
    """What a completion gave."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    finish_reason: str | None

    @property
    def prefilled_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens


class Server(served.Server):
    """`promptcache serve` on a port of its own."""

    def client(self, key: str = "none") -> openai.OpenAI:
        """Return OpenAI's client, which tries once."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=200
        )


@contextlib.contextmanager
def running(model: Path | str | None, *options: Any, **more: Any) -> Iterator[Server]:
    """Run a server, and kill it in the end."""
    server = Server(model, *options, **more)
    try:
        yield server
    finally:
        server.kill()


def ask(
    client: openai.OpenAI, messages: Messages, *, stream: bool = True, **options: Any
) -> Answer:
    """Ask for an answer at temperature 0."""
    arguments = {
        "model": "default_model",
        "messages": messages,
        "max_tokens": 16,
        "temperature": 0,
        **options,
    }
    if not stream:
        whole = client.chat.completions.create(**arguments)
        choice = whole.choices[0]
        return _answer(choice.message.content or "", choice.finish_reason, whole.usage)
    text, reason, usage = "", None, None
    for part in client.chat.completions.create(
        **arguments, stream=True, stream_options={"include_usage": True}
    ):
        usage = part.usage or usage
        for choice in part.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    return _answer(text, reason, usage)


def _answer(text: str, reason: str | None, usage: Any) -> Answer:
    details = usage.prompt_tokens_details
    return Answer(
        text,
        usage.prompt_tokens,
        details.cached_tokens if details else 0,
        usage.completion_tokens,
        reason,
    )


def ask_at_once(
    server: Server, prompts: Sequence[Messages], **options: Any
) -> list[Answer]:
    """Ask all of these at the same time, each from a client of its own."""
    barrier = threading.Barrier(len(prompts))

    def one(messages: Messages) -> Answer:
        client = server.client()
        barrier.wait()
        return ask(client, messages, **options)

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(one, prompts))


def system_and(system: str, *said: str) -> Messages:
    """Return messages with a system prompt, and users and answers in turn."""
    roles = ["user", "assistant"] * len(said)
    turns = [{"role": r, "content": c} for r, c in zip(roles, said, strict=False)]
    return [{"role": "system", "content": system}, *turns]
