"""Names: what a pin may be called, and what its name is in the whole store."""

from promptcache.errors import UsageError

# Longer ones fill what lists them.
MAX_NAME_LENGTH = 128


def check_name(name: str) -> None:
    """Raise UsageError if this cannot name a prefix."""
    if len(name) > MAX_NAME_LENGTH:
        raise UsageError(
            f"{name[:20]!r}… is too long for a name, use up to {MAX_NAME_LENGTH} "
            "characters"
        )
    if not name.strip() or not name.isprintable():
        raise UsageError(f"{name!r} cannot be a name, use printable characters")


def full_name(namespace: str, name: str | None) -> str | None:
    """Return what a name in a namespace is in the whole store: `namespace/name`.

    In the default namespace that is the name itself.
    """
    return f"{namespace}/{name}" if namespace and name is not None else name
