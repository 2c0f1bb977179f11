"""A narrator for a game that never reads its rules twice.

    python docs/examples/narrator.py

The rules are the system prompt, the same in every turn, and are read once: on the
first run, or never if `promptcache build` did it before. Location, inventory and action
are what changes, so they come last, in the user's message. In the system prompt, where
one is tempted to put them, they would have everything after them read again each turn.
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from promptcache import CachedGenerator, GenerationResponse

RULES = Path(__file__).with_name("narrator.txt").read_text()

TURNS = (
    ("examine the ancient statue", "Temple of the Forgotten Gods", ["torch", "rope"]),
    ("pull the lever", "Temple of the Forgotten Gods", ["torch", "rope"]),
    ("climb down the shaft", "Temple of the Forgotten Gods", ["torch", "rope"]),
    ("follow the sound of water", "The Drowned Library", ["torch"]),
    ("open the oldest book", "The Drowned Library", ["torch"]),
    ("ask Tobias for a name", "The Drowned Library", ["torch", "golden key"]),
    ("hide the key", "The Salt Road", ["torch", "golden key"]),
    ("wait for the night", "The Salt Road", ["torch", "golden key"]),
    ("light the lamp", "The Lighthouse of Saint Orla", ["golden key"]),
    ("unlock the door", "The Lighthouse of Saint Orla", []),
)


class GameNarrator:
    """Narrates what the player does."""

    def __init__(self, generator: CachedGenerator) -> None:
        """Take a generator, and make sure that the rules have been read."""
        self._generator = generator
        self.rules = generator.build(system=RULES, name="narrator")

    def narrate(self, action: str, location: str, inventory: Sequence[str]) -> str:
        """Return the narration of an action when it is complete."""
        return "".join(self.narrate_stream(action, location, inventory)).strip()

    def narrate_stream(
        self, action: str, location: str, inventory: Sequence[str]
    ) -> Iterator[str]:
        """Yield the narration of an action as it comes."""
        for response in self.responses(action, location, inventory):
            yield response.text

    def responses(
        self, action: str, location: str, inventory: Sequence[str]
    ) -> Iterator[GenerationResponse]:
        """Yield the narration with what the cache did."""
        state = (
            f"Location: {location}\n"
            f"Inventory: {', '.join(inventory) or 'empty'}\n"
            f"Action: {action}"
        )
        messages = [
            {"role": "system", "content": RULES},
            {"role": "user", "content": state},
        ]
        yield from self._generator.stream_generate(
            messages, max_tokens=100, temp=0.7, repetition_penalty=1.1
        )


def main() -> None:
    """Play ten turns, and tell how long each took to its first word."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", help="Folder or Hugging Face repository")
    options = parser.parse_args()
    with CachedGenerator.load(options.model) as generator:
        narrator = GameNarrator(generator)
        rules = narrator.rules
        new_tokens = rules.num_tokens - rules.cached_tokens
        print(f"{new_tokens} tokens of rules read in {rules.seconds:.1f} s\n")
        seconds = []
        for action, location, inventory in TURNS:
            print(f"[{location}] {action}")
            for response in narrator.responses(action, location, inventory):
                print(response.text, end="", flush=True)
            seconds.append(response.ttft_seconds)
            print(
                f"\n-- {response.cached_tokens} of {response.prompt_tokens} tokens "
                f"cached, first token after {seconds[-1]:.2f} s\n"
            )
    print(f"Median of {len(TURNS)} turns: {statistics.median(seconds):.2f} s")


if __name__ == "__main__":
    main()
