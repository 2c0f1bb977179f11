"""`promptcache verify`."""

from typing import TYPE_CHECKING

import click

from promptcache import config
from promptcache_cli import output
from promptcache_cli.options import open_existing, store_options

if TYPE_CHECKING:
    from promptcache import VerifyReport


@click.command()
@click.option("--fix", is_flag=True, help="Take out what is damaged or missing")
@store_options
@click.pass_context
def verify(
    ctx: click.Context, fix: bool, store_path: str | None, json_: bool, quiet: bool
) -> None:
    """Check every blob, and rebuild what the index has lost

    Prints the damage found, and exits with 1 if there is any that --fix did not
    take out. Damaged blobs are moved to the store's quarantine/ folder, which
    prune sweeps; what they held is computed again when it is needed. With --fix,
    anything else with the name of a file or folder of the store is moved there, too.

    Example:

    \b
        promptcache verify --fix
    """
    from promptcache.store.reports import describe_foreign
    from promptcache.store.store import PrefixStore

    console = output.Console(quiet=quiet)
    path = config.store_dir(store_path)
    if fix and PrefixStore.is_in(path):
        PrefixStore.clear_the_way(path)
    with (
        open_existing(store_path) as store,
        console.progress("Checking", "blobs") as progress,
    ):
        report = store.verify(fix=fix, progress=progress)
    if json_:
        output.json_data(_as_json(report))
    else:
        _print_damage(report)
    console.info(_summary(report))
    if report.foreign:
        output.warn(describe_foreign(report.foreign))
    if not report.is_sound:
        ctx.exit(1)


def _as_json(report: "VerifyReport") -> dict[str, object]:
    return {
        "checked": report.checked,
        "damaged": [damage._asdict() for damage in report.damaged],
        "quarantined": list(report.quarantined),
        "orphans": report.orphans,
        "missing": len(report.missing),
        "rebuilt": report.rebuilt,
        "foreign": [file._asdict() for file in report.foreign],
        "fixed": report.fixed,
    }


def _print_damage(report: "VerifyReport") -> None:
    rows = [[damage.key, damage.reason] for damage in report.damaged]
    rows += [[key, "blob is missing"] for key in report.missing]
    rows += [[key, "set aside in quarantine/"] for key in report.quarantined]
    if rows:
        output.table(["KEY", "DAMAGE"], rows)


def _summary(report: "VerifyReport") -> str:
    counts = (
        f"{report.checked} blobs checked, {len(report.damaged)} damaged, "
        f"{len(report.missing)} missing, {report.rebuilt} added to the index"
    )
    if report.damaged or report.missing:
        return f"{counts}: " + (
            "taken out" if report.fixed else "run `promptcache verify --fix`"
        )
    return counts
