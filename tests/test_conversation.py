"""A conversation reuses what it can, and answers as one from nothing would."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tiny
from test_hybrid_chat import THINKING_TEMPLATE, headers, shared_tokens

from promptcache import (
    CachedGenerator,
    Conversation,
    PrefixStore,
    PromptCacheWarning,
    StoreError,
    UsageError,
)
from promptcache.blobs import BlobFolder

CONFIGS = {
    "llama": tiny.LLAMA,
    "gemma3_text": tiny.GEMMA3,
    "qwen3_next": tiny.QWEN3_NEXT,
}
SYSTEM = "You keep the lighthouse. Answer in capitals. "
STOP = 263
# Longer than a window of 32 tokens, several windows, shorter, a single token; None
# ends with a stop token.
TURNS = (80, 5, None, 1, 150, 33)
Load = Callable[..., CachedGenerator]


class Letters:
    """Lets a model say capitals and spaces only, the likeliest of them.

    Random models emit bytes that are no text, so that an answer's text would not have
    the answer's tokens again. Capitals take part in no merge of `tiny`'s tokenizer.
    """

    def __init__(self, tokenizer: Any, forced: Mapping[int, int] | None = None) -> None:
        """Take what is said at some places of the answer, whatever is likely."""
        allowed = tokenizer.encode("ABCDEFGHIJKLMNOPQRSTUVWXYZ ")
        self._mask = self._only(allowed)
        self._forced = {n: self._only([t]) for n, t in (forced or {}).items()}
        self._num_prompt: int | None = None

    @staticmethod
    def _only(token_ids: list[int]) -> mx.array:
        mask = mx.full((512,), -mx.inf)
        mask[mx.array(token_ids)] = 0
        return mask

    def __call__(self, seen: mx.array, logits: mx.array) -> mx.array:
        if self._num_prompt is None:
            self._num_prompt = seen.size
        return logits + self._forced.get(seen.size - self._num_prompt, self._mask)


@dataclass
class Talk:
    """A conversation, and what the cache has read in it.

    Attributes:
        generator: What answers.
        conversation: The conversation.
        options: For every answer.
        read: The token ids that the cache had read by the end of each answer.
    """

    generator: CachedGenerator
    conversation: Conversation
    options: dict[str, Any] = field(default_factory=dict)
    read: list[list[int]] = field(default_factory=list)

    def letters(self, num_tokens: int | None) -> dict[str, Any]:
        """Return options for an answer of so many tokens; None ends by itself."""
        tokenizer = self.generator.tokenizer
        forced = {12: STOP} if num_tokens is None else None
        return {
            "max_tokens": num_tokens or 40,
            "logits_processors": [Letters(tokenizer, forced)],
            **self.options,
        }

    def prompt(self) -> list[int]:
        """Return the prompt of the last answer."""
        return self.generator.render(self.conversation.messages[:-1]).token_ids

    def say(self, text: str, num_tokens: int | None = 24, **options: Any) -> list[Any]:
        """Say something, and check the answer against one from nothing."""
        given = {**self.letters(num_tokens), **options}
        answer = list(self.conversation.say(text, **given))
        tokens = [response.token for response in answer]
        is_stopped = answer[-1].finish_reason == "stop"
        self.note(tokens if is_stopped else tokens[:-1])
        assert tokens == self.cold(num_tokens, **options)
        said = "".join(response.text for response in answer)
        assert self.conversation.messages[-1]["content"] == said
        return answer

    def note(self, answer: Sequence[int]) -> None:
        """Note that the cache has read the last prompt and so much of an answer."""
        self.read.append([*self.prompt(), *answer])

    def cold(self, num_tokens: int | None = 24, **options: Any) -> list[int]:
        """Answer the last message from nothing."""
        given = {**self.letters(num_tokens), **options, "save": False, "reuse": False}
        messages = self.conversation.messages[:-1]
        return [r.token for r in self.generator.stream_generate(messages, **given)]

    def shared(self) -> int:
        """Return what the last prompt has in common with all that was read before.

        One token of it is left to read.
        """
        prompt = self.prompt()
        before = [shared_tokens(prompt, read) for read in self.read[:-1]]
        return min(max(before, default=0), len(prompt) - 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The models' folders by architecture."""
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny.save_model(folder / name, CONFIGS[name]) for name in CONFIGS}


