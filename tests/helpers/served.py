"""A real server in a process of its own, to test and to measure."""

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

START_SECONDS = 60.0


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


def wait_until(is_so: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until something is so. Raises AssertionError if it takes too long."""
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.02)
