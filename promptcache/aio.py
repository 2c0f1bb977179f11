"""AsyncCachedGenerator: many generations at once, for coroutines."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Self, Unpack

import mlx.core as mx

from promptcache.engine.batch.engine import EngineLimits
from promptcache.engine.decode import Step
from promptcache.engine.options import GenerateOptions
from promptcache.engine.request import RequestState
from promptcache.engine.response import GenerationResponse, Responses
from promptcache.generator import CachedGenerator
from promptcache.prompts.chat import Message
from promptcache.prompts.render import Prompt


class AsyncCachedGenerator:
    """Runs the generations of coroutines together, on a thread beside the event loop.

    Attributes:
        generator: What they run on. It is not closed, and nothing else may generate
            with it meanwhile.
    """

    def __init__(
        self, generator: CachedGenerator, **limits: Unpack[EngineLimits]
    ) -> None:
        """Start an engine; see `EngineLimits`."""
        self.generator = generator
        self._engine = generator.engine(**limits)
        self._engine.start()

    async def stream_generate(
        self,
        prompt: Prompt,
        max_tokens: int = 256,
        *,
        tools: Sequence[Message] | None = None,
        chat_template_config: Mapping[str, Any] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncIterator[GenerationResponse]:
        """Generate token by token; takes and raises what `CachedGenerator`'s does.

        Closed or cancelled, the generation ends with its next step, and what it has
        read is kept.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def post(item: Any) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        rendered = await asyncio.to_thread(
            self.generator.render, prompt, tools, chat_template_config
        )
        num_prompt = len(rendered.token_ids)
        listener = _Listener(self.generator.tokenizer, num_prompt, post)
        run = self._engine.submit(rendered, max_tokens, listener, **options)
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self._engine.cancel(run)

    async def generate(self, prompt: Prompt, **kwargs: Any) -> str:
        """Return the whole answer; see `stream_generate`."""
        return "".join([r.text async for r in self.stream_generate(prompt, **kwargs)])

    async def aclose(self) -> None:
        """End all generations, and finish what is being saved."""
        await asyncio.to_thread(self._engine.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()


class _Listener:
    """Hands responses from the engine's thread to an event loop."""

    def __init__(self, tokenizer: Any, num_prompt: int, post: Any) -> None:
        self._tokenizer = tokenizer
        self._num_prompt = num_prompt
        self._post = post
        self._responses: Responses | None = None

    def on_start(self, state: RequestState) -> None:
        self._responses = Responses(self._tokenizer, self._num_prompt, state)

    def on_token(self, step: Step, finish_reason: str | None) -> bool:
        assert self._responses is not None
        # Other threads can use what is computed only.
        mx.eval(step.logprobs)
        self._post(self._responses.of(step, finish_reason))
        return True

    def on_end(self, error: Exception | None) -> None:
        # None is the end.
        self._post(error)