@pytest.fixture(params=CONFIGS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def load(folders: Mapping[str, Path], tmp_path: Path) -> Load:
    """Return a function that loads a model, with the test's store or another."""
    return lambda name, store="store": CachedGenerator.load(
        folders[name], store=tmp_path / store
    )


@pytest.fixture
def talk(load: Load, name: str) -> Talk:
    generator = load(name)
    return Talk(generator, Conversation(generator, system=SYSTEM))


def nbytes_of_rows(store: PrefixStore) -> int:
    """Return the size of all blobs that hold rows."""
    blobs = BlobFolder(store.path)
    sizes = dict(blobs.stored())
    found = {key: blobs.read_header(key) for key in sizes}
    return sum(sizes[k] for k, h in found.items() if not h.info.is_checkpoint)


# What is reused


def test_every_turn_reuses_all_that_was_read_before(talk: Talk, name: str) -> None:
    for number, num_tokens in enumerate(TURNS):
        answer = talk.say(f"Turn {number}?", num_tokens)

        # The recurrent model, too, resumes where an answer has ended.
        assert answer[-1].cached_tokens == talk.shared()
        if number:
            assert answer[-1].cached_tokens == len(talk.read[-2])


def test_turn_after_an_answer_with_other_tokens_reuses_its_prompt(
    talk: Talk, name: str
) -> None:
    # The tokenizer merges these two, which the model has said one by one.
    t, h = (talk.generator.tokenizer.encode(letter)[0] for letter in "th")
    for number in range(4):
        letters = Letters(talk.generator.tokenizer, {5: t, 6: h})

        answer = list(
            talk.conversation.say(
                f"Turn {number}?", max_tokens=40, logits_processors=[letters]
            )
        )

        tokens = [response.token for response in answer]
        letters = Letters(talk.generator.tokenizer, {5: t, 6: h})
        assert tokens == talk.cold(40, logits_processors=[letters])
        talk.note(tokens[:-1])
        if number:
            before = len(talk.read[-2]) - 39
            rest = 0 if name == "qwen3_next" else 5
            assert answer[-1].cached_tokens == before + rest
            assert talk.shared() == before + 5


def test_turn_after_dropped_thinking_reuses_up_to_the_users_message(
    talk: Talk, name: str
) -> None:
    template = THINKING_TEMPLATE.replace("<|assistant|>{%", "<|assistant|>think:{%")
    talk.generator.tokenizer.chat_template = template
    talk.generator.tokenizer._tokenizer.chat_template = template
    bar = talk.generator.tokenizer.encode("|")[0]
    for number in range(4):
        before = talk.conversation.messages[:-1] or talk.conversation.messages
        users = talk.generator.tokenizer.apply_chat_template(
            before, add_generation_prompt=False
        )
        letters = [Letters(talk.generator.tokenizer, {20: bar}) for _ in range(2)]

        answer = list(
            talk.conversation.say(
                f"Turn {number}?", max_tokens=40, logits_processors=letters[:1]
            )
        )

        tokens = [response.token for response in answer]
        assert tokens == talk.cold(40, logits_processors=letters[1:])
        talk.note(tokens[:-1])
        assert "|" in talk.conversation.messages[-1]["content"]
        if number:
            assert len(users) <= answer[-1].cached_tokens <= talk.shared()
        if name != "qwen3_next":
            assert answer[-1].cached_tokens == talk.shared()


def test_restart_before_every_turn_changes_nothing(load: Load, name: str) -> None:
    going_on = load(name, "other")
    steady = Talk(going_on, Conversation(going_on, system=SYSTEM))

    for number, num_tokens in enumerate(TURNS[:4]):
        expected = steady.say(f"Turn {number}?", num_tokens)
        with (
            load(name) as generator,
            Conversation(generator, name="n", system=SYSTEM) as conversation,
        ):
            assert conversation.num_turns == number
            answer = Talk(generator, conversation).say(f"Turn {number}?", num_tokens)
            assert conversation.messages == steady.conversation.messages
            assert len(generator.store.prefixes()) == 1
        assert [r.token for r in answer] == [r.token for r in expected]
        assert answer[-1].cached_tokens == expected[-1].cached_tokens


@pytest.mark.parametrize(
    "options",
    [
        {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0},
        {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 100},
        {"max_kv_size": 64},
        {"exact": True},
        {"exact": True, "prefill_step_size": 16},
        {"prefill_step_size": 16},
        {"temp": 1.0, "seed": 7},
    ],
    ids=str,
)
def test_warm_turns_equal_cold_ones_with(load: Load, options: dict[str, Any]) -> None:
    generator = load("llama")
    talk = Talk(generator, Conversation(generator, system=SYSTEM), options)

    answers = [talk.say(f"Turn {number}?", 50) for number in range(4)]

    assert all(a[-1].cached_tokens <= len(talk.read[-1]) for a in answers)
    if "exact" not in options and "max_kv_size" not in options:
        assert answers[-1][-1].cached_tokens > 0


@pytest.mark.parametrize(
    "option", [{"exact": True}, {"prefill_step_size": 16}], ids=str
)
def test_warm_turns_of_every_family_equal_cold_ones_with(
    talk: Talk, option: dict[str, Any]
) -> None:
    talk.options = option

    for number in range(3):
        talk.say(f"Turn {number}?", 50)


# Answers that do not end


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 40])
def test_closed_answer_keeps_what_was_yielded(
    load: Load, name: str, num_tokens: int
) -> None:
    generator = load(name)
    talk = Talk(generator, Conversation(generator, name="n", system=SYSTEM))
    talk.say("One?")
    responses = talk.conversation.say("Two?", **talk.letters(60))

    taken = list(itertools.islice(responses, num_tokens))
    responses.close()

    assert talk.conversation.is_answered
    said = "".join(response.text for response in taken)
    assert len(said) == num_tokens
    assert talk.conversation.messages[-1]["content"] == said
    # The first token is handed out before the model begins to read it.
    talk.note([r.token for r in taken] if num_tokens > 1 else [])
    answer = talk.say("Three?")
    assert answer[-1].cached_tokens == talk.shared() == len(talk.read[-2])


