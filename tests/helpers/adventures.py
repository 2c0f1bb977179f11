"""Conversations and tools of a text adventure."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from promptcache.prompts.parts import compose
from tests.helpers import tiny

# An argument changes the beginning, another one the very end; answers that are
# history lose their thinking.
TEMPLATE = (
    "{% if effort %}<|effort|>{{ effort }}<|end|>{% endif %}"
    "{% if tools %}<|tools|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>"
    "{{ message.content.split('</think>')[-1] if message.role == 'assistant'"
    " else message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking %}<think>{% endif %}"
    "{% if budget %}<think>{{ budget }}{% endif %}{% endif %}"
)
QUESTION = "I open the door"
HISTORY = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": "[THINK]a draught[/THINK]It creaks."},
    {"role": "user", "content": "I go in"},
]


def tool(name: str, description: str) -> dict[str, Any]:
    function = {"name": name, "description": description, "parameters": {}}
    return {"type": "function", "function": function}


ROLL, LOOK = tool("roll", "Roll a die"), tool("look", "Look around")
WALK, SING = tool("walk", "Walk on"), tool("sing", "Sing a song")


def templated(folder: Path, template: str = TEMPLATE) -> Path:
    tiny.save_tokenizer(folder, template)
    return folder


def conversation(*changed: tuple[int, str]) -> list[dict[str, str]]:
    """Return a conversation of which some messages say something else."""
    contents = {i: {"content": content} for i, content in changed}
    history = [{**m, **contents.get(i, {})} for i, m in enumerate(HISTORY)]
    return compose(system="You narrate.", messages=history)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """Mount a folder where nothing can be written; permissions do not stop root."""
    target = folder.with_name("read-only")
    target.mkdir()
    bind = ["mount", "--bind", str(folder), str(target)]
    if subprocess.run(bind, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        options = ["mount", "-o", "remount,ro,bind", str(target)]
        subprocess.run(options, check=True, capture_output=True)
        yield target
    finally:
        subprocess.run(["umount", str(target)], check=True)
