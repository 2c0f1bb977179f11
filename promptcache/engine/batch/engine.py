"""The engine: many requests over one model, on one thread."""

import threading
from typing import Any, TypedDict, Unpack

from promptcache.engine.batch.run import Listener, Run
from promptcache.engine.batch.scheduler import Scheduler
from promptcache.engine.generation import Generation
from promptcache.engine.options import GenerateOptions, request_of
from promptcache.engine.request import Progress, ignore_progress
from promptcache.errors import warn
from promptcache.models.text_model import TextModel
from promptcache.prompts.render import RenderedPrompt
from promptcache.tiers.prefix_cache import PrefixCache
from promptcache.tiers.prompt_read import SavePolicy


class EngineLimits(TypedDict, total=False):
    """How much an engine does at once.

    Attributes:
        max_decoding: How many answers it generates, 32 by default.
        max_reading: How many prompts it reads, 8 by default.
    """

    max_decoding: int
    max_reading: int


class Engine:
    """Runs requests that are submitted from any thread.

    Either a thread of its own does that, between `start` and `close`, or whoever calls
    `step` until it returns False.
    """

    def __init__(
        self,
        model: TextModel,
        prefixes: PrefixCache,
        *,
        save: SavePolicy,
        reuse: bool,
        **limits: Unpack[EngineLimits],
    ) -> None:
        """Take what it runs on.

        Args:
            model: The model.
            prefixes: Where prompts are fetched from, and kept.
            save: Whether to save prompts, unless a request says otherwise.
            reuse: Whether to look for cached prefixes, likewise.
            limits: How many answers to generate, and how many prompts to read, at once.
        """
        self._model = model
        self._prefixes = prefixes
        self._save: SavePolicy = save
        self._reuse = reuse
        self._scheduler = Scheduler(model.loaded, prefixes, **limits)
        self._thread: threading.Thread | None = None
        self._is_closing = False

    def submit(
        self,
        prompt: RenderedPrompt,
        max_tokens: int,
        listener: Listener,
        *,
        prompt_progress_callback: Progress = ignore_progress,
        **options: Unpack[GenerateOptions],
    ) -> Run:
        """Take in a request; what comes of it is told to its listener.

        Args:
            prompt: What `CachedGenerator.render` returned.
            max_tokens: Most tokens to generate, -1 for no limit.
            listener: Who asked.
            prompt_progress_callback: Called with the prompt tokens done so far and
                their total, on the engine's thread.
            options: As `CachedGenerator.stream_generate` takes them.

        Raises:
            UsageError: The options make no sense, or mlx-lm cannot do it with this
                model.
        """
        request = request_of(
            self._model,
            prompt,
            max_tokens,
            options,
            save=self._save,
            reuse=self._reuse,
            on_progress=prompt_progress_callback,
        )
        generation = Generation(
            self._model.loaded, self._model.tokenizer, self._prefixes, request
        )
        run = Run.of(generation, listener, self._model.loaded)
        self._scheduler.submit(run)
        return run

    def cancel(self, run: Run) -> None:
        """End a request at its next step; what was read of it is kept."""
        self._scheduler.cancel(run)

    @property
    def num_waiting(self) -> int:
        """Return how many requests wait for others."""
        return self._scheduler.num_waiting

    @property
    def num_active(self) -> int:
        """Return how many requests are being loaded, read or answered."""
        return self._scheduler.num_active

    @property
    def num_waits(self) -> int:
        """Return how many requests had to wait for others so far."""
        return self._scheduler.num_waits

    @property
    def prefixes(self) -> PrefixCache:
        """Return where it fetches prompts from, and keeps them."""
        return self._prefixes

    def step(self) -> bool:
        """Take every request a step further; return whether any is left."""
        return self._scheduler.step()

    def start(self) -> None:
        """Run requests on a thread of its own."""
        self._thread = threading.Thread(
            target=self._run, name="promptcache-engine", daemon=True
        )
        self._thread.start()

    def _run(self) -> None:
        while not self._is_closing:
            try:
                if not self.step():
                    self._scheduler.wait()
            # It has no caller; its next step may go well.
            except Exception as error:
                warn(f"a step of the engine has failed: {error!r}")
        self._scheduler.close()

    def close(self) -> None:
        """End all requests, and finish what is being saved."""
        self._is_closing = True
        if self._thread is None:
            self._scheduler.close()
        else:
            self._scheduler.interrupt()
            self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()