class Interrupted:
    """Makes a layer raise KeyboardInterrupt, once, after it was called so often."""

    def __init__(self, layer: Any, *, after: bool) -> None:
        """Take whether it raises after it has updated its cache, or before."""
        self.rest: int | None = None
        cls = type(layer)

        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            is_due = self.rest == 0
            self.rest = None if is_due or self.rest is None else self.rest - 1
            if is_due and not after:
                raise KeyboardInterrupt
            result = cls.__call__(module, *args, **kwargs)
            if is_due:
                raise KeyboardInterrupt
            return result

        layer.__class__ = type(cls.__name__, (cls,), {"__call__": call})


@pytest.mark.parametrize("num_calls", [0, 1, 45])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_interrupted_layer_saves_no_wrong_state(
    load: Load, name: str, place: int, after: bool, num_calls: int
) -> None:
    generator = load(name)
    talk = Talk(generator, Conversation(generator, system=SYSTEM))
    layer = Interrupted(generator.model.layers[place], after=after)
    talk.say("One?")
    responses = talk.conversation.say("Two?", **talk.letters(80))
    taken = [next(responses)]

    layer.rest = num_calls
    with pytest.raises(KeyboardInterrupt):
        for response in responses:
            taken.append(response)

    assert layer.rest is None
    said = "".join(response.text for response in taken)
    assert talk.conversation.messages[-1]["content"] == said
    talk.note([response.token for response in taken])
    for text in ("Three?", "Four?"):
        answer = talk.say(text)
        assert answer[-1].cached_tokens <= talk.shared()


def test_prompt_that_is_interrupted_is_answered_by_nothing(talk: Talk) -> None:
    layer = Interrupted(talk.generator.model.layers[1], after=True)
    layer.rest = 1

    with pytest.raises(KeyboardInterrupt):
        list(talk.conversation.say("One?" * 20, **talk.letters(10)))

    assert talk.conversation.messages[-1] == {"role": "assistant", "content": ""}
    assert len(talk.say("Two?")) == 24


# What is stored


def test_conversation_lists_one_prefix(talk: Talk) -> None:
    for number, num_tokens in enumerate(TURNS):
        talk.say(f"Turn {number}?", num_tokens)

        [prefix] = talk.generator.store.prefixes()
        assert prefix.num_tokens == len(talk.read[-1])
    assert talk.generator.store.report(prefix.key).token_ids == tuple(talk.read[-1])


@pytest.mark.xfail(strict=True, reason="the key of a closed answer is not noted")
def test_conversation_with_a_closed_answer_lists_one_prefix(talk: Talk) -> None:
    talk.say("One?")
    responses = talk.conversation.say("Two?", **talk.letters(20))
    list(itertools.islice(responses, 5))
    responses.close()
    talk.say("Three?")

    assert len(talk.generator.store.prefixes()) == 1


