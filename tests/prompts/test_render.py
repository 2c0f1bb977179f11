"""Prompts of every kind become the token ids that mlx-lm would read."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_tokenizer
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from promptcache import UsageError
from promptcache.prompts.chat import is_messages
from promptcache.prompts.parts import compose
from promptcache.prompts.render import render_prefix, render_prompt
from promptcache.prompts.template import encode_text, render
from tests.helpers import tiny
from tests.helpers.templates import REAL_TEMPLATES, SYSTEM, TOOLS

WITHOUT_SYSTEM_ROLE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}"
    "{{ raise_exception('no system role') }}"
    "{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>"
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def make_tokenizer(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Any]:
    """Return a function that makes a tokenizer with a chat template."""

    def make(
        chat_template: str | None = tiny.CHAT_TEMPLATE, *, adds_bos: bool = False
    ) -> Any:
        folder = tmp_path_factory.mktemp("tokenizer")
        tiny.save_tokenizer(folder, chat_template)
        if adds_bos:
            add_bos(folder / "tokenizer.json")
        return load_tokenizer(folder)

    return make


def add_bos(path: Path) -> None:
    """Let a tokenizer put BOS before every text, as Llama's does."""
    tokenizer = Tokenizer.from_file(str(path))
    bos = ("<|bos|>", tokenizer.token_to_id("<|bos|>"))
    tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[bos]
    )
    tokenizer.save(str(path))


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    return make_tokenizer()


def to_token_ids(tokenizer: Any, prompt: Any, **options: Any) -> list[int]:
    return render_prompt(tokenizer, prompt, **options).token_ids


# Kinds of prompts


def test_text_is_tokenized_as_it_is(tokenizer: Any) -> None:
    token_ids = to_token_ids(tokenizer, "and the end")

    tokens = tokenizer.convert_ids_to_tokens(token_ids)
    assert tokens == ["and", "Ġthe", *"Ġend"]


def test_text_is_not_put_into_the_chat_template(tokenizer: Any) -> None:
    assert tokenizer.decode(to_token_ids(tokenizer, "Hello")) == "Hello"


def test_messages_go_through_the_chat_template(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Hello"},
    ]

    token_ids = to_token_ids(tokenizer, messages)

    text = "<|system|>Be brief<|end|><|user|>Hello<|end|><|assistant|>"
    assert tokenizer.decode(token_ids) == text
    assert token_ids[0] == tokenizer.convert_tokens_to_ids("<|system|>")


def test_tools_go_through_the_chat_template(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hello"}]

    token_ids = to_token_ids(tokenizer, messages, tools=TOOLS)

    text = tokenizer.decode(token_ids)
    assert text.startswith("<|tools|>[{")
    assert '"name": "roll"' in text


@pytest.mark.parametrize("make", [list, tuple, mx.array, np.array])
def test_token_ids_of_every_kind_stay_as_they_are(
    tokenizer: Any, make: Callable[[list[int]], Any]
) -> None:
    token_ids = to_token_ids(tokenizer, make([3, 1, 2]))

    assert token_ids == [3, 1, 2]
    assert all(type(token_id) is int for token_id in token_ids)


def test_token_ids_are_copied(tokenizer: Any) -> None:
    given = [3, 1, 2]

    token_ids = to_token_ids(tokenizer, given)
    given.append(4)

    assert token_ids == [3, 1, 2]


@pytest.mark.parametrize("prompt", ["", [], (), mx.array([], dtype=mx.int32)])
def test_empty_prompt_is_refused(tokenizer: Any, prompt: Any) -> None:
    with pytest.raises(UsageError, match="empty"):
        to_token_ids(tokenizer, prompt)


@pytest.mark.parametrize(
    "prompt",
    [[1.5], ["a"], [[1, 2]], [True], [None], {"role": "user", "content": "Hello"}],
    ids=str,
)
def test_what_is_no_prompt_is_refused(tokenizer: Any, prompt: Any) -> None:
    with pytest.raises(UsageError):
        to_token_ids(tokenizer, prompt)


@pytest.mark.parametrize(
    "messages",
    [
        [{"content": "Hello"}],
        [{"role": "user", "content": "Hello"}, "Hello"],
        [{"role": "user", "content": "Hello"}, {}],
    ],
    ids=str,
)
def test_messages_without_a_role_are_refused(tokenizer: Any, messages: Any) -> None:
    with pytest.raises(UsageError, match="role"):
        to_token_ids(tokenizer, messages)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Hello", False),
        ([], False),
        ([1, 2], False),
        ([{"role": "user", "content": ""}], True),
        (({"role": "user", "content": ""},), True),
        (mx.array([1]), False),
    ],
)
def test_messages_are_told_from_other_prompts(prompt: Any, expected: bool) -> None:
    assert is_messages(prompt) is expected


