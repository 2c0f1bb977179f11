"""The scheduler: which request goes on next, and with whom.

One thread owns it, the models and all arrays. Every step reads one piece of one prompt
and generates one token of every answer: of those that mlx-lm can merge in one batch, of
the others one after the other. Prefixes are loaded beside it, on a thread of their own.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from promptcache.engine.batch.admission import Admission
from promptcache.engine.batch.decode_batch import DecodeBatch
from promptcache.engine.batch.endings import Endings
from promptcache.engine.batch.run import Run, joining_of
from promptcache.engine.decode import Decoder, Step
from promptcache.errors import warn
from promptcache.kvcache.classes import evaluate
from promptcache.models.length_dependence import batch_dependence
from promptcache.models.loaded import LoadedModel
from promptcache.tiers.prefix_cache import PrefixCache

MAX_DECODING = 32
MAX_READING = 8
# The shortest rest of a prompt is read first; one that has waited for so many pieces of
# others goes before them.
MAX_WAITED_PIECES = 4
# How often to look after what the writer does.
POLL_SECONDS = 0.01


class Scheduler:
    """Runs requests over one model.

    Invariants:
        What goes wrong with a request is its own error, and ends no other.
        A prefix that a request is reading is not read by others meanwhile.
    """

    def __init__(
        self,
        model: LoadedModel,
        prefixes: PrefixCache,
        *,
        max_decoding: int = MAX_DECODING,
        max_reading: int = MAX_READING,
    ) -> None:
        """Take what it runs on.

        Args:
            model: The model.
            prefixes: Where prompts are fetched from, and kept.
            max_decoding: How many answers to generate at once.
            max_reading: How many prompts to read at once.
        """
        self._model = model
        self._prefixes = prefixes
        self._max_decoding = max_decoding
        self._max_reading = max_reading
        self._admission = Admission(prefixes)
        is_independent = batch_dependence(model.model) is None
        self._can_batch = is_independent and model.length_dependence is None
        self._lock = threading.Lock()
        # How many requests had to wait for others.
        self.num_waits = 0
        self._submitted: list[Run] = []
        self._queue: list[Run] = []
        self._loading: list[Run] = []
        self._reading: list[Run] = []
        self._alone: list[Run] = []
        self._batch: DecodeBatch[Run] = DecodeBatch(model.model)
        self._endings = Endings()
        # Whether a request that waits may be able to go on.
        self._has_changed = False
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="promptcache-loader")
        self._wake = threading.Event()

    # On any thread

    def submit(self, run: Run) -> None:
        """Take in a request."""
        with self._lock:
            self._submitted.append(run)
        self._wake.set()

    def cancel(self, run: Run) -> None:
        """End a request at its next step; what was read of it is kept."""
        run.is_cancelled = True
        self._wake.set()

    @property
    def num_waiting(self) -> int:
        """Return how many requests wait for others."""
        return len(self._queue)

    @property
    def num_active(self) -> int:
        """Return how many requests are loaded, read or answered."""
        return len(self._running())

    def _running(self) -> list[Run]:
        return [*self._loading, *self._reading, *self._alone, *self._batch.members]

    # On the thread that owns it

    def run_all(self) -> None:
        """Run until every request has ended."""
        while self.step():
            pass

    def step(self) -> bool:
        """Take every request a step further; return whether any is left.

        Waits a moment where none can go on.
        """
        self._wake.clear()
        with self._lock:
            self._has_changed |= bool(self._submitted)
            self._queue += self._submitted
            self._submitted.clear()
        self._drop_cancelled()
        self._admit()
        self._decode()
        self._read()
        self._prefixes.advance()
        self._endings.advance()
        own = [*self._reading, *self._alone]
        self._admission.hold_limit(own, self._batch.nbytes)
        if own or len(self._batch):
            return True
        is_waiting = bool(self._queue or self._loading or self._endings)
        if is_waiting:
            self._wake.wait(POLL_SECONDS)
        return is_waiting

    def wait(self) -> None:
        """Wait until there is something to do, or another thread interrupts."""
        self._wake.wait()

    def interrupt(self) -> None:
        """End a wait."""
        self._wake.set()

    def close(self) -> None:
        """End all requests, and finish what is being saved."""
        for run in [*self._submitted, *self._queue, *self._running()]:
            run.is_cancelled = True
        self.run_all()
        self._loader.shutdown()

    @contextmanager
    def _guard(self, run: Run) -> Iterator[None]:
        """Make what goes wrong with a request its own error."""
        try:
            yield
        except Exception as error:
            self._remove(run)
            self._endings.add(run, error)

    def _remove(self, run: Run) -> None:
        for runs in (self._queue, self._loading, self._reading, self._alone):
            if run in runs:
                runs.remove(run)
        self._batch.leave(run)
        self._has_changed = True

    def _drop_cancelled(self) -> None:
        for run in [*self._queue, *self._running()]:
            is_loading = run.loading is not None and not run.loading.done()
            if run.is_cancelled and not is_loading:
                with self._guard(run):
                    self._finish(run)

    # Loading

    def _admit(self) -> None:
        """Have the requests loaded that need not wait for others."""
        if self._has_changed:
            self._has_changed = False
            for run in [*self._queue]:
                if len(self._loading) + len(self._reading) >= self._max_reading:
                    break
                if len(self._running()) >= self._max_decoding:
                    break
                with self._guard(run):
                    if self._admission.admits(
                        run,
                        loading=self._loading,
                        reading=self._reading,
                        answering=self._alone,
                        in_batch=self._batch.members,
                    ):
                        self._queue.remove(run)
                        self._load(run)
                    elif not run.has_waited:
                        run.has_waited = True
                        self.num_waits += 1
        for run in [*self._loading]:
            assert run.loading is not None
            if run.loading.done():
                self._loading.remove(run)
                with self._guard(run):
                    run.loading.result()
                    self._begin_to_read(run)

    def _load(self, run: Run) -> None:
        # Those who wait may need it, too.
        run.is_sharing = bool(self._queue)

        def load() -> None:
            run.generation.load(is_shared=run.is_sharing)
            evaluate(run.generation.state.fetched.cache)

        self._loading.append(run)
        run.loading = self._loader.submit(load)
        run.loading.add_done_callback(lambda _: self._wake.set())

    # Reading

    def _begin_to_read(self, run: Run) -> None:
        run.pieces = run.generation.read()
        if not run.has_answer:
            run.listener.on_start(run.generation.state)
        self._reading.append(run)

    def _read(self) -> None:
        """Read pieces of prompts, as many tokens as one piece may have.

        So answers wait for each other's prompts as long as for a piece of one, however
        many there are.
        """
        num_left = min((run.read.plan.step_size for run in self._reading), default=0)
        while self._reading and num_left > 0:
            num_left -= self._read_piece()
            # Those who wait for what was read now.
            self._admit()

    def _read_piece(self) -> int:
        """Read a piece of the prompt that is done first, or has waited for long.

        Return how many tokens it had.
        """
        longest = max(self._reading, key=lambda run: run.waited)
        shortest = min(self._reading, key=lambda r: r.read.num_tokens - r.num_read)
        run = longest if longest.waited >= MAX_WAITED_PIECES else shortest
        for other in self._reading:
            other.waited += 1
        run.waited = 0
        assert run.pieces is not None
        before = run.num_read
        with self._guard(run):
            is_read = next(run.pieces, run) is run
            self._has_changed = True
            if is_read:
                self._reading.remove(run)
                run.steps = run.generation.steps()
                self._alone.append(run)
                self._step_alone(run)
        return max(run.num_read - before, 1)

    # Decoding

    def _decode(self) -> None:
        self._form_batch()
        for run, step in self._step_batch():
            if run.error is not None:
                self._remove(run)
                self._endings.add(run, run.error)
            else:
                self._deliver(run, step)
        for run in [*self._alone]:
            self._step_alone(run)

    def _step_alone(self, run: Run) -> None:
        with self._guard(run):
            assert run.steps is not None
            step = next(run.steps, None)
            if step is None:
                self._finish(run)
            else:
                self._deliver(run, step)

    def _deliver(self, run: Run, step: Step) -> None:
        """Hand out a token, and end the request with the last one."""
        with self._guard(run):
            finish_reason = run.generation.note(step)
            if not run.has_answer:
                run.has_answer = True
                run.generation.keeper.begin()
            goes_on = run.listener.on_token(step, finish_reason)
            if finish_reason is not None or not goes_on:
                self._finish(run)

    def _finish(self, run: Run) -> None:
        """End a request after a whole token."""
        if run in self._batch:
            # Some of mlx-lm's classes cannot be taken out of a batch: of a layer that
            # is not used, for one. The answer is complete without.
            with suppress(Exception):
                run.generation.adopt(*self._batch.cache_of(run))
        self._admission.note_size(run)
        self._remove(run)
        self._endings.add(run)

    # The batch

    def _form_batch(self) -> None:
        """Have the answers decoded together that can be, unless there is only one."""
        joining = [r for r in self._alone if self._can_batch and r.generation.can_join]
        if len(joining) + len(self._batch) < 2:
            return
        for run in joining:
            with self._guard(run):
                assert isinstance(run.steps, Decoder)
                upcoming = run.steps.stop()
                if upcoming is not None:
                    self._deliver(run, upcoming)
        self._join([run for run in joining if run in self._alone])

    def _join(self, runs: list[Run]) -> None:
        """Have requests decoded in the batch, of which nothing is begun."""
        if not runs:
            return
        self._alone = [run for run in self._alone if run not in runs]
        try:
            self._batch.join([joining_of(run) for run in runs])
        except Exception:
            self._can_batch = False
            self._go_on_alone(runs)
            return
        for run in runs:
            with self._guard(run):
                # What it has read of the prompt can be used by others meanwhile.
                run.generation.keeper.give_away()

    def _step_batch(self) -> list[tuple[Run, Step]]:
        """Return the next tokens of the batch; where it fails, all go on alone."""
        if not len(self._batch):
            return []
        try:
            return self._batch.step()
        except Exception as error:
            warn(f"a batch has failed, its requests go on one by one: {error}")
            self._can_batch = False
            members = self._batch.members
            self._batch.clear()
            self._go_on_alone(members)
            return []

    def _go_on_alone(self, runs: list[Run]) -> None:
        """Have requests read again with their answers so far, and go on one by one."""
        for run in runs:
            with self._guard(run):
                run.generation.keeper.save_read()
                run.generation = run.generation.continued()
                run.__dict__.pop("data", None)
                self._load(run)
