"""`promptcache sync`."""

from collections import Counter
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import click

from promptcache import config
from promptcache_cli import output
from promptcache_cli.options import (
    dry_run_option,
    empty_store,
    is_missing,
    open_store,
    save_options,
)

if TYPE_CHECKING:
    from promptcache import CachedGenerator
    from promptcache.engine.build import BuiltPrefix
    from promptcache.project.manifest import PromptSpec
    from promptcache.project.sync import SyncStep
    from promptcache.prompts.render import RenderedPrompt

VERBS = {"keep": "kept", "build": "built", "pin": "pinned", "unpin": "unpinned"}


@click.command()
@click.argument("manifest", type=click.Path(dir_okay=False), default="promptcache.toml")
@click.option(
    "--check", is_flag=True, help="Do nothing, and exit with 1 if something is stale"
)
@dry_run_option
@save_options
def sync(
    manifest: str,
    check: bool,
    dry_run: bool,
    store_path: str | None,
    max_size: int | None,
    daily_writes: int | None,
    json_: bool,
    quiet: bool,
) -> int:
    """Build what a manifest names, and unpin what it no longer names

    MANIFEST is promptcache.toml if not given. A prompt is built when it is not stored
    as it would be read now: a source file, the template or the weights changed, or it
    was evicted.

    Example:

    \b
        promptcache sync
        promptcache sync --check
        promptcache sync --dry-run prompts/promptcache.toml
    """
    from promptcache.project.manifest import read_manifest

    # Read before the models are, which takes longer.
    project = read_manifest(manifest)
    from promptcache.generator import CachedGenerator
    from promptcache.project.sync import SyncPlanner

    console = output.Console(quiet=quiet)

    is_plan = check or dry_run
    is_new = is_missing(config.store_dir(store_path))
    with (
        empty_store()
        if is_plan and is_new
        else open_store(store_path, max_size, daily_writes, say=console.info)
    ) as store:
        load = partial(
            CachedGenerator.load, store=store, announce=console.info, lazy=True
        )
        planner = SyncPlanner(project, store, load)
        steps = planner.plan()
        if not is_plan:
            steps = planner.execute(steps, partial(_build, console))
    _print(steps, is_plan=is_plan, json_=json_, console=console)
    return int(check and any(step.is_stale for step in steps))


def _build(
    console: output.Console,
    generator: "CachedGenerator",
    prompt: "RenderedPrompt",
    spec: "PromptSpec",
) -> "BuiltPrefix":
    output.warn_of_volatile_text(generator.lint(prompt))
    with console.progress(f"Reading {spec.name}", "tokens") as progress:
        return generator.build(
            prompt, prompt_progress_callback=progress, **spec.settings
        )


def _print(
    steps: list["SyncStep"], *, is_plan: bool, json_: bool, console: output.Console
) -> None:
    if json_:
        rows = [{**asdict(step), "stale": step.is_stale} for step in steps]
        output.json_data({"steps": rows, "dry_run": is_plan})
        return
    output.table(
        ["NAME", "ACTION", "KEY", "REASON"],
        [[s.name, s.action, (s.key or "")[:12], s.reason] for s in steps],
    )
    counts = Counter[str](step.action for step in steps)
    words = {action: action for action in VERBS} if is_plan else VERBS
    summary = [f"{counts[act]} {words[act]}" for act in VERBS if counts[act]]
    console.info(("To do: " if is_plan else "Done: ") + ", ".join(summary))
