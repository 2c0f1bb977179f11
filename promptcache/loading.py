"""Loading: a model with its tokenizer and what identifies it."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from promptcache import default_model, location
from promptcache import fingerprint as fp
from promptcache.errors import ModelError
from promptcache.treatment import parts_of

SCALARS = (bool, int, float, str)


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What a model is, apart from how a run uses it.

    Attributes:
        name: Its name for people.
        source: The folder or hub repository it came from, or None.
        parts: The parts of a fingerprint that come from the model.
    """

    name: str
    source: str | None
    parts: Mapping[str, str]


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

    wanted = _wanted(path_or_hf_repo)
    revision = kwargs.pop("revision", None)
    adapter = None if adapter_path is None else _adapter(adapter_path)
    source, folder = _find(wanted, revision=revision, announce=announce)
    try:
        model, tokenizer, config = mlx_lm.load(
            str(folder),
            adapter_path=None if adapter is None else str(adapter),
            return_config=True,
            **kwargs,
        )
    except Exception as error:
        # The loader and the model's own code raise whatever they like.
        told = f"model {wanted!r} cannot be loaded: {_reason(error)}"
        raise ModelError(told) from error
    parts = {
        **_folder_parts(model, folder, config, adapter),
        "dtype": _dtypes(model),
    }
    # Another revision than the hub's newest is found by its folder only.
    source = str(folder) if revision else source
    return model, tokenizer, ModelIdentity(display_name(wanted), source, parts), config


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


def ensure_here(
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
    return str(path_or_hf_repo or location.model_name() or default_model.NAME)


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
    adapter = Path(path).expanduser()
    if not (adapter / "adapter_config.json").exists():
        raise ModelError(f"adapter {path} not found, it has no adapter_config.json")
    return adapter


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def _source(wanted: str, announce: Callable[[str], None] | None) -> str:
    """Return the folder or repository to hand to mlx-lm."""
    if wanted == default_model.NAME:
        return str(default_model.ensure_default_model(announce=announce))
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


def _folder_parts(
    model: Any, folder: Path, config: Mapping[str, Any], adapter: Path | None
) -> dict[str, str]:
    memo = location.file_hashes_path()
    try:
        return {
            "weights": fp.hash_weights(folder, memo),
            "config": fp.hash_config(config),
            "adapter": "" if adapter is None else fp.hash_adapter(adapter, memo),
            "implementation": _implementation(model, folder, config),
        }
    except OSError as error:
        raise ModelError(f"model files in {folder} cannot be read ({error})") from error


def _implementation(model: Any, folder: Path, config: Mapping[str, Any]) -> str:
    if model_file := config.get("model_file"):
        return fp.hash_source_file(folder / str(model_file))
    return fp.hash_implementation(type(model).__module__)


def _dtypes(model: Any) -> str:
    from mlx.utils import tree_flatten

    parameters = tree_flatten(model.parameters())
    return ",".join(sorted({str(array.dtype) for _, array in parameters}))


def identify(model: Any) -> ModelIdentity:
    """Identify a model that came from no known folder, by its content.

    Its parameters, its arguments and the plain attributes of its modules count.
    """
    parts = {
        "weights": _hash_parameters(model),
        "config": fp.hash_json(_attributes(model)),
        "adapter": "",
        "implementation": fp.hash_implementation(type(model).__module__),
        "dtype": _dtypes(model),
    }
    arguments = getattr(model, "args", None)
    name = str(getattr(arguments, "model_type", type(model).__module__))
    return ModelIdentity(name, None, parts)


def _hash_parameters(model: Any) -> str:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    checksum = xxhash.xxh3_128()
    for name, array in sorted(tree_flatten(model.parameters())):
        # A copy: on a GPU, what the host looks at leaves the device's own memory.
        copied = mx.contiguous(array).reshape(-1).view(mx.uint8) | 0
        mx.eval(copied)
        checksum.update(f"{name} {array.dtype} {array.shape}".encode())
        checksum.update(memoryview(copied))
    return checksum.hexdigest()


def _attributes(model: Any) -> list[Any]:
    """Return the model's arguments and each module's class and plain attributes."""
    arguments = getattr(model, "args", None)
    return [
        json.loads(json.dumps(vars(arguments) if arguments else None, default=str)),
        *sorted(
            [name, type(module).__qualname__, *_scalars(module)]
            for name, module in model.named_modules()
        ),
    ]


def _scalars(module: Any) -> Iterator[str]:
    for name, value in sorted(vars(module).items()):
        if isinstance(value, SCALARS) and name not in ("_no_grad", "_training"):
            yield f"{name}={value!r}"


def hash_layout(cache: Sequence[Any]) -> str:
    """Return a hash over the classes and the plain attributes of a fresh cache."""
    return fp.hash_json(
        [[name, type(part).__name__, *_scalars(part)] for name, part in parts_of(cache)]
    )
