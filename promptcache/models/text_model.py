"""The text model: a model with its tokenizer, and what prompts are to it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from mlx_lm.tokenizer_utils import TokenizerWrapper

from promptcache.errors import UsageError
from promptcache.models.identity.identity import ModelIdentity
from promptcache.models.loaded import LoadedModel
from promptcache.models.settings import DEFAULT_SETTINGS, ReadOptions, Settings
from promptcache.prompts import render
from promptcache.prompts.chat import Message, is_messages
from promptcache.prompts.parts import PromptParts, compose
from promptcache.prompts.render import Prompt, RenderedPrompt
from promptcache.segments.fingerprint import Fingerprint


class TextModel:
    """A model with its tokenizer.

    Attributes:
        model: A model of mlx-lm.
        tokenizer: mlx-lm's wrapper of its tokenizer.
        namespace: Prefixes are found only under the namespace they were saved in.
        loaded: The model, with what identifies it.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        namespace: str = "",
        chat_template_config: Mapping[str, Any] | None = None,
        identity: ModelIdentity | None = None,
        announce: Callable[[str], None] | None = None,
    ) -> None:
        if not isinstance(tokenizer, TokenizerWrapper):
            tokenizer = TokenizerWrapper(tokenizer)
        self.model = model
        self.tokenizer = tokenizer
        self.namespace = namespace
        self.loaded = LoadedModel(model, identity=identity, announce=announce)
        self._chat_template_config = chat_template_config

    @property
    def identity(self) -> ModelIdentity:
        """Return what the model is now; hash it if that is unknown.

        Raises ModelError if it cannot be hashed.
        """
        return self.loaded.identity

    def refresh_identity(self) -> None:
        """Hash the model and its drafts again before their next use.

        Needed after an array was changed in place (`weight[0] = 1`). Arrays, modules
        and plain attributes that were replaced are noticed without this.
        """
        self.loaded.refresh_identity()

    def settings(self, **options: Unpack[ReadOptions]) -> Settings:
        """Return how prompts are read here with these options. Raises UsageError."""
        options.setdefault("namespace", self.namespace)
        return Settings.of(**options)

    def fingerprint(self, settings: Settings = DEFAULT_SETTINGS) -> Fingerprint:
        """Return what KV values depend on now, besides the token ids.

        Raises ModelError if the model cannot be hashed.
        """
        namespace = settings.namespace or self.namespace
        return self.loaded.fingerprint(replace(settings, namespace=namespace))

    def load_draft(self, path_or_hf_repo: str | Path) -> Any:
        """Load a draft model for `build` and `stream_generate`.

        Raises:
            ModelError: It cannot be found or loaded, or its vocabulary differs.
        """
        return self.loaded.load_draft(path_or_hf_repo, self.tokenizer.vocab_size)

    def render(
        self,
        prompt: Prompt,
        tools: Sequence[Message] | None = None,
        chat_template_config: Mapping[str, Any] | None = None,
    ) -> RenderedPrompt:
        """Return a prompt as token ids, with the boundaries worth resuming from.

        Args:
            prompt: Text, token ids or chat messages.
            tools: Tools for the chat template.
            chat_template_config: Further arguments of the chat template, in place of
                the generator's.

        Raises:
            UsageError: The prompt is empty, or not a prompt of this model.
        """
        rendered = render.render_prompt(
            self.tokenizer,
            prompt,
            **self._template_options(tools, chat_template_config),
        )
        self.loaded.check_token_ids(rendered.token_ids)
        return rendered

    def render_open(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None = None,
        chat_template_config: Mapping[str, Any] | None = None,
    ) -> RenderedPrompt:
        """Return what comes before the last user's text, or before its last part.

        Args:
            messages: Chat messages with a user's text to be replaced.
            tools: See `render`.
            chat_template_config: See `render`.

        Raises:
            UsageError: Nothing comes before it.
        """
        rendered = render.render_prefix(
            self.tokenizer,
            messages,
            **self._template_options(tools, chat_template_config),
        )
        self.loaded.check_token_ids(rendered.token_ids)
        return rendered

    def render_parts(self, parts: PromptParts) -> RenderedPrompt:
        """Return a whole prompt from its parts. Raises UsageError."""
        if parts.raw:
            return self.render(parts.text())
        messages = parts.compose(parts.prompt)
        return self.render(messages, parts.tools, parts.chat_template_config)

    def render_prefix(self, parts: PromptParts) -> RenderedPrompt:
        """Return what to build for a prompt in parts.

        Without a user's text, that is everything before it. Raises UsageError.
        """
        if not parts.is_prefix:
            return self.render_parts(parts)
        messages = parts.compose("")
        return self.render_open(messages, parts.tools, parts.chat_template_config)

    def render_whole(
        self,
        prompt: Prompt | None,
        system: str | None,
        tools: Sequence[Message] | None,
        chat_template_config: Mapping[str, Any] | None,
    ) -> RenderedPrompt:
        """Return the prompt to build from its parts, as `build` takes them.

        Without a prompt, that is what comes before the user's text. Raises UsageError.
        """
        if prompt is None:
            if system is None and not tools:
                raise UsageError("there is nothing to build, give a prompt or a system")
            messages = compose(system=system, user="")
            return self.render_open(messages, tools, chat_template_config)
        if isinstance(prompt, str) and (system is not None or tools):
            prompt = compose(system=system, user=prompt)
        elif is_messages(prompt):
            prompt = compose(system=system, messages=prompt)
        return self.render(prompt, tools, chat_template_config)

    def _template_options(
        self,
        tools: Sequence[Message] | None,
        config: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        return {
            "tools": tools,
            "chat_template_config": (
                self._chat_template_config if config is None else config
            ),
            "every_message": self.loaded.needs_checkpoints(),
        }
