"""Describe in one clause what differs between two prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

from promptcache.segments.types import PromptOrigin

# What the parts of a fingerprint are called, the most telling first.
PART_NAMES = {
    "kv_bits": "KV bits",
    "kv_group_size": "KV group size",
    "quantized_kv_start": "start of KV quantization",
    "max_kv_size": "max_kv_size",
    "store_bits": "bits at rest",
    "exact": "exact mode",
    "draft": "draft model",
    "modules": "layers",
    "weights": "weights",
    "config": "config",
    "dtype": "dtype",
    "layout": "cache layout",
    "implementation": "implementation in mlx-lm",
    "state_version": "version of promptcache's state",
}
# Parts whose values mean something to people; of the others only hashes are known.
PLAIN_PARTS = (
    *("kv_bits", "kv_group_size", "quantized_kv_start", "max_kv_size"),
    *("store_bits", "dtype"),
)
# Which parts change others with them, which then need no mention.
FOLLOWING_PARTS = (("config", "modules"), ("modules", "implementation"))
KV_DETAILS = ("kv_group_size", "quantized_kv_start")


def name_of_part(name: str) -> str:
    """Return what people call a part; one of a later version has its own name."""
    return PART_NAMES.get(name, name)


def changed_parts(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Return the parts that differ, the most telling first.

    The namespace is not one of them: what others have is not compared.
    """
    order = [*PART_NAMES, *sorted({*before, *after} - {*PART_NAMES, "namespace"})]
    return [name for name in order if before.get(name) != after.get(name)]


def change_of_part(name: str, before: str, after: str) -> str:
    """Return which part of a fingerprint differs, and from what to what."""
    title = name_of_part(name)
    if name == "modules":
        return f"{title} (adapter, quantization)"
    if name not in PLAIN_PARTS:
        return title
    return f"{title}: {before or 'none'} became {after or 'none'}"


def values_of_parts(names: Sequence[str], parts: Any) -> str:
    """Return the values of parts of a fingerprint, each with what it is called."""
    return ", ".join(f"{name_of_part(n)}: {parts.get(n) or 'none'}" for n in names)


def change_of_config(before: PromptOrigin, after: PromptOrigin) -> str:
    """Return in one clause which arguments of a template differ."""
    names = sorted(
        name
        for name in {*before.config, *after.config}
        if before.config.get(name) != after.config.get(name)
    )
    return ", ".join(
        f"{name} was {_shown(before.config, name)} and is {_shown(after.config, name)}"
        for name in names
    )


def _shown(config: Any, name: str) -> str:
    return repr(config[name]) if name in config else "not given"


def change_of_tools(
    before: Sequence[tuple[str, str]], after: Sequence[tuple[str, str]]
) -> str:
    """Return in one clause how a list of tools changed."""
    old, new = dict(before), dict(after)
    changed = [name for name in new if name in old and old[name] != new[name]]
    lists: tuple[tuple[str, list[str]], ...] = (
        ("added", [name for name in new if name not in old]),
        ("removed", [name for name in old if name not in new]),
        ("changed", changed),
    )
    clauses = [f"{', '.join(names)} {verb}" for verb, names in lists if names]
    if clauses:
        return f"other tools: {'; '.join(clauses)}"
    moved = next(
        (b for (a, _), (b, _) in zip(before, after, strict=False) if a != b), ""
    )
    return f"another order of the tools, from {moved} on"