@pytest.mark.xfail(strict=True, reason="what it matched is taken for its own")
def test_conversation_that_saves_nothing_leaves_the_list_alone(load: Load) -> None:
    generator = load("llama")
    for messages in (["One?"], ["One?", "THE ANSWER", "Two?"]):
        roles = itertools.cycle(["user", "assistant"])
        generator.build([{"role": next(roles), "content": m} for m in messages])
    before = sorted(prefix.key for prefix in generator.store.prefixes())
    conversation = Conversation(generator)
    say = [generator.tokenizer.encode(letter)[0] for letter in "THE ANSWER"]
    letters = Letters(generator.tokenizer, dict(enumerate(say)))

    options = {"save": False, "max_tokens": len(say)}
    list(conversation.say("One?", logits_processors=[letters], **options))
    list(conversation.say("Two?", **options))

    assert sorted(prefix.key for prefix in generator.store.prefixes()) == before


def test_rows_of_each_token_are_stored_once(load: Load, name: str) -> None:
    generator = load(name)
    talk = Talk(generator, Conversation(generator, system=SYSTEM))
    for number in range(12):
        talk.say(f"What do you see in the hour {number} of the watch?", 40)

    other = load(name, "other")
    messages = talk.conversation.messages[:-1]
    options = {**talk.letters(40), "save": True, "save_answer": True}
    list(other.stream_generate(messages, **options))

    rows = [h.info for h in headers(generator.store) if not h.info.is_checkpoint]
    assert sum(info.end - info.start for info in rows) == len(talk.read[-1])
    assert nbytes_of_rows(generator.store) <= 1.15 * nbytes_of_rows(other.store)


def test_conversation_that_is_not_saved_stores_nothing(talk: Talk) -> None:
    for number in range(3):
        answer = talk.say(f"Turn {number}?", save=False)
        assert answer[-1].cached_tokens == 0

    assert list(BlobFolder(talk.generator.store.path).stored()) == []
    assert talk.generator.store.prefixes() == []


# Errors


def test_refused_message_leaves_the_conversation_as_it_was(load: Load) -> None:
    generator = load("llama")
    refusal = "{% if 'never' in messages[-1].content %}{{ raise_exception('no') }}"
    template = refusal + "{% endif %}" + tiny.CHAT_TEMPLATE
    generator.tokenizer._tokenizer.chat_template = template
    conversation = Conversation(generator, name="n")
    talk = Talk(generator, conversation)
    talk.say("One?")
    path = generator.store.path / "chats" / "n.jsonl"
    messages, content = conversation.messages, path.read_bytes()

    with pytest.raises(UsageError, match="no"):
        list(conversation.say("Say never"))

    assert (conversation.messages, path.read_bytes()) == (messages, content)
    assert len(talk.say("Two?")) == 24


def test_answer_that_cannot_be_given_is_taken_back_with_its_question(
    talk: Talk,
) -> None:
    talk.say("One?")
    before = talk.conversation.messages

    with pytest.raises(UsageError):
        list(talk.conversation.say("Two?", max_tokens=0))

    assert talk.conversation.messages == before
    assert talk.conversation.is_answered
    assert len(talk.say("Three?")) == 24


def test_conversation_without_a_store_is_answered_with_one_warning(
    folders: Mapping[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(PromptCacheWarning) as warned:
        generator = CachedGenerator.load(folders["llama"], store=tmp_path / "file")
        talk = Talk(generator, Conversation(generator))
        for number in range(3):
            talk.say(f"Turn {number}?")

    assert len(warned) == 1
    with pytest.raises(StoreError, match="no store"):
        Conversation(generator, name="n")


# Answers that are saved without a conversation


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 64, None])
def test_prompt_that_forks_in_a_saved_answer_equals_a_cold_one(
    load: Load, name: str, num_tokens: int | None
) -> None:
    talk = Talk(generator := load(name), Conversation(generator))
    prompt = generator.tokenizer.encode("Once upon a time there was a lighthouse.")
    options = {**talk.letters(num_tokens), "save": True, "save_answer": True}
    answer = [r.token for r in generator.stream_generate(prompt, **options)]
    read = [*prompt, *(answer if num_tokens is None else answer[:-1])]

    assert len(generator.store.prefixes()) == 1
    for fork in range(len(prompt), len(read) + 1):
        forked = [*read[:fork], *generator.tokenizer.encode("?!")]
        warm = list(generator.stream_generate(forked, max_tokens=6, save=False))
        cold = generator.stream_generate(forked, max_tokens=6, save=False, reuse=False)
        assert [r.token for r in warm] == [r.token for r in cold], fork
        is_end = fork in (len(prompt), len(read))
        if name != "qwen3_next" or is_end:
            assert warm[-1].cached_tokens == fork
        else:
            assert warm[-1].cached_tokens == len(prompt)
