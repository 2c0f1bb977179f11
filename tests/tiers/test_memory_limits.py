"""What does not fit into memory is read again, not restored."""

from pathlib import Path

import mlx.core as mx
import pytest

from promptcache import CachedGenerator, PromptCacheWarning
from promptcache.errors import StoreError
from promptcache.tiers import memory_limits

# They measure times and memory.
pytestmark = pytest.mark.alone

PROMPT = [i % 250 for i in range(100)]
GIB = 1024**3


def test_memory_of_this_machine_is_known() -> None:
    available = memory_limits.available_nbytes()

    assert available is None or 10_000_000 < available < 2**50


def test_restore_that_does_not_fit_is_one_warning_and_a_prefill(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "store"
    with CachedGenerator.load(model_dir, store=path, memory_limit=0) as generator:
        generator.build(PROMPT, prefill_step_size=32)
        warm = [*generator.stream_generate(PROMPT, 6, save=False)]
        monkeypatch.setattr(memory_limits, "available_nbytes", lambda: 1000)

        with pytest.warns(PromptCacheWarning, match="do not fit into") as record:
            cold = [*generator.stream_generate(PROMPT, 6, save=False)]

        monkeypatch.setattr(memory_limits, "available_nbytes", lambda: GIB)
        again = [*generator.stream_generate(PROMPT, 6, save=False)]

    assert len(record) == 1
    assert [r.token for r in cold] == [r.token for r in warm]
    assert cold[-1].cached_tokens == 0
    # Nothing was given up for it.
    assert again[-1].cached_tokens == warm[-1].cached_tokens == 99


def test_what_is_free_is_told() -> None:
    with pytest.raises(StoreError, match="of memory that are free"):
        if memory_limits.available_nbytes() is None:
            pytest.skip("it is not known here")
        memory_limits.check_fits(2**60)


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"free_memory": 10 * GIB, "total_memory": 20 * GIB}, 11 * GIB),
        ({"max_recommended_working_set_size": 12 * GIB}, 9 * GIB),
        ({"max_recommended_working_set_size": 2 * GIB}, 0),
        ({"device_name": "a new one"}, None),
    ],
    ids=["cuda", "metal", "full", "unknown"],
)
def test_memory_of_a_gpu_is_what_mlx_tells(
    info: dict[str, object], expected: int | None
) -> None:
    assert memory_limits._of_gpu(info, active=3 * GIB, cached=GIB) == expected


def test_caches_take_what_is_asked_for_or_a_share_of_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PROMPTCACHE_MEMORY_LIMIT", raising=False)
    assert memory_limits.cache_limit(7) == 7
    assert memory_limits.cache_limit() == memory_limits.total_nbytes() // 8
    monkeypatch.setenv("PROMPTCACHE_MEMORY_LIMIT", "3MB")
    assert memory_limits.cache_limit() == 3_000_000
    # As MLX tells of an NVIDIA H100.
    monkeypatch.setattr(mx, "device_info", lambda: {"total_memory": 85_520_809_984})
    assert memory_limits.total_nbytes() == 85_520_809_984


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="of the CPU backend")
def test_limit_of_a_container_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_limits, "CGROUP", tmp_path)
    assert memory_limits._of_container() is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("100\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 30\n")
    assert memory_limits._of_container() is None

    (tmp_path / "memory.max").write_text("1000\n")

    assert memory_limits._of_container() == 930
    assert memory_limits.available_nbytes() == 930


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="of the CPU backend")
def test_without_any_figure_everything_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_limits, "CGROUP", tmp_path)
    monkeypatch.setattr(memory_limits, "MEMINFO", tmp_path / "meminfo")

    assert memory_limits.available_nbytes() is None
    memory_limits.check_fits(2**80)
