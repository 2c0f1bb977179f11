"""`promptcache show`."""

from typing import TYPE_CHECKING

import click

from promptcache import ModelError, units
from promptcache.units import format_size
from promptcache_cli import output
from promptcache_cli.options import json_option, open_existing, store_option

if TYPE_CHECKING:
    from promptcache import PrefixReport


@click.command()
@click.argument("key")
@store_option
@json_option
def show(key: str, store_path: str | None, json_: bool) -> None:
    """Show one prefix: its text, layers, ancestors and history

    Example:

    \b
        promptcache show narrator
    """
    with open_existing(store_path) as store:
        report = store.report(key)
    text = _text(report)
    if json_:
        output.json_data(_as_json(report, text))
    else:
        _print_report(report)
        output.text(f"\n{text}" if text is not None else "")


def _text(report: "PrefixReport") -> str | None:
    """Return the text of a prefix, or None if its tokenizer is gone."""
    # Imported here because it imports mlx_lm, which takes a second.
    from promptcache.models.load import load_tokenizer

    try:
        tokenizer = load_tokenizer(report.fingerprint.source)
    except ModelError as error:
        output.warn(f"no text to show, {error}")
        return None
    return str(tokenizer.decode(list(report.token_ids)))


def _as_json(report: "PrefixReport", text: str | None) -> dict[str, object]:
    from promptcache.kvcache.layout import describe

    return {
        **report.prefix.to_json(),
        "source": report.fingerprint.source,
        "fingerprint": report.fingerprint.digest,
        "fingerprint_parts": dict(report.fingerprint.parts),
        "segments": [
            {
                "key": segment.key,
                "start": segment.start,
                "end": segment.end,
                "nbytes": segment.nbytes,
                "layers": describe(segment.layers),
            }
            for segment in report.segments
        ],
        "text": text,
    }


def _print_report(report: "PrefixReport") -> None:
    from promptcache.kvcache.layout import describe

    prefix = report.prefix
    facts = {
        "key": prefix.key,
        "name": prefix.full_name or "(not pinned)",
        "model": prefix.model,
        "source": report.fingerprint.source or "(loaded by the caller)",
        "tokens": prefix.num_tokens,
        "frees": format_size(prefix.nbytes),
        "created": units.iso_time(prefix.created_at),
        "used": f"{output.ago(prefix.used_at)}, {prefix.hits} hits",
    }
    for name, value in facts.items():
        output.data(f"{name:<8} {value}")
    output.data("")
    rows = [
        [s.key[:12], f"[{s.start}, {s.end})", format_size(s.nbytes), describe(s.layers)]
        for s in report.segments
    ]
    output.table(["SEGMENT", "TOKENS", "SIZE", "LAYERS"], rows)
