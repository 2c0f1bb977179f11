"""Generations of coroutines: together, each as if it were alone."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from promptcache import CachedGenerator, UsageError
from promptcache.aio import AsyncCachedGenerator
from tests.helpers.runs import cold, ids


@pytest.fixture
def generator(model_dir: Path, tmp_path: Path) -> Iterator[CachedGenerator]:
    with CachedGenerator.load(
        model_dir, store=tmp_path / "store", memory_limit=10**8
    ) as generator:
        yield generator


def test_answers_at_once_are_those_of_single_runs(generator: CachedGenerator) -> None:
    prompts = [ids(40 + n, seed=n) for n in range(6)]

    async def ask(model: AsyncCachedGenerator, prompt: list[int]) -> list[int]:
        return [r.token async for r in model.stream_generate(prompt, 20)]

    async def main() -> list[list[int]]:
        async with AsyncCachedGenerator(generator) as model:
            return await asyncio.gather(*(ask(model, prompt) for prompt in prompts))

    tokens = asyncio.run(main())

    assert tokens == [cold(generator, p, max_tokens=20).tokens for p in prompts]


def test_generation_that_is_left_ends(generator: CachedGenerator) -> None:
    async def main() -> tuple[int, str]:
        async with AsyncCachedGenerator(generator) as model:
            stream = model.stream_generate(ids(30), 10**6)
            async for response in stream:
                if response.generation_tokens == 3:
                    break
            await stream.aclose()  # type: ignore[attr-defined]
            while model._engine.num_active:
                await asyncio.sleep(0.01)
            return response.generation_tokens, await model.generate(
                "Hello", max_tokens=5
            )

    num_tokens, text = asyncio.run(main())

    assert num_tokens == 3
    assert text == generator.generate("Hello", max_tokens=5)


def test_cancelled_task_ends_its_generation(generator: CachedGenerator) -> None:
    async def main() -> None:
        async with AsyncCachedGenerator(generator) as model:
            task = asyncio.create_task(model.generate(ids(30), max_tokens=10**6))
            while not model._engine.num_active:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while model._engine.num_active:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(main(), 30))


def test_errors_are_raised_where_they_are_awaited(generator: CachedGenerator) -> None:
    async def main() -> None:
        async with AsyncCachedGenerator(generator) as model:
            with pytest.raises(UsageError, match="empty"):
                await model.generate([])
            with pytest.raises(UsageError, match="max_tokens"):
                await model.generate("Hello", max_tokens=0)
            assert await model.generate("Hello", max_tokens=2)

    asyncio.run(main())
