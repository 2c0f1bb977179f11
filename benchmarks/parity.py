"""Warm equals cold: the default model answers 20 messages with and without the cache.

The system prompt is stored once; every message is then answered greedily, with
sampling, with a repetition penalty and with quantized keys and values, each time
read from nothing and resumed from the store. `python -m benchmarks.parity`
"""

import argparse
import tempfile

from benchmarks.harness import NARRATOR, machine, print_table
from promptcache import CachedGenerator
from promptcache.prompts.parts import compose

MESSAGES = [
    "I open the door",
    "I light my torch and look around",
    "Who keeps the Drowned Library?",
    "I offer Maren a song",
    "What do I hear?",
    "I put on the hollow crown",
    "I walk the Salt Road until nightfall",
    "I ask Corvin about the stars",
    "I throw the dagger into the lake",
    "I wait",
    "I taste the water",
    "Tell me the king's name",
    "I tie the rope to the lamp post and climb down",
    "I dig in the Root Cellar",
    "I bow to the Court of Moths",
    "I try the golden key in every lock I can find, one after the other",
    "Is anyone here?",
    "I run",
    "I sell my shadow to Bram for a night's rest",
    "I close my eyes and count to one hundred",
]
SETTINGS = {
    "greedy": {},
    "--temp 0.8 --seed 7": {"temp": 0.8, "seed": 7},
    "--repetition-penalty 1.3": {"repetition_penalty": 1.3},
    "--kv-bits 8": {"kv_bits": 8},
    "--kv-bits 8 --quantized-kv-start 0": {"kv_bits": 8, "quantized_kv_start": 0},
}


def main() -> None:
    """Compare token ids and print how many of the answers are equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=len(MESSAGES))
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS))
    options = parser.parse_args()
    messages = MESSAGES[: options.messages]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        generator = CachedGenerator.load(store=folder, save=False)
        print(machine(), flush=True)
        for name in options.settings:
            settings = SETTINGS[name]
            kv = {k: v for k, v in settings.items() if "kv" in k}
            prefix = generator.build(system=NARRATOR.read_text(), **kv)
            pairs = [
                answers(generator, message, options.max_tokens, settings)
                for message in messages
            ]
            equal = sum(cold == warm for cold, warm, _ in pairs)
            speedup = sorted(ratio for _, _, ratio in pairs)[len(pairs) // 2]
            rows.append(
                [
                    name,
                    prefix.num_tokens,
                    f"{equal} of {len(pairs)}",
                    f"{speedup:.1f} ×",
                ]
            )
            print(*rows[-1], flush=True)
    headers = ["settings", "prefix tokens", "equal answers", "first token, cold / warm"]
    print_table(headers, rows)


def answers(
    generator: CachedGenerator, message: str, max_tokens: int, settings: dict
) -> tuple[list[int], list[int], float]:
    """Return the token ids cold and warm, and how much faster the warm one began."""
    prompt = compose(system=NARRATOR.read_text(), user=message)
    runs = []
    for reuse in (False, True):
        responses = list(
            generator.stream_generate(
                prompt, max_tokens=max_tokens, reuse=reuse, **settings
            )
        )
        assert bool(responses[-1].cached_tokens) == reuse
        runs.append(responses)
    cold, warm = runs
    ratio = cold[-1].ttft_seconds / warm[-1].ttft_seconds
    return [r.token for r in cold], [r.token for r in warm], ratio


if __name__ == "__main__":
    main()
