"""The same question with mlx-lm alone: `save_prompt_cache` and `load_prompt_cache`."""

import json
import sys
import time

import mlx_lm
from mlx_lm.models.cache import (
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)

from benchmarks.harness import NARRATOR
from promptcache import rendering
from promptcache.default_model import ensure_default_model
from promptcache.prefill import prefill


def main() -> None:
    """Save the narrator's prefix, or load it and answer; print JSON."""
    action, file, question = sys.argv[1:]
    model, tokenizer = mlx_lm.load(str(ensure_default_model()))
    system = NARRATOR.read_text()

    def render(user: str) -> list[int]:
        return rendering.render(tokenizer, rendering.compose(system=system, user=user))

    prefix = rendering.render_open(
        tokenizer, rendering.compose(system=system, user="")
    ).token_ids
    if action == "save":
        cache = make_prompt_cache(model)
        prefill(model, cache, prefix, start=0, end=len(prefix))
        save_prompt_cache(file, cache)
        print("{}")
        return
    token_ids = render(question)
    started = time.perf_counter()
    cache = load_prompt_cache(file)
    rest = token_ids[len(prefix) :]
    tokens, seconds = [], 0.0
    for response in mlx_lm.stream_generate(
        model, tokenizer, rest, max_tokens=16, prompt_cache=cache
    ):
        seconds = seconds or time.perf_counter() - started
        tokens.append(response.token)
    print(json.dumps({"token_ids": tokens, "ttft_seconds": seconds}))


if __name__ == "__main__":
    main()
