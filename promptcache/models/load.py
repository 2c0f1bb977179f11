"""Loading: a model with its tokenizer and what identifies it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from promptcache.config import absolute, known_models_path, model_name
from promptcache.errors import ModelError
from promptcache.models.default import download
from promptcache.models.identity.identity import (
    ModelIdentity,
    hash_weights,
    make_identity,
    parts_of_tree,
)
from promptcache.models.identity.known_models import FileState, KnownModels, state_of
from promptcache.models.identity.module_tree import describe, plain
from promptcache.segments.fingerprint import hash_json


def load(
    path_or_hf_repo: str | Path | None = None,
    *,
    adapter_path: str | Path | None = None,
    announce: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> tuple[Any, Any, ModelIdentity]:
    """Load a model and its tokenizer with `mlx_lm.load`, and identify it.

    Args:
        path_or_hf_repo: A folder or a hub repository, else `PROMPTCACHE_MODEL`,
            else the embedded default.
        adapter_path: The folder of a LoRA adapter.
        announce: Called with a line for people before something takes long.
        kwargs: Further arguments of `mlx_lm.load`.

    Raises:
        ModelError: The model cannot be found or loaded.
    """
    model, tokenizer, identity, _ = load_with_config(
        path_or_hf_repo, adapter_path=adapter_path, announce=announce, **kwargs
    )
    return model, tokenizer, identity


def load_with_config(
    path_or_hf_repo: str | Path | None = None,
    *,
    adapter_path: str | Path | None = None,
    announce: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> tuple[Any, Any, ModelIdentity, dict[str, Any]]:
    """Do what `load` does, and return the model's config, too. Raises ModelError."""
    import mlx_lm

    name = _wanted(path_or_hf_repo)
    revision = kwargs.pop("revision", None)
    adapter = None if adapter_path is None else _adapter(adapter_path)
    source, folder = _find(name, revision=revision, announce=announce)
    files = [folder] if adapter is None else [folder, adapter]
    before = state_of(files)
    try:
        model, tokenizer, config = mlx_lm.load(
            str(folder),
            adapter_path=None if adapter is None else str(adapter),
            return_config=True,
            **kwargs,
        )
    except Exception as error:
        # The loader and the model's own code raise whatever they like.
        message = f"model {name!r} cannot be loaded: {_reason(error)}"
        raise ModelError(message) from error
    if config.get("model_file") and state_of(files) != before:
        # Which code it runs cannot be told.
        raise ModelError(f"model {name!r} has changed while it was loaded, try again")
    identity = identify_loaded(model, files, before, kwargs, announce)
    # Another revision than the hub's newest is found by its folder only.
    source = str(folder) if revision else source
    identity = replace(identity, name=display_name(name), source=source)
    return model, tokenizer, identity, config


def identify_loaded(
    model: Any,
    folders: Sequence[Path],
    before: FileState | None,
    options: Mapping[str, Any],
    announce: Callable[[str], None] | None,
) -> ModelIdentity:
    """Identify a model that was loaded from folders, by what is known of their files.

    Args:
        model: What was loaded, whatever became of the files meanwhile.
        folders: Its folder, and that of its adapter.
        before: The state of the files before it was loaded.
        options: What the loader was given besides.
        announce: Called with a line for people when hashing takes long.

    Raises ModelError if it cannot be identified.
    """
    tree = describe(model)
    parts = parts_of_tree(model, tree)
    known_models = KnownModels(known_models_path())
    loader = _loader(parts, options)
    # What is not read yet may be something else when it is.
    is_read = not options.get("lazy")
    weights = known_models.weights_of(before, loader) if before and is_read else None
    if weights is None or state_of(folders) != before:
        weights = hash_weights(tree, announce)
        if before is not None and state_of(folders) == before:
            known_models.remember(before, loader, weights)
    return make_identity(model, tree, {"weights": weights, **parts})


def _loader(parts: Mapping[str, str], options: Mapping[str, Any]) -> str:
    """Return a hash over what makes arrays of files: code, arguments and a device."""
    import mlx.core as mx

    config = plain(options.get("model_config"))
    versions = [version("mlx"), version("mlx-lm"), str(mx.default_device())]
    return hash_json([parts, config, versions])


def load_draft(
    path_or_hf_repo: str | Path, vocab_size: int
) -> tuple[Any, ModelIdentity]:
    """Load a draft model with a vocabulary of a given size, and identify it.

    Raises ModelError if there is none, or its vocabulary has another size.
    """
    draft, tokenizer, identity = load(path_or_hf_repo)
    if tokenizer.vocab_size != vocab_size:
        raise ModelError(
            f"draft model {path_or_hf_repo} has another vocabulary than the model"
        )
    return draft, identity


def ensure_downloaded(
    path_or_hf_repo: str | Path | None = None,
    *,
    adapter_path: str | Path | None = None,
    announce: Callable[[str], None] | None = None,
) -> None:
    """Have a model's files on this machine, as `load` would, and load nothing.

    Raises ModelError if there is no such model.
    """
    if adapter_path is not None:
        _adapter(adapter_path)
    _find(_wanted(path_or_hf_repo), announce=announce)


def load_tokenizer(source: str | None) -> Any:
    """Return the tokenizer of a folder or hub repository that is on this machine.

    Raises:
        ModelError: It is not.
    """
    from mlx_lm.utils import load_tokenizer

    if source is None:
        raise ModelError("the model was loaded by the caller")
    try:
        return load_tokenizer(_folder(source))
    except Exception as error:
        # The hub and the tokenizer's own code raise whatever they like.
        raise ModelError(f"the tokenizer of {source} is not here") from error


def _wanted(path_or_hf_repo: str | Path | None) -> str:
    return str(path_or_hf_repo or model_name() or download.NAME)


def _find(
    wanted: str,
    *,
    revision: str | None = None,
    announce: Callable[[str], None] | None = None,
) -> tuple[str, Path]:
    """Return the folder or repository of a model, and where it is on this machine."""
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS, snapshot_download

    source = _source(wanted, announce)
    if Path(source).is_dir():
        return source, Path(source)
    try:
        folder = snapshot_download(
            source, revision=revision, allow_patterns=DEFAULT_ALLOW_PATTERNS
        )
    except Exception as error:
        # The hub raises whatever it likes.
        reason = (
            f"it is no folder here, and the hub does not give it ({_reason(error)})"
        )
        raise ModelError(f"model {wanted!r} cannot be loaded: {reason}") from error
    return source, Path(folder)


def _adapter(path: str | Path) -> Path:
    adapter = absolute(path)
    if not (adapter / "adapter_config.json").exists():
        raise ModelError(f"adapter {path} not found, it has no adapter_config.json")
    return adapter


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def _source(wanted: str, announce: Callable[[str], None] | None) -> str:
    """Return the folder or repository to hand to mlx-lm."""
    if wanted == download.NAME:
        return str(download.ensure_default_model(announce=announce))
    path = Path(wanted).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.exists() or wanted.startswith((".", "/", "~")) or wanted.count("/") > 1:
        raise ModelError(f"model {wanted!r} not found, there is no such folder")
    return wanted


def _folder(source: str) -> Path:
    from mlx_lm.utils import hf_repo_to_path

    return Path(source) if Path(source).is_dir() else hf_repo_to_path(source)


def display_name(wanted: str) -> str:
    """Return a folder's name, or a hub repository as it is."""
    path = Path(wanted).expanduser()
    return path.resolve().name if path.is_dir() else wanted
