"""The manifest: which prompts a project wants cached, from `promptcache.toml`.

It reads the manifest and the files it names; building the prompts is left to others.
"""

import os
import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from promptcache.errors import UsageError
from promptcache.kvcache.kv_quantization import KV_BITS, KV_GROUP_SIZES
from promptcache.kvcache.row_quantization import STORE_BITS
from promptcache.prompts.parts import PromptParts, parse_objects
from promptcache.store.reports import check_name

MANIFEST_KEYS = ("model", "prompts")
TEMPLATE_KEYS = ("system", "messages", "tools", "chat_template_config")
CONTENT_KEYS = ("system", "files", "messages", "tools", "prompt")
# None is any from 1 on.
CHOICES_BY_INTEGER_KEY: Mapping[str, Collection[int] | None] = {
    "kv_bits": KV_BITS,
    "kv_group_size": KV_GROUP_SIZES,
    "quantized_kv_start": None,
    "store_bits": STORE_BITS,
    "max_kv_size": None,
    "prefill_step_size": None,
}
PROMPT_KEYS = (
    *CONTENT_KEYS,
    *CHOICES_BY_INTEGER_KEY,
    *("model", "adapter_path", "chat_template_config", "exact", "raw", "pin"),
)
# tomllib gives exactly these types.
WORDS_BY_TYPE: Mapping[type, str] = {
    str: "a text",
    int: "an integer",
    bool: "a boolean",
    float: "a float",
    list: "an array",
    dict: "a table",
    datetime: "a date",
    date: "a date",
    time: "a time",
}


class ManifestError(UsageError):
    """A manifest cannot be read, or its values are not valid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSpec(PromptParts):
    """One prompt of a manifest, with its files read.

    Attributes:
        name: The key of its table, and the name to pin it with.
        model: A folder or hub repository, or None for the default.
        adapter_path: The folder of a LoRA adapter.
        pin: Whether to pin what is built.
        settings: The `ReadOptions` that the manifest gives.
    """

    name: str
    model: str | None
    adapter_path: str | None
    pin: bool
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest as it was read.

    Attributes:
        path: Its file, absolute and resolved.
        prompts: Its prompts, in the file's order.
    """

    path: Path
    prompts: tuple[PromptSpec, ...]


def read_manifest(path: str | Path) -> Manifest:
    """Return a manifest, with all files that it names read.

    Raises:
        ManifestError: It or a file it names cannot be read, or a value is not valid;
            the message is one line with the file, the key and the reason.
    """
    file = _printable(str(path))
    own_path = Path(os.path.expanduser(path))
    values = _parse(own_path, file)
    own_path = own_path.resolve()
    manifest = _Table(file, own_path.parent, "", values)
    manifest.check_keys(MANIFEST_KEYS)
    model = manifest.model("model")
    prompts = manifest.table("prompts")
    if not prompts.values:
        raise prompts.error(None, "no prompts, add a table such as [prompts.narrator]")
    specs = (
        _read_prompt(prompts, name, default_model=model) for name in prompts.values
    )
    return Manifest(own_path, tuple(specs))


