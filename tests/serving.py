"""A real server in a process of its own, and OpenAI's client for it."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import openai

START_SECONDS = 60.0
Messages = list[dict[str, Any]]


class Answer(NamedTuple):
    """What a completion gave."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    finish_reason: str | None

    @property
    def prefilled_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens


class Server:
    """`promptcache serve` on a port of its own."""

    def __init__(
        self,
        model: Path | str | None,
        *options: str | Path,
        store: Path,
        key: str | None = None,
        command: Sequence[str] = ("-m", "promptcache_cli", "serve"),
        env: dict[str, str] | None = None,
    ) -> None:
        """Start it, and wait until it answers."""
        wanted = [] if model is None else ["--model", str(model)]
        self.process = subprocess.Popen(
            [sys.executable, *command, *wanted, "--port", "0", *map(str, options)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PROMPTCACHE_DIR": str(store), **(env or {})},
        )
        self.key = key
        self.said: list[str] = []
        self._listening = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()
        assert self._listening.wait(START_SECONDS), self.said
        assert self.process.poll() is None, self.said

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line.rstrip())
            if found := re.search(r"at http://\S+:(\d+)/v1", line):
                self.port = int(found[1])
                self._listening.set()
        self._listening.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "none") -> openai.OpenAI:
        """Return OpenAI's client, which tries once."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=200
        )

    def get(self, path: str, key: str | None = None) -> str:
        """Return what is at a path."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        request = urllib.request.Request(self.url + path, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as response:
            return str(response.read().decode())

    def post(self, path: str, body: Any, key: str | None = None) -> Any:
        """Return the JSON that a path answers with."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read())

    def metric(self, name: str, **labels: str) -> float:
        """Return a figure of `/metrics`, summed over the labels that are not given."""
        total = 0.0
        for line in self.get("/metrics", self.key).splitlines():
            found = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            if found and found[1] == f"promptcache_{name}":
                wanted = all(
                    f'{k}="{v}"' in (found[2] or "") for k, v in labels.items()
                )
                total += float(found[3]) if wanted else 0.0
        return total

    def wait_saved(self) -> None:
        """Wait until nothing waits for the disk."""
        wait_until(lambda: self.metric("writer_queue_saves") == 0)

    @property
    def memory(self) -> int:
        """Return the bytes of the process that are in memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024

    @property
    def num_threads(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))

    def kill(self) -> None:
        """End it at once, as a crash does."""
        self.process.kill()
        self.process.wait(30)

    def stop(self) -> int:
        """End it as a service manager does; return its exit code."""
        self.process.terminate()
        return self.process.wait(60)


@contextlib.contextmanager
def running(model: Path | str | None, *options: Any, **more: Any) -> Iterator[Server]:
    """Run a server, and kill it in the end."""
    server = Server(model, *options, **more)
    try:
        yield server
    finally:
        server.kill()


def wait_until(is_so: Any, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.02)


def ask(
    client: openai.OpenAI, messages: Messages, *, stream: bool = True, **options: Any
) -> Answer:
    """Ask for an answer at temperature 0."""
    arguments = {
        "model": "default_model",
        "messages": messages,
        "max_tokens": 16,
        "temperature": 0,
        **options,
    }
    if not stream:
        whole = client.chat.completions.create(**arguments)
        choice = whole.choices[0]
        return _answer(choice.message.content or "", choice.finish_reason, whole.usage)
    text, reason, usage = "", None, None
    for part in client.chat.completions.create(
        **arguments, stream=True, stream_options={"include_usage": True}
    ):
        usage = part.usage or usage
        for choice in part.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    return _answer(text, reason, usage)


def _answer(text: str, reason: str | None, usage: Any) -> Answer:
    details = usage.prompt_tokens_details
    return Answer(
        text,
        usage.prompt_tokens,
        details.cached_tokens if details else 0,
        usage.completion_tokens,
        reason,
    )


def ask_at_once(
    server: Server, prompts: Sequence[Messages], **options: Any
) -> list[Answer]:
    """Ask all of these at the same time, each from a client of its own."""
    barrier = threading.Barrier(len(prompts))

    def one(messages: Messages) -> Answer:
        client = server.client()
        barrier.wait()
        return ask(client, messages, **options)

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(one, prompts))


def system_and(system: str, *said: str) -> Messages:
    """Return messages with a system prompt, and users and answers in turn."""
    roles = ["user", "assistant"] * len(said)
    turns = [{"role": r, "content": c} for r, c in zip(roles, said, strict=False)]
    return [{"role": "system", "content": system}, *turns]
