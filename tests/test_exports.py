"""What `import promptcache` offers."""

import re
from pathlib import Path

import pytest

import promptcache
from promptcache import CachedGenerator, errors
from promptcache.engine.options import GenerateOptions
from promptcache.engine.sampling import SamplingOptions
from promptcache.models.settings import ReadOptions

ROOT = Path(__file__).parents[1]


def test_all_is_sorted_without_repeats() -> None:
    assert promptcache.__all__ == sorted(set(promptcache.__all__))


@pytest.mark.parametrize("name", promptcache.__all__)
def test_name_can_be_imported(name: str) -> None:
    value = getattr(promptcache, name)

    assert value.__name__ == name
    assert value.__doc__


def test_all_errors_are_exported() -> None:
    classes = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }

    assert classes <= set(promptcache.__all__)


def test_public_names_are_in_all() -> None:
    classes = {name for name, value in vars(promptcache).items() if name[0].isupper()}

    assert classes <= set(promptcache.__all__) | {"TYPE_CHECKING", "Any"}


def test_lazy_names_are_listed_by_dir() -> None:
    assert set(promptcache.__all__) <= set(dir(promptcache))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Unknown'"):
        promptcache.Unknown  # noqa: B018


def test_every_error_is_a_promptcache_error_with_an_exit_code() -> None:
    for name, value in vars(errors).items():
        if name.endswith("Error"):
            assert issubclass(value, errors.PromptCacheError)
            assert value.exit_code in (1, 2)
            assert value.__doc__


def test_package_says_that_it_is_typed() -> None:
    assert (Path(promptcache.__file__).parent / "py.typed").exists()


def test_public_names_are_on_the_page_of_the_python_api() -> None:
    page = (ROOT / "docs/python-api.md").read_text()

    assert [n for n in promptcache.__all__ if not re.search(rf"\b{n}\b", page)] == []


@pytest.mark.parametrize("kind", [GenerateOptions, ReadOptions, SamplingOptions])
def test_options_are_documented(kind: type) -> None:
    page = (ROOT / "docs/python-api.md").read_text()
    kinds = (GenerateOptions, ReadOptions, SamplingOptions)
    described = "".join(kind.__doc__ or "" for kind in kinds)

    for name in kind.__annotations__:
        assert f"`{name}" in page
        assert f"\n        {name}: " in described


@pytest.mark.parametrize("method", ["build", "match", "explain", "stream_generate"])
def test_unknown_option_is_a_type_error(
    method: str, generator: CachedGenerator
) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'kv_bit'"):
        getattr(generator, method)("Hello", kv_bit=8)
