"""`promptcache prune`."""

from typing import TYPE_CHECKING

import click

from promptcache import KeyNotFoundError
from promptcache.units import format_size
from promptcache_cli import output
from promptcache_cli.options import (
    AGE,
    SIZE,
    confirm,
    dry_run_option,
    open_existing,
    store_options,
    yes_option,
)

if TYPE_CHECKING:
    from promptcache import PrefixStore, PrunePlan, PruneReport, Removal


@click.command()
@click.option(
    "--max-size",
    type=SIZE,
    help="Evict until the store has this size  [default: the store's limit]",
)
@click.option(
    "--older-than", type=AGE, help="Evict what was not used for this long: 7d"
)
@click.option("-m", "--model", help="Evict everything of this model")
@store_options
@dry_run_option
@yes_option
def prune(
    max_size: int | None,
    older_than: float | None,
    model: str | None,
    store_path: str | None,
    json_: bool,
    quiet: bool,
    dry_run: bool,
    yes: bool,
) -> None:
    """Sweep garbage, then evict what is unwanted

    Garbage is files that nothing refers to: what a killed process left, and
    damaged blobs set aside. Pinned prefixes always stay, and so do files that are
    not promptcache's, which are named. Prints what is removed and why.

    Example:

    \b
        promptcache prune --dry-run
        promptcache prune --max-size 5GB --older-than 2w
    """
    from promptcache.models.load import display_name
    from promptcache.store.reports import PrunePolicy

    console = output.Console(quiet=quiet)
    with open_existing(store_path) as store:
        limit = store.max_nbytes if max_size is None else max_size
        policy = PrunePolicy(
            max_nbytes=limit,
            older_than=older_than,
            model=model and _stored_model(store, display_name(model)),
        )
        plan = store.plan_prune(policy)
        if not json_:
            _print_plan(plan)
        num_files = len(plan.removals) + len(plan.garbage)
        if num_files and not dry_run:
            confirm(f"Remove {num_files} files?", yes=yes)
        report = _dry_report(plan) if dry_run else store.execute(plan)
        if json_:
            output.json_data(_as_json(plan, report, dry_run=dry_run))
    freed, kept = format_size(report.freed_nbytes), format_size(report.kept_nbytes)
    verb = "Would free" if dry_run else "Freed"
    console.info(
        f"{verb} {freed}, {kept} kept" if num_files else f"Nothing to do, {kept}"
    )
    _warn_of_rest(plan, limit)


def _warn_of_rest(plan: "PrunePlan", limit: int) -> None:
    from promptcache.store.reports import describe_foreign

    if plan.foreign:
        output.warn(describe_foreign(plan.foreign))
    if plan.over_nbytes:
        output.warn(
            f"still {format_size(plan.over_nbytes)} over {format_size(limit)}: "
            "the rest is pinned or not a prefix"
        )


def _stored_model(store: "PrefixStore", model: str) -> str:
    """Return a model's name. Raises KeyNotFoundError if nothing is stored of it."""
    models = sorted({prefix.model for prefix in store.prefixes()})
    if model not in models:
        listed = ", ".join(models) or "none"
        raise KeyNotFoundError(f"no prefix is of model {model!r}, there are: {listed}")
    return model


def _print_plan(plan: "PrunePlan") -> None:
    rows = [[r.key[:12], format_size(r.nbytes), _reason(r)] for r in plan.removals]
    rows += [[g.path, format_size(g.nbytes), "garbage"] for g in plan.garbage]
    if rows:
        output.table(["WHAT", "SIZE", "REASON"], rows)


def _reason(removal: "Removal") -> str:
    if removal.cut_at is None:
        return removal.reason
    return f"{removal.reason}; others need its first {removal.cut_at} tokens"


def _dry_report(plan: "PrunePlan") -> "PruneReport":
    from promptcache.store.reports import PruneReport

    freed = sum(removal.nbytes for removal in plan.removals)
    freed += sum(garbage.nbytes for garbage in plan.garbage)
    return PruneReport(plan.removals, plan.garbage, freed, plan.total_nbytes - freed)


def _as_json(
    plan: "PrunePlan", report: "PruneReport", *, dry_run: bool
) -> dict[str, object]:
    return {
        "removed": [removal._asdict() for removal in report.removals],
        "garbage": [garbage._asdict() for garbage in report.garbage],
        "foreign": [file._asdict() for file in plan.foreign],
        "freed_nbytes": report.freed_nbytes,
        "kept_nbytes": report.kept_nbytes,
        "dry_run": dry_run,
    }
