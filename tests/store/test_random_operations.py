"""Any operations in any order keep a store sound."""

import shutil
import tempfile
from pathlib import Path

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from promptcache.errors import StoreError, StoreFullError
from promptcache.segments.fingerprint import Fingerprint
from promptcache.store import PrefixStore
from promptcache.store.reports import PrunePolicy
from tests.helpers.invariants import check_invariants
from tests.helpers.places import IN_MEMORY
from tests.helpers.segments import (
    TINY,
    blob_nbytes,
    blob_paths,
    cached_tokens,
    check_match,
    expected_key,
    files_nbytes,
    flip,
    longest_shared,
    save,
    save_with_checkpoints,
)
from tests.helpers.stores import OTHER
from tests.helpers.strategies import prompts


class StoreMachine(RuleBasedStateMachine):
    """Any operations in any order."""

    @initialize(extra=st.integers(20_000, 150_000))
    def open(self, extra: int) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=IN_MEMORY))
        with PrefixStore(self.folder) as store:
            self.limit = store.total_nbytes() + extra
        self.store = PrefixStore(self.folder, max_nbytes=self.limit)
        self.prompts: list[list[int]] = []
        self.checkpointed: list[list[int]] = []
        self.pinned: dict[str, tuple[Fingerprint, list[int]]] = {}

    @rule(prompt=prompts(), width=st.integers(1, 60))
    def save(self, prompt: list[int], width: int) -> None:
        before = {path: path.stat().st_mtime_ns for path in blob_paths(self.store)}
        total = files_nbytes(self.folder)
        try:
            save(self.store, prompt, width=width)
            assert cached_tokens(self.store, prompt) == len(prompt)
            assert files_nbytes(self.folder) <= self.limit
        except StoreFullError:
            assert before.keys() <= set(blob_paths(self.store))
            assert files_nbytes(self.folder) <= max(self.limit, total)
        self.prompts.append(prompt)

    @rule(prompt=prompts())
    def look_up(self, prompt: list[int]) -> None:
        match = self.store.lookup(prompt, TINY)
        assert match.cached_tokens <= longest_shared(prompt, self.prompts)
        check_match(self.store, match, prompt)
        self.store.usage_log.touch(match)

    @rule(prompt=prompts(), width=st.integers(1, 60), data=st.data())
    def save_checkpointed(
        self, prompt: list[int], width: int, data: st.DataObject
    ) -> None:
        """Save under the model that can be resumed at checkpoints only."""
        places = data.draw(st.sets(st.integers(1, len(prompt)), max_size=4))
        total = files_nbytes(self.folder)
        try:
            save_with_checkpoints(self.store, prompt, places, OTHER, width=width)
            match = self.store.lookup(prompt, OTHER)
            assert match.cached_tokens == len(prompt)
            assert files_nbytes(self.folder) <= self.limit
        # Rows at its end may have gone to make room for a checkpoint on the way.
        except StoreError:
            assert files_nbytes(self.folder) <= max(self.limit, total)
        self.checkpointed.append(prompt)

    @rule(prompt=prompts())
    def look_up_checkpointed(self, prompt: list[int]) -> None:
        match = self.store.lookup(prompt, OTHER)
        assert match.cached_tokens <= longest_shared(prompt, self.checkpointed)
        assert not match.slices or match.slices[-1].start == match.cached_tokens
        check_match(self.store, match, prompt)
        self.store.usage_log.touch(match)

    @precondition(lambda self: self.store.prefixes())
    @rule(data=st.data(), name=st.sampled_from("ab"))
    def pin(self, data: st.DataObject, name: str) -> None:
        prefix = data.draw(st.sampled_from(self.store.prefixes()))
        report = self.store.report(prefix.key)
        pinned = report.fingerprint, list(report.token_ids)
        if cached_tokens(self.store, pinned[1], pinned[0]) < prefix.num_tokens:
            # What a checkpoint that was evicted or damaged has left.
            return
        self.store.pin(prefix.key, name)
        self.pinned = {n: p for n, p in self.pinned.items() if p != pinned}
        self.pinned[name] = pinned

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.pinned)))
        self.store.unpin(name)
        del self.pinned[name]

    @precondition(lambda self: self.store.prefixes())
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        prefix = data.draw(st.sampled_from(self.store.prefixes()))
        before = blob_nbytes(self.store)
        self.store.remove(prefix.key)
        assert before - blob_nbytes(self.store) == prefix.nbytes
        self.pinned.pop(prefix.name or "", None)

    @rule(nbytes=st.none() | st.integers(0, 200_000))
    def prune(self, nbytes: int | None) -> None:
        plan = self.store.plan_prune(PrunePolicy(max_nbytes=nbytes))
        before = blob_nbytes(self.store)
        report = self.store.execute(plan)
        assert report.removals == plan.removals
        assert report.garbage == plan.garbage
        swept = sum(g.nbytes for g in report.garbage if not g.path.startswith("blobs"))
        assert before - blob_nbytes(self.store) + swept == report.freed_nbytes
        assert nbytes is None or plan.over_nbytes or report.kept_nbytes <= nbytes

    @rule(lose_index=st.booleans())
    def reopen(self, lose_index: bool) -> None:
        keys = self.store._index.segment_keys()
        self.store.close()
        if lose_index:
            (self.folder / "index.db").unlink()
        self.store = PrefixStore(self.folder, max_nbytes=self.limit)
        assert self.store._index.segment_keys() >= keys

    @precondition(lambda self: bool(blob_paths(self.store)))
    @rule(data=st.data(), delete=st.booleans())
    def damage(self, data: st.DataObject, delete: bool) -> None:
        path = data.draw(st.sampled_from(blob_paths(self.store)))
        known = path.stem in self.store._index.segment_keys()
        if delete:
            path.unlink()
        else:
            flip(path)
        report = self.store.verify(fix=True)
        assert [d.key for d in report.damaged] == ([] if delete else [path.stem])
        assert list(report.missing) == ([path.stem] if delete and known else [])
        names = {prefix.name for prefix in self.store.prefixes()}
        self.pinned = {n: p for n, p in self.pinned.items() if n in names}

    @invariant()
    def store_is_sound(self) -> None:
        if hasattr(self, "store"):
            check_invariants(self.store)

    @invariant()
    def pinned_prefixes_are_there(self) -> None:
        if hasattr(self, "store"):
            named = {p.name: p.key for p in self.store.prefixes() if p.name}
            assert named.keys() == self.pinned.keys()
            for name, (model, prompt) in self.pinned.items():
                assert named[name] == expected_key(model.digest, prompt)
                assert cached_tokens(self.store, prompt, model) == len(prompt)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.folder)


def test_any_operations_in_any_order_keep_the_store_sound() -> None:
    run_state_machine_as_test(
        StoreMachine,
        # Without shrinking, which takes minutes with real files.
        settings=settings(
            deadline=None,
            max_examples=25,
            stateful_step_count=20,
            phases=[Phase.explicit, Phase.reuse, Phase.generate],
        ),
    )