# BOS


def test_bos_comes_once_before_text(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(adds_bos=True)

    token_ids = encode_text(tokenizer, "Hello")

    assert tokenizer.decode(token_ids) == "<|bos|>Hello"


def test_bos_that_is_there_is_not_repeated(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(adds_bos=True)

    token_ids = encode_text(tokenizer, "<|bos|>Hello")

    assert tokenizer.decode(token_ids) == "<|bos|>Hello"


def test_bos_of_a_template_comes_once(make_tokenizer: Callable[..., Any]) -> None:
    template = "{{ bos_token }}" + tiny.CHAT_TEMPLATE
    tokenizer = make_tokenizer(template, adds_bos=True)

    token_ids = render(tokenizer, [{"role": "user", "content": "Hello"}])

    text = "<|bos|><|user|>Hello<|end|><|assistant|>"
    assert tokenizer.decode(token_ids) == text


# Templates that lack something


def test_system_goes_before_the_first_user_where_there_is_no_system_role(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer(WITHOUT_SYSTEM_ROLE)

    token_ids = render(tokenizer, compose(system="Be brief", user="Hello"))

    assert tokenizer.decode(token_ids) == "<|user|>Be brief\n\nHello<|end|>"


def test_stable_prefix_of_a_template_without_system_role_ends_after_the_system(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer(WITHOUT_SYSTEM_ROLE)

    prefix = render_prefix(tokenizer, compose(system="S", user=""))

    assert tokenizer.decode(prefix.token_ids) == "<|user|>S\n\n"


def test_system_alone_is_refused_where_there_is_no_system_role(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer(WITHOUT_SYSTEM_ROLE)

    with pytest.raises(UsageError, match="no system role"):
        render(tokenizer, compose(system="Be brief"))


def test_reason_of_a_template_that_refuses_is_told(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer("{{ raise_exception('roles must alternate') }}")

    with pytest.raises(UsageError, match="roles must alternate"):
        render(tokenizer, compose(system="Be brief", user="Hello"))


def test_model_without_a_template_gets_the_contents(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer(None, adds_bos=True)

    token_ids = to_token_ids(tokenizer, compose(system="Be brief", user="Hello"))

    assert tokenizer.decode(token_ids) == "<|bos|>Be brief\n\nHello"


def test_contents_in_parts_are_joined_without_a_template(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer(None)
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]

    token_ids = to_token_ids(tokenizer, [{"role": "user", "content": parts}])

    assert tokenizer.decode(token_ids) == "Hello"


# Composing


def test_documents_come_before_the_question() -> None:
    messages = compose(system="S", documents=["one", "two"], user="why")

    assert messages == [
        {"role": "system", "content": "S"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "one\n\n"},
                {"type": "text", "text": "two\n\n"},
                {"type": "text", "text": "why"},
            ],
        },
    ]


def test_given_messages_stand_between_system_and_user() -> None:
    given = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

    messages = compose(system="S", messages=given, user="c")

    assert [m["content"] for m in messages] == ["S", "a", "b", "c"]


def test_nothing_composes_to_nothing() -> None:
    assert compose() == []


# The stable prefix


def test_stable_prefix_ends_where_the_user_speaks(tokenizer: Any) -> None:
    messages = compose(system=SYSTEM, user="")
    prefix = render_prefix(tokenizer, messages, tools=TOOLS)

    assert prefix.is_prefix
    text = tokenizer.decode(prefix.token_ids)
    assert text.endswith(f"<|system|>{SYSTEM}<|end|><|user|>")
    assert text.startswith("<|tools|>")


def test_prompt_that_shares_nothing_has_no_stable_prefix(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")

    with pytest.raises(UsageError, match="nothing to build"):
        render_prefix(tokenizer, compose(user=""))


USER_MESSAGES = (
    "I open the door",
    "What now?",
    "Zebra",
    "once upon a time",
    "Äpfel und Birnen",
)


def contains(token_ids: Sequence[int], part: Sequence[int]) -> bool:
    last = len(token_ids) - len(part)
    return any(
        list(token_ids[i : i + len(part)]) == list(part) for i in range(last + 1)
    )


@pytest.mark.parametrize(
    "path", sorted(REAL_TEMPLATES.glob("*.jinja")), ids=lambda path: path.stem
)
def test_stable_prefix_of_a_real_template_holds_for_other_messages(
    make_tokenizer: Callable[..., Any], path: Path
) -> None:
    tokenizer = make_tokenizer(path.read_text())
    tools = tools_for(tokenizer)

    def render_with(text: str) -> list[int]:
        return render(tokenizer, compose(system=SYSTEM, user=text), tools=tools)

    messages = compose(system=SYSTEM, user="")
    prefix = render_prefix(tokenizer, messages, tools=tools).token_ids

    assert contains(prefix, encode_text(tokenizer, SYSTEM))
    for message in USER_MESSAGES:
        rendered = render_with(message)
        found = render_prompt(
            tokenizer, compose(system=SYSTEM, user=message), tools=tools
        )
        assert found.token_ids == rendered
        assert found.boundaries[0] == len(prefix)
        assert rendered[: len(prefix)] == prefix
        assert contains(rendered[len(prefix) :], encode_text(tokenizer, message))


def tools_for(tokenizer: Any) -> list[dict[str, Any]] | None:
    """Return tools if a template asks for them; skip one that asks for more."""
    messages = compose(system=SYSTEM, user="x")
    for tools in (None, TOOLS):
        try:
            render(tokenizer, messages, tools=tools)
        except UsageError as error:
            reason = str(error)
        else:
            return tools
    pytest.skip(reason)


@pytest.mark.skipif(not REAL_TEMPLATES.exists(), reason="templates are not here")
def test_real_templates_are_there() -> None:
    assert len(list(REAL_TEMPLATES.glob("*.jinja"))) >= 20


# Messages as clients send them


TOOL_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ call.function.name }}({{ call.function.arguments | tojson }})"
    "{% endfor %}<|end|>{% endfor %}"
)


def tool_call(arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "roll", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"sides": 6}', 'roll({"sides": 6})'),
        ({"sides": 6}, 'roll({"sides": 6})'),
        ("no JSON", 'roll("no JSON")'),
        (None, "roll(null)"),
    ],
)
def test_arguments_of_tool_calls_become_objects(
    make_tokenizer: Callable[..., Any], arguments: Any, expected: str
) -> None:
    tokenizer = make_tokenizer(TOOL_TEMPLATE)
    said = [{"role": "user", "content": "Hi"}, tool_call(arguments)]

    token_ids = render(tokenizer, said, generation_prompt=False)

    text = f"<|user|>Hi<|end|><|assistant|>{expected}<|end|>"
    assert tokenizer.decode(token_ids) == text


def test_messages_are_not_changed_by_rendering(tokenizer: Any) -> None:
    said = [{"role": "user", "content": None}, tool_call('{"sides": 6}')]
    before = repr(said)

    to_token_ids(tokenizer, said, tools=TOOLS)

    assert repr(said) == before


def test_arguments_reach_the_template(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("{{ style }}" + tiny.CHAT_TEMPLATE)
    said = [{"role": "user", "content": "Hi"}]

    rendered = render_prompt(tokenizer, said, chat_template_config={"style": "terse"})

    assert tokenizer.decode(rendered.token_ids).startswith("terse<|user|>")
    assert rendered.origin is not None
    assert rendered.origin.config == {"style": "terse"}


@pytest.mark.parametrize("name", ["tools", "tokenize", "add_generation_prompt"])
def test_what_is_no_argument_of_templates_is_refused(tokenizer: Any, name: str) -> None:
    said = [{"role": "user", "content": "Hi"}]

    with pytest.raises(UsageError, match=f"{name} is not an argument"):
        render_prompt(tokenizer, said, chat_template_config={name: True})


def test_head_ends_where_the_first_user_speaks(tokenizer: Any) -> None:
    said = compose(system=SYSTEM, user="Hi")

    whole = render_prompt(tokenizer, said, tools=TOOLS)
    opened = render_prefix(tokenizer, compose(system=SYSTEM, user=""), tools=TOOLS)
    without = render_prompt(tokenizer, compose(system=SYSTEM), tools=TOOLS)

    assert whole.system_end == opened.system_end == len(opened.token_ids)
    assert whole.origin is not None and whole.origin.head == whole.system_end
    assert tokenizer.decode(whole.token_ids[: whole.system_end]).endswith("<|user|>")
    # Where the user would speak after this.
    assert tokenizer.decode(without.token_ids[: without.system_end]).endswith(
        f"{SYSTEM}<|end|>"
    )


def test_each_part_of_the_last_message_begins_at_a_boundary(tokenizer: Any) -> None:
    said = compose(system="S", documents=["one", "two"], user="why")

    rendered = render_prompt(tokenizer, said)

    texts = [tokenizer.decode(rendered.token_ids[:b]) for b in rendered.boundaries]
    assert [text.rpartition("<|user|>")[2] for text in texts] == [
        "",
        "one\n\n",
        "one\n\ntwo\n\n",
    ]


def test_messages_begin_at_boundaries_if_wanted(tokenizer: Any) -> None:
    said = [
        *compose(system="S", user="One?"),
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Two?"},
    ]

    rendered = render_prompt(tokenizer, said, every_message=True)

    texts = [tokenizer.decode(rendered.token_ids[:b]) for b in rendered.boundaries]
    assert [text[-13:] for text in texts] == [
        "<|system|>",
        "|end|><|user|>"[-13:],
        "<|assistant|>",
        "|end|><|user|>"[-13:],
    ]


def test_answer_begins_in_history_before_the_start_of_its_thinking(
    make_tokenizer: Callable[..., Any],
) -> None:
    template = tiny.CHAT_TEMPLATE.replace("<|assistant|>{%", "<|assistant|>think:{%")
    tokenizer = make_tokenizer(template)
    said = compose(system="S", user="One?")

    rendered = render_prompt(tokenizer, said, every_message=True)
    plain = render_prompt(tokenizer, said)

    assert rendered.answer in rendered.boundaries
    text = tokenizer.decode(rendered.token_ids[: rendered.answer])
    assert text.endswith("<|assistant|>")
    assert plain.answer is None


def test_boundaries_are_nearly_the_same_without_offsets(tokenizer: Any) -> None:
    class Slow:
        """As much of a tokenizer as has no offsets."""

        def __getattr__(self, name: str) -> Any:
            if name == "backend_tokenizer":
                raise AttributeError(name)
            return getattr(tokenizer, name)

    said = compose(system=SYSTEM, documents=["one", "two"], user="why")

    slow = render_prompt(Slow(), said, every_message=True)

    fast = render_prompt(tokenizer, said, every_message=True)
    assert slow.token_ids == fast.token_ids
    # Blanks at the end of a text may merge with each other where they else would not.
    for found, expected in zip(slow.boundaries, fast.boundaries, strict=True):
        assert expected - 2 <= found <= expected


def test_arguments_that_json_does_not_know_are_noted_as_text(tokenizer: Any) -> None:
    said = [{"role": "user", "content": "Hi"}]

    rendered = render_prompt(tokenizer, said, chat_template_config={"path": Path("x")})

    assert rendered.origin is not None
    assert rendered.origin.config == {"path": "x"}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": ["a", "b"]},
        {"role": "user", "content": 5},
        {"role": "user", "content": {"text": "a"}},
        {"role": "user", "content": [{"type": "text", "text": None}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
        {"role": "user", "content": "\ud800"},
        {"role": "assistant", "tool_calls": "oops"},
        {"role": "assistant", "tool_calls": [None]},
        {"role": "assistant", "tool_calls": [{"function": "f"}]},
    ],
    ids=ascii,
)
def test_message_that_is_none_is_refused_in_one_line(
    tokenizer: Any, message: dict[str, Any]
) -> None:
    said = [{"role": "user", "content": "Hi"}, message]

    with pytest.raises(UsageError, match="message 2") as raised:
        render_prompt(tokenizer, said)

    assert "\n" not in str(raised.value)
