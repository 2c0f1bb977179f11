"""Conversations: turns that each reuse the cache of the earlier ones."""

import contextlib
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Self, Unpack

from promptcache.chat.transcript import INTERRUPTED, Transcript, transcript_path
from promptcache.engine.response import GenerationResponse
from promptcache.errors import PromptCacheError, StoreError, UsageError
from promptcache.explain.types import Explanation
from promptcache.generator import CachedGenerator
from promptcache.models.settings import ReadOptions
from promptcache.prompts.chat import Message
from promptcache.prompts.parts import compose
from promptcache.prompts.render import RenderedPrompt


class Conversation:
    """A conversation with a model.

    Every turn is rendered as a whole and matched by its token ids, so that it reuses
    what is still the same, even where the chat template drops earlier thoughts. The
    prompt and the answer are saved, and the next turn, also of a different process,
    reads only what is new.

    With a generator that saves nothing, nothing is saved here, either. A named
    conversation is written to a file in the store's folder before it is shown.
    """

    def __init__(
        self,
        generator: CachedGenerator,
        *,
        name: str | None = None,
        system: str | None = None,
        tools: Sequence[Message] | None = None,
        chat_template_config: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin a conversation, or continue the one of this name.

        Args:
            generator: The generator of the answers.
            name: Keep it under this name; without one it ends with the process.
            system: The system prompt of a new conversation.
            tools: Tools for the chat template.
            chat_template_config: Further arguments of the chat template.

        Raises:
            UsageError: The conversation of this name began differently, or a different
                process has it open.
            StoreError: It cannot be written.
        """
        self._generator = generator
        head = {
            "system": system,
            "tools": None if tools is None else list(tools),
            "chat_template_config": chat_template_config,
        }
        path = None
        if name is not None:
            if generator.store is None:
                raise StoreError("there is no store to keep the conversation in")
            path = transcript_path(
                generator.store.path, name, namespace=generator.namespace
            )
        self._transcript = Transcript(path, head)
        self._is_answering = False

    @property
    def messages(self) -> list[Message]:
        """Return the chat messages so far, the system prompt first."""
        return compose(
            system=self._transcript.head["system"], messages=self._transcript.messages
        )

    @property
    def num_turns(self) -> int:
        """Return how many messages the user has sent."""
        return sum(m["role"] == "user" for m in self._transcript.messages)

    @property
    def is_answered(self) -> bool:
        """Return whether the last user's message has an answer, or a part of one.

        A process that was killed before its first token leaves none.
        """
        return self._transcript.is_ended

    def say(self, text: str, **options: Any) -> Generator[GenerationResponse]:
        """Add a user's message and yield the answer, token by token.

        What was yielded is kept, even when the generator is closed early.

        Args:
            text: The user's message.
            options: See `CachedGenerator.stream_generate`.

        Raises:
            UsageError: The chat template refuses it, or an answer is going on.
            StoreError: It cannot be written.
        """
        self._check_idle()
        message = {"role": "user", "content": text}
        rendered = self._render([*self.messages, message])
        self._transcript.add(message)
        yield from self._answer(rendered, options)

    def answer(self, **options: Any) -> Generator[GenerationResponse]:
        """Answer a last user's message that has no answer yet; see `say`."""
        self._check_idle()
        if self.is_answered:
            raise UsageError("everything has been answered, say something first")
        yield from self._answer(self._render(self.messages), options)

    def _check_idle(self) -> None:
        if self._is_answering:
            raise UsageError("an answer is going on, close it first")

    def explain(
        self, text: str | None = None, **options: Unpack[ReadOptions]
    ) -> Explanation:
        """Explain what a turn would reuse, and why not more.

        Args:
            text: The user's next message, or None to answer the last one.
            options: See `ReadOptions`.

        Raises:
            UsageError: The chat template refuses it.
            StoreError: The store cannot be read.
        """
        more = [] if text is None else [{"role": "user", "content": text}]
        rendered = self._render([*self.messages, *more])
        return self._generator.explain(rendered, **options)

    def _render(self, messages: Sequence[Message]) -> RenderedPrompt:
        head = self._transcript.head
        return self._generator.render(
            messages, head["tools"], head["chat_template_config"]
        )

    def _answer(
        self, rendered: RenderedPrompt, options: Mapping[str, Any]
    ) -> Generator[GenerationResponse]:
        self._is_answering = True
        try:
            with contextlib.closing(self._responses(rendered, options)) as responses:
                for response in responses:
                    if response.text:
                        self._transcript.add_text(response.text)
                    if response.finish_reason is not None:
                        self._transcript.end(response.finish_reason)
                    yield response
        except PromptCacheError:
            if not self._transcript.is_ended:
                self._transcript.undo()
            raise
        finally:
            if not self._transcript.is_ended:
                self._transcript.end(INTERRUPTED)
            self._is_answering = False

    def _responses(
        self, rendered: RenderedPrompt, options: Mapping[str, Any]
    ) -> Generator[GenerationResponse]:
        saving = {"save": self._generator.save is not False, "save_answer": True}
        started = time.time()
        return self._generator.stream_generate(
            rendered,
            on_saved=lambda key: self._replace_listed(key, started),
            **{**saving, **options},
        )

    def _replace_listed(self, key: str, started: float) -> None:
        """List what was saved in place of what the previous turn had listed."""
        before, store = self._transcript.key, self._generator.store
        # If the store fails, the list only has more entries.
        with contextlib.suppress(PromptCacheError):
            assert store is not None
            # Others may have listed the same before: then it is not ours to unlist.
            listed_at = store.listed_at(key)
            if listed_at is None or listed_at < started:
                return
            self._transcript.note_key(key)
            if before is not None and before != key:
                store.unlist(before)

    def undo(self) -> bool:
        """Remove the last user's message and its answer; return whether one existed.

        Raises:
            UsageError: An answer is going on.
            StoreError: It cannot be written.
        """
        self._check_idle()
        return self._transcript.undo()

    def close(self) -> None:
        """Close the file of a named conversation."""
        self._transcript.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