def _parse(path: Path, file: str) -> dict[str, Any]:
    text = ""
    try:
        # Some editors begin a file with a byte order mark, which TOML does not know.
        text = _read(path, encoding="utf-8-sig")
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ManifestError(f"{file}: {_syntax_error(error, text)}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"{file}: cannot be read ({_reason(error)})") from error


def _syntax_error(error: tomllib.TOMLDecodeError, text: str) -> str:
    """Return tomllib's message with the line in front."""
    message, _, place = str(error).rpartition(" (at ")
    position = re.match(r"line (\d+)", place)
    line = position[1] if position else text.rstrip().count("\n") + 1
    return f"line {line}: {message}"


def _read_prompt(
    prompts: "_Table", name: str, *, default_model: str | None
) -> PromptSpec:
    try:
        check_name(name)
    except UsageError as error:
        raise prompts.error(None, str(error)) from error
    table = prompts.table(name)
    table.check_keys(PROMPT_KEYS)
    spec = PromptSpec(
        name=name,
        model=table.model("model") or default_model,
        adapter_path=table.folder_path("adapter_path"),
        system=table.content("system"),
        files=table.texts("files"),
        prompt=table.content("prompt"),
        messages=table.messages("messages"),
        tools=table.objects("tools"),
        chat_template_config=table.table("chat_template_config").values,
        raw=table.boolean("raw", default=False),
        pin=table.boolean("pin", default=True),
        settings=table.settings(),
    )
    _check(spec, table)
    return spec


def _check(spec: PromptSpec, table: "_Table") -> None:
    """Raise ManifestError for keys that contradict each other, or an empty prompt."""
    refused = [key for key in TEMPLATE_KEYS if spec.raw and key in table.values]
    if refused:
        raise table.error(refused[0], "cannot go with raw, it needs the chat template")
    if not any((spec.system, *spec.files, spec.messages, spec.tools, spec.prompt)):
        keys = "files" if spec.raw else "system, files, messages, tools"
        raise table.error(None, f"nothing to build, give {keys} or prompt")


@dataclass(frozen=True, slots=True)
class _Table:
    """A table of a manifest, and where it is; its methods raise ManifestError.

    Attributes:
        file: The manifest's name in messages.
        folder: The folder that relative paths start from.
        place: The table's key, with those of the tables around it.
    """

    file: str
    folder: Path
    place: str
    values: dict[str, Any]

    def error(self, key: str | None, reason: str) -> ManifestError:
        """Return an error about a key, or about the table itself."""
        place = self.place if key is None else self._place_of(key)
        return ManifestError(f"{self.file}: {place}: {reason}")

    def check_keys(self, keys: Collection[str]) -> None:
        """Raise for a key that is not one of these, with the most similar one."""
        for key in self.values:
            if key not in keys:
                close = get_close_matches(key, keys, n=1)
                hint = f", did you mean {close[0]!r}?" if close else ""
                raise self.error(key, f"unknown key{hint}")

    def table(self, key: str) -> "_Table":
        """Return the table of a key, an empty one if there is none."""
        values = self._value(key, dict) or {}
        return _Table(self.file, self.folder, self._place_of(key), values)

    def text(self, key: str) -> str | None:
        text: str | None = self._value(key, str)
        return text

    def content(self, key: str) -> str | None:
        """Return a text, or the content of `@FILE`."""
        text = self.text(key)
        if text is None or not text.startswith("@"):
            return text
        return self._read(key, text[1:])

    def texts(self, key: str) -> tuple[str, ...]:
        names = self._value(key, list) or []
        for number, name in enumerate(names, 1):
            if type(name) is not str:
                raise self.error(key, f"item {number} {_must_be(str, name)}")
        return tuple(self._read(key, name) for name in names)

    def model(self, key: str) -> str | None:
        """Return a hub repository or folder, which is relative if it begins so."""
        name = self._name(key)
        if name is None or name.split("/")[0] not in (".", ".."):
            return name
        return str(self._path(name))

    def folder_path(self, key: str) -> str | None:
        name = self._name(key)
        return None if name is None else str(self._path(name))

    def boolean(self, key: str, *, default: bool) -> bool:
        value: bool | None = self._value(key, bool)
        return default if value is None else value

    def integer(self, key: str, choices: Collection[int] | None) -> int:
        """Return an integer of the choices, or from 1 on without any."""
        value: int = self._value(key, int)
        # The value is left out of this message: one from hex may be too long to print.
        if choices is not None and value not in choices:
            raise self.error(key, f"must be one of {choices}")
        if value < 1:
            raise self.error(key, f"must be at least 1, not {value}")
        return value

    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {
            key: self.integer(key, choices)
            for key, choices in CHOICES_BY_INTEGER_KEY.items()
            if key in self.values
        }
        if "exact" in self.values:
            settings["exact"] = self.boolean("exact", default=False)
        return settings

    def objects(self, key: str) -> tuple[dict[str, Any], ...]:
        """Return an array of tables, or the objects of a JSON list in a file."""
        value = self.values.get(key, [])
        if isinstance(value, str):
            return self._objects_of(key, value)
        if not isinstance(value, list):
            words = WORDS_BY_TYPE[type(value)]
            raise self.error(key, f"must be a text or an array, not {words}")
        for number, item in enumerate(value, 1):
            if not isinstance(item, dict):
                raise self.error(key, f"item {number} {_must_be(dict, item)}")
        return tuple(value)

    def messages(self, key: str) -> tuple[dict[str, Any], ...]:
        messages = self.objects(key)
        for number, message in enumerate(messages, 1):
            if "role" not in message:
                raise self.error(key, f"message {number} needs a role")
        return messages

    def _value(self, key: str, kind: type) -> Any:
        """Return a value of a type, or None if there is none."""
        value = self.values.get(key)
        # Not isinstance: a boolean is not an integer here.
        if key in self.values and type(value) is not kind:
            raise self.error(key, _must_be(kind, value))
        return value

    def _name(self, key: str) -> str | None:
        name = self.text(key)
        if name is not None and not name.strip():
            raise self.error(key, "must not be empty")
        return name

    def _objects_of(self, key: str, name: str) -> tuple[dict[str, Any], ...]:
        text = self._read(key, name)
        try:
            return tuple(parse_objects(text, _printable(name)))
        except UsageError as error:
            raise self.error(key, str(error)) from error

    def _read(self, key: str, name: str) -> str:
        try:
            return _read(self._path(name))
        except (OSError, ValueError) as error:
            reason = f"cannot read {_printable(name)} ({_reason(error)})"
            raise self.error(key, reason) from error

    def _path(self, name: str) -> Path:
        return self.folder / os.path.expanduser(name)

    def _place_of(self, key: str) -> str:
        # Quoted like in TOML.
        shown = key if re.fullmatch(r"[\w-]+", key) else repr(key)
        return f"{self.place}.{shown}" if self.place else shown


def _read(path: Path, *, encoding: str = "utf-8") -> str:
    """Return a file's text. Raises OSError or ValueError."""
    with path.open(encoding=encoding) as file:
        return file.read()


def _reason(error: Exception) -> str:
    """Return what keeps a file from being read, in one line."""
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8 text"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return getattr(error, "strerror", None) or str(error)


def _must_be(kind: type, value: Any) -> str:
    return f"must be {WORDS_BY_TYPE[kind]}, not {WORDS_BY_TYPE[type(value)]}"


def _printable(text: str) -> str:
    """Return text as it is, or quoted where it would not show in one line."""
    return text if text and text.isprintable() else repr(text)
