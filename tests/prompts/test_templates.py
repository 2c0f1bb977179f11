"""Real chat templates: where the system prompt ends, and what hits up to there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import load_tokenizer

from promptcache import CachedGenerator, PrefixStore, UsageError
from promptcache.prompts.chat import parse_chat
from promptcache.prompts.parts import compose
from promptcache.prompts.render import RenderedPrompt, render_prompt
from tests.helpers import tiny
from tests.helpers.templates import REAL_TEMPLATES, SYSTEM, TOOLS

TEMPLATES = sorted(REAL_TEMPLATES.glob("*.jinja"))
QUESTIONS = ("I open the door", "What now?", "\n\nZebra", "42", "Äpfel", " the end")
ANSWER = "It opens with a creak."

pytestmark = pytest.mark.skipif(not TEMPLATES, reason="templates are not here")


@pytest.fixture(scope="module")
def make_generator(
    model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, PrefixStore], CachedGenerator]:
    """Return a function that gives the tiny model another chat template."""
    loaded = CachedGenerator.load(model_dir, reuse=False, save=False)

    def make(template: str, store: PrefixStore) -> CachedGenerator:
        folder = tmp_path_factory.mktemp("tokenizer")
        tiny.save_tokenizer(folder, template)
        return CachedGenerator(
            loaded.model, load_tokenizer(folder), store=store, identity=loaded.identity
        )

    return make


@pytest.fixture(params=TEMPLATES, ids=lambda path: path.stem)
def generator(
    request: pytest.FixtureRequest,
    make_generator: Callable[[str, PrefixStore], CachedGenerator],
    store: PrefixStore,
) -> CachedGenerator:
    """A generator for each template that renders a system prompt and a question."""
    made = make_generator(request.param.read_text(), store)
    try:
        made.render(messages("x"), tools_for(made))
    except UsageError as error:
        pytest.skip(str(error))
    return made


def messages(question: str, *more: str) -> list[dict[str, Any]]:
    """Return a conversation of questions with the same answer to each but the last."""
    said: list[dict[str, Any]] = [{"role": "user", "content": question}]
    for text in more:
        said.append({"role": "assistant", "content": ANSWER})
        said.append({"role": "user", "content": text})
    return list(compose(system=SYSTEM, messages=said))


def tools_for(generator: CachedGenerator) -> list[dict[str, Any]] | None:
    """Return tools if the template cannot do without."""
    try:
        generator.render(messages("x"))
    except UsageError:
        return TOOLS
    return None


def render(generator: CachedGenerator, *questions: str) -> RenderedPrompt:
    return generator.render(messages(*questions), tools_for(generator))


def shared_tokens(left: list[int], right: list[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def test_system_prompt_ends_at_the_same_token_for_all_questions(
    generator: CachedGenerator,
) -> None:
    rendered = [render(generator, question) for question in QUESTIONS]

    first = rendered[0].token_ids[: rendered[0].boundaries[0]]
    text = generator.tokenizer.decode(first)
    assert SYSTEM in text
    assert QUESTIONS[0] not in text
    for question, prompt in zip(QUESTIONS, rendered, strict=True):
        assert prompt.boundaries[0] == shared_tokens(prompt.token_ids, first)
        if not question[0].isspace():
            # A question's own blanks may merge with the template's.
            assert prompt.boundaries[0] == len(first)


def test_another_question_hits_up_to_where_the_system_prompt_ends(
    generator: CachedGenerator,
) -> None:
    tools = tools_for(generator)
    one, other = (render(generator, question) for question in QUESTIONS[:2])
    list(generator.stream_generate(one, max_tokens=1, save=True))

    match = generator.match(messages(QUESTIONS[1]), tools=tools)

    assert match.cached_tokens == shared_tokens(one.token_ids, other.token_ids)
    assert match.cached_tokens >= other.boundaries[0]


def test_built_system_prompt_is_reused_to_its_end_by_every_question(
    generator: CachedGenerator,
) -> None:
    tools = tools_for(generator)
    built = generator.build(system=SYSTEM, tools=tools)

    for question in ("I open the door", "What now?", "42", "Äpfel"):
        prompt = render(generator, question)
        match = generator.match(prompt)
        assert match.cached_tokens == built.num_tokens == prompt.boundaries[0]


def test_next_turn_shares_the_end_of_the_users_message(
    generator: CachedGenerator,
) -> None:
    chat = parse_chat(messages(QUESTIONS[0]), tools_for(generator))
    options = {"tools": chat.tools, "every_message": True}
    one = render_prompt(generator.tokenizer, chat.messages, **options)
    try:
        other = render(generator, *QUESTIONS[:2])
    except UsageError as error:
        pytest.skip(str(error))

    shared = shared_tokens(one.token_ids, other.token_ids)
    boundaries = [b for b in (*one.boundaries, len(one.token_ids)) if b <= shared]
    decode = generator.tokenizer.decode
    if QUESTIONS[0] not in decode(one.token_ids[:shared]):
        pytest.skip("the template renders an earlier turn in another way")
    assert QUESTIONS[0] in decode(one.token_ids[: boundaries[-1]])
