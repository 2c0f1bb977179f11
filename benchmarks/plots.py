"""Plots for the docs, drawn from the JSON files of the benchmarks.

    python -m benchmarks.plots docs/benchmarks docs/benchmarks

Needs matplotlib (`pip install promptcache[plots]`). The background is transparent and
all colours are of middle brightness, so that they can be read on light and dark pages.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

TEXT = "#808488"
OURS, THEIRS, PLAIN, OTHER = "#2a9d8f", "#e07a3f", "#7d8590", "#7b6fd0"
STYLE = {
    "figure.figsize": (7, 3.6),
    "savefig.transparent": True,
    "savefig.bbox": "tight",
    # Text stays text, in whatever sans-serif font the page has.
    "svg.fonttype": "none",
    # The same measurements make the same file.
    "svg.hashsalt": "promptcache",
    "font.family": "sans-serif",
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "legend.frameon": False,
    "grid.color": TEXT,
    "grid.alpha": 0.25,
}

Measurements = list[dict[str, Any]]


def read(folder: Path, benchmark: str) -> Measurements:
    """Return the measurements that a benchmark wrote, without those it could not do."""
    content = json.loads((folder / f"{benchmark}.json").read_text())
    return [m for m in content["measurements"] if m["values"]]


def plot_ttft(axes: Axes, measurements: Measurements) -> None:
    """Draw time to first token by prefix length, on two logarithmic axes."""
    # The default model, or whichever was measured first.
    model = measurements[0]["labels"]["model"]
    runs = {
        "cold": ("cold", PLAIN, "o-"),
        "mlx-lm's file": ("mlx-lm’s file", THEIRS, "s-"),
        "promptcache": ("promptcache, from disk", OURS, "o-"),
        "promptcache, hot": ("promptcache, hot", OURS, "o--"),
    }
    for run, (label, colour, style) in runs.items():
        own = [m for m in measurements if m["labels"]["run"] == run]
        own = [m for m in own if m["labels"]["model"] == model]
        lengths = [m["labels"]["prefix"] for m in own]
        _line_with_spread(axes, lengths, own, label, colour, style)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens in the prefix",
        ylabel="time to first token, ms",
        title=f"Time to first token, {model}",
    )
    lengths = sorted({m["labels"]["prefix"] for m in measurements})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y")


def _line_with_spread(
    axes: Axes,
    places: Sequence[int],
    measurements: Measurements,
    label: str,
    colour: str,
    style: str,
) -> None:
    """Draw medians, with bars from the smallest to the largest value."""
    medians = [m["median"] * 1e3 for m in measurements]
    below = [(m["median"] - m["min"]) * 1e3 for m in measurements]
    above = [(m["max"] - m["median"]) * 1e3 for m in measurements]
    axes.errorbar(
        places,
        medians,
        yerr=[below, above],
        fmt=style,
        color=colour,
        label=label,
        capsize=3,
    )
    # Dashed lines run close to another one, whose number would be hidden.
    if medians and "--" not in style:
        axes.annotate(
            f"{medians[-1]:,.0f}",
            (places[-1], medians[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            color=colour,
            va="center",
        )


def plot_restore(axes: Axes, measurements: Measurements) -> None:
    """Draw restore throughput as bars, of the longest prefix in files of all kinds."""
    files = [m for m in measurements if m["labels"]["way"] == "mlx-lm"]
    num_tokens = max(m["labels"]["tokens"] for m in files)
    ways = {
        "promptcache": ("promptcache", OURS),
        "mlx-lm": ("mlx_lm.load_prompt_cache", THEIRS),
        "mx.load": ("mx.load + mx.eval", OTHER),
        "read, new memory": ("read(), new memory", PLAIN),
    }
    found = {
        m["labels"]["way"]: m
        for m in measurements
        if m["labels"]["tokens"] == num_tokens
    }
    for way, (label, colour) in ways.items():
        own = found[way]
        speed = own["median"] / 1e9
        spread = [[speed - own["min"] / 1e9], [own["max"] / 1e9 - speed]]
        axes.barh(label, speed, color=colour, xerr=spread, ecolor=TEXT, capsize=3)
    axes.invert_yaxis()
    axes.set(
        xlabel="GB/s, from the page cache to a cache ready for use",
        title=f"Restoring a prefix of {num_tokens:,} tokens",
    )
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def plot_chat(axes: Axes, measurements: Measurements) -> None:
    """Draw bytes on disk by turn, on a logarithmic axis."""
    lines = {
        "mlx-lm's files, one for each turn": ("a file for each turn", THEIRS, "-"),
        "promptcache, all files": ("promptcache, all files", OURS, "-"),
        "keys and values of the last turn": ("keys and values", PLAIN, "--"),
    }
    for what, (label, colour, style) in lines.items():
        own = [m for m in measurements if m["labels"]["what"] == what]
        turns = [m["labels"]["turn"] for m in own]
        nbytes = [m["median"] / 1e6 for m in own]
        axes.plot(turns, nbytes, style, color=colour, label=label)
    axes.set(
        yscale="log",
        xlabel="turn",
        ylabel="MB on disk",
        title="A chat that is saved after each turn",
    )
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y")


PLOTS: dict[str, Callable[[Axes, Measurements], None]] = {
    "ttft": plot_ttft,
    "restore": plot_restore,
    "chat": plot_chat,
}


def draw(benchmark: str, source: Path, target: Path, suffix: str) -> Path:
    """Draw one benchmark's plot; return its file."""
    with rc_context(STYLE):
        figure = Figure()
        axes = figure.subplots()
        PLOTS[benchmark](axes, read(source, benchmark))
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        file = target / f"{benchmark}.{suffix}"
        # Without the date, which would change with every run.
        metadata = {"Date": None} if suffix == "svg" else None
        figure.savefig(file, metadata=metadata)
    return file


def main() -> None:
    """Draw what there are measurements of, and print the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="the folder of the JSON files")
    parser.add_argument("target", type=Path, help="the folder of the plots")
    parser.add_argument("--format", choices=["svg", "png"], default="svg")
    options = parser.parse_args()
    options.target.mkdir(parents=True, exist_ok=True)
    for benchmark in PLOTS:
        if (options.source / f"{benchmark}.json").exists():
            print(draw(benchmark, options.source, options.target, options.format))


if __name__ == "__main__":
    main()
