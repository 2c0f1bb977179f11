"""A conversation reuses what it can, and answers as one from nothing would."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from promptcache import (
    CachedGenerator,
    Conversation,
    PrefixStore,
    PromptCacheWarning,
    StoreError,
    UsageError,
)
from promptcache.store.blobs.folder import BlobFolder
from tests.helpers import tiny
from tests.helpers.marks import all_but
from tests.helpers.thinking import THINKING_TEMPLATE, headers, shared_tokens

CONFIGS = {
    "llama": tiny.LLAMA,
    "gemma3_text": tiny.GEMMA3,
    "qwen3_next": tiny.QWEN3_NEXT,
}
SYSTEM = "You keep the lighthouse. Answer in capitals. "
# Longer than a window of 32 tokens, several windows, shorter, a single token; None
# ends with a stop token.
TURNS = (80, 5, None, 1, 150, 33)
Load = Callable[..., CachedGenerator]


class Letters:
    """Lets a model say capitals and spaces only, the likeliest of them.

    Random models emit bytes that are no text, so that an answer's text would not have
    the answer's tokens again. Capitals take part in no merge of `tiny`'s tokenizer.
    """

    def __init__(self, tokenizer: Any, forced: Mapping[int, str] | None = None) -> None:
        """Take tokens that are said at some places of the answer, likely or not."""
        self._mask = self._only(tokenizer.encode("ABCDEFGHIJKLMNOPQRSTUVWXYZ "))
        self._forced = {
            place: self._only(tokenizer.encode(token))
            for place, token in (forced or {}).items()
        }
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


class Talk:
    """A conversation, of which every answer is compared with one from nothing.

    Attributes:
        read: For each answer the token ids that the cache had read by its end.
    """

    def __init__(
        self, generator: CachedGenerator, *, name: str | None = None, **options: Any
    ) -> None:
        """Begin a conversation; options are for every answer."""
        self.generator = generator
        self.conversation = Conversation(generator, name=name, system=SYSTEM)
        self.read: list[list[int]] = []
        self._options = options

    def letters(
        self, num_tokens: int | None, forced: Mapping[int, str] | None = None
    ) -> dict[str, Any]:
        """Return options for an answer of so many tokens; None ends by itself."""
        forced = {12: "<|end|>"} if num_tokens is None else forced
        return {
            "max_tokens": num_tokens or 40,
            "logits_processors": [Letters(self.generator.tokenizer, forced)],
            **self._options,
        }

    def prompt(self) -> list[int]:
        """Return the prompt of the last answer."""
        return self.generator.render(self.conversation.messages[:-1]).token_ids

    def say(
        self,
        text: str,
        num_tokens: int | None = 24,
        *,
        forced: Mapping[int, str] | None = None,
        **options: Any,
    ) -> Any:
        """Say something, and return the last response."""
        given = {**self.letters(num_tokens, forced), **options}
        answer = list(self.conversation.say(text, **given))
        self.note(answer if answer[-1].finish_reason == "stop" else answer[:-1])
        given = {**self.letters(num_tokens, forced), **options}
        messages = self.conversation.messages[:-1]
        cold = self.generator.stream_generate(
            messages, **{**given, "save": False, "reuse": False}
        )
        assert [r.token for r in answer] == [r.token for r in cold]
        assert self.conversation.messages[-1]["content"] == text_of(answer)
        return answer[-1]

    def interrupt(self, text: str, num_tokens: int) -> str:
        """Close an answer after so many tokens, and return their text."""
        responses = self.conversation.say(text, **self.letters(60))
        taken = list(itertools.islice(responses, num_tokens))
        responses.close()
        # The first token is handed out before the model begins to read it.
        self.note(taken if num_tokens > 1 else [])
        return text_of(taken)

    def note(self, answer: Sequence[Any]) -> None:
        """Note that the cache has read the last prompt and so much of an answer."""
        self.read.append([*self.prompt(), *(response.token for response in answer)])

    def shared(self) -> int:
        """Return what the last prompt has in common with all that was read before.

        One token of it is left to read.
        """
        prompt = self.prompt()
        before = [shared_tokens(prompt, read) for read in self.read[:-1]]
        return min(max(before, default=0), len(prompt) - 1)


def text_of(answer: Sequence[Any]) -> str:
    return "".join(response.text for response in answer)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The models' folders by architecture."""
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny.save_model(folder / name, CONFIGS[name]) for name in CONFIGS}


@pytest.fixture(params=all_but(["llama", "qwen3_next"], CONFIGS))
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
    return Talk(load(name))


def nbytes_of_rows(store: PrefixStore) -> int:
    """Return the size of all blobs that hold rows."""
    blobs = BlobFolder(store.path)
    sizes = dict(blobs.stored())
    found = {key: blobs.read_header(key) for key in sizes}
    return sum(sizes[k] for k, h in found.items() if not h.info.is_checkpoint)


# What is reused


def test_every_turn_reuses_all_that_was_read_before(talk: Talk, name: str) -> None:
    is_lost = False
    for number, num_tokens in enumerate(TURNS):
        last = talk.say(f"Turn {number}?", num_tokens)

        # The recurrent model, too, resumes where an answer has ended. Without one it
        # resumes before the prompt's last token, which is read alone.
        if number:
            expected = len(talk.read[-2]) - is_lost
            assert talk.shared() - is_lost == last.cached_tokens == expected
        is_lost = name == "qwen3_next" and num_tokens == 1
        # Of its own, the conversation lists only the last.
        [prefix] = talk.generator.store.prefixes()
        report = talk.generator.store.report(prefix.key)
        num_kept = len(talk.read[-1]) - is_lost
        assert list(report.token_ids) == talk.read[-1][:num_kept]


def test_turn_after_an_answer_with_other_tokens_reuses_its_prompt(
    talk: Talk, name: str
) -> None:
    for number in range(4):
        # The tokenizer merges these two, which the model says one by one.
        last = talk.say(f"Turn {number}?", 40, forced={5: "t", 6: "h"})

        if number:
            prompt = len(talk.read[-2]) - 39
            assert talk.shared() == prompt + 5
            is_recurrent = name == "qwen3_next"
            assert last.cached_tokens == prompt + (-1 if is_recurrent else 5)


def test_turn_after_dropped_thinking_reuses_up_to_the_users_message(
    talk: Talk, name: str
) -> None:
    template = THINKING_TEMPLATE.replace("<|assistant|>{%", "<|assistant|>think:{%")
    talk.generator.tokenizer._tokenizer.chat_template = template
    for number in range(4):
        before = talk.conversation.messages[:-1]

        last = talk.say(f"Turn {number}?", 40, forced={20: "|"})

        assert "|" in talk.conversation.messages[-1]["content"]
        if number:
            users = talk.generator.tokenizer.apply_chat_template(
                before, add_generation_prompt=False
            )
            assert len(users) <= last.cached_tokens <= talk.shared()
        if name != "qwen3_next":
            assert last.cached_tokens == talk.shared()


def test_restart_before_every_turn_changes_nothing(load: Load, name: str) -> None:
    steady = Talk(load(name, "other"))

    for number, num_tokens in enumerate(TURNS[:4]):
        expected = steady.say(f"Turn {number}?", num_tokens)
        with load(name) as generator:
            talk = Talk(generator, name="n")
            with talk.conversation as conversation:
                assert conversation.num_turns == number
                last = talk.say(f"Turn {number}?", num_tokens)
                assert conversation.messages == steady.conversation.messages
                assert len(generator.store.prefixes()) == 1
        assert last.cached_tokens == expected.cached_tokens


TINY_STEPS = {"prefill_step_size": 16}
QUANTIZED = {"kv_bits": 8, "kv_group_size": 32}
OPTIONS = [
    *(("llama", {**QUANTIZED, "quantized_kv_start": start}) for start in (0, 60, 100)),
    ("llama", {"temp": 1.0, "seed": 7}),
    ("llama", {"exact": True}),
    *((name, {"exact": True, **TINY_STEPS}) for name in CONFIGS),
    *((name, TINY_STEPS) for name in ("gemma3_text", "qwen3_next")),
    *((name, {"max_kv_size": 64}) for name in CONFIGS),
]
FEW = [OPTIONS[1], OPTIONS[3], ("gemma3_text", {"exact": True, **TINY_STEPS})]
FEW += [("qwen3_next", TINY_STEPS), ("llama", {"max_kv_size": 64})]


@pytest.mark.parametrize(("name", "options"), all_but(FEW, OPTIONS), ids=str)
def test_warm_turns_equal_cold_ones_with(
    load: Load, name: str, options: dict[str, Any]
) -> None:
    talk = Talk(load(name), **options)

    reused = [talk.say(f"Turn {n}?", 40).cached_tokens for n in range(3)]

    assert reused[-1] <= talk.shared()
    # The others resume only where plain mlx-lm's pieces end.
    assert reused[-1] > 0 or not {"exact", "max_kv_size"}.isdisjoint(options)


# Answers that do not end


@pytest.mark.parametrize("num_tokens", all_but([1, 5], [1, 2, 5, 40]))
def test_closed_answer_keeps_what_was_yielded(
    load: Load, name: str, num_tokens: int
) -> None:
    talk = Talk(load(name), name="n")
    talk.say("One?")

    said = talk.interrupt("Two?", num_tokens)

    assert talk.conversation.is_answered
    assert len(said) == num_tokens
    assert talk.conversation.messages[-1]["content"] == said
    last = talk.say("Three?")
    # Nothing of one token was read, and the state is taken before the prompt's last.
    is_lost = name == "qwen3_next" and num_tokens == 1
    assert talk.shared() == len(talk.read[-2])
    assert last.cached_tokens == talk.shared() - is_lost


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


@pytest.mark.parametrize("num_calls", all_but([45], [0, 45]))
@pytest.mark.parametrize(("place", "after"), [(0, False), (1, True), (-1, True)])
def test_interrupted_layer_saves_no_wrong_state(
    talk: Talk, place: int, after: bool, num_calls: int
) -> None:
    layer = Interrupted(talk.generator.model.layers[place], after=after)
    talk.say("One?")
    responses = talk.conversation.say("Two?", **talk.letters(80))
    taken = [next(responses)]

    layer.rest = num_calls
    with pytest.raises(KeyboardInterrupt):
        # Not `extend`, which would take nothing.
        for response in responses:
            taken.append(response)

    assert layer.rest is None
    assert talk.conversation.messages[-1]["content"] == text_of(taken)
    talk.note(taken)
    for text in ("Three?", "Four?"):
        assert talk.say(text).cached_tokens <= talk.shared()


def test_prompt_that_is_interrupted_is_answered_by_nothing(talk: Talk) -> None:
    layer = Interrupted(talk.generator.model.layers[1], after=True)
    layer.rest = 1

    with pytest.raises(KeyboardInterrupt):
        list(talk.conversation.say("One?" * 20, **talk.letters(10)))

    assert talk.conversation.messages[-1] == {"role": "assistant", "content": ""}
    talk.say("Two?")


# What is stored


def test_conversation_with_a_closed_answer_lists_one_prefix(load: Load) -> None:
    talk = Talk(load("llama"))
    talk.say("One?")
    talk.interrupt("Two?", 5)
    talk.say("Three?")

    assert len(talk.generator.store.prefixes()) == 1


@pytest.mark.parametrize("save", [True, False])
def test_conversation_unlists_nothing_of_others(load: Load, save: bool) -> None:
    talk = Talk(generator := load("llama"), save_answer=save)
    for text in ("One?", "Two?"):
        talk.say(text)
        generator.build(talk.conversation.messages[:-1])
    generator.build(talk.conversation.messages)
    before = {prefix.key for prefix in generator.store.prefixes()}

    other = Talk(generator, save=save)
    for text in ("One?", "Two?", "Three?"):
        other.say(text)

    assert before <= {prefix.key for prefix in generator.store.prefixes()}


def test_rows_of_each_token_are_stored_once(load: Load, name: str) -> None:
    talk, other = Talk(load(name)), load(name, "other")
    for number in range(6):
        said = f"What do you see in the hour {number} of the watch?"
        answer = list(talk.conversation.say(said, **talk.letters(40)))
    talk.note(answer[:-1])

    options = {**talk.letters(40), "save": True, "save_answer": True}
    list(other.stream_generate(talk.conversation.messages[:-1], **options))

    infos = [header.info for header in headers(talk.generator.store)]
    # A checkpoint begins where it ends.
    assert sum(info.end - info.start for info in infos) == len(talk.read[-1])
    assert nbytes_of_rows(talk.generator.store) <= 1.15 * nbytes_of_rows(other.store)


def test_conversation_that_is_not_saved_stores_nothing(talk: Talk) -> None:
    for number in range(3):
        assert talk.say(f"Turn {number}?", save=False).cached_tokens == 0

    assert list(BlobFolder(talk.generator.store.path).stored()) == []
    assert talk.generator.store.prefixes() == []


# Errors


def failing_sampler(logprobs: mx.array) -> mx.array:
    raise ValueError("cannot sample")


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": failing_sampler},
        {"max_tokens": 0},
        {"kv_bits": 7},
    ],
)
def test_question_that_cannot_be_answered_is_taken_back(
    load: Load, options: dict[str, Any]
) -> None:
    talk = Talk(load("llama"), name="n")
    talk.say("One?")
    before = talk.conversation.messages

    with pytest.raises(UsageError):
        list(talk.conversation.say("Two?", **options))

    assert talk.conversation.messages == before
    assert talk.conversation.is_answered
    talk.say("Three?")


def test_refused_message_leaves_the_conversation_as_it_was(load: Load) -> None:
    talk = Talk(load("llama"), name="n")
    refusal = "{% if 'never' in messages[-1].content %}{{ raise_exception('no') }}"
    template = refusal + "{% endif %}" + tiny.CHAT_TEMPLATE
    talk.generator.tokenizer._tokenizer.chat_template = template
    talk.say("One?")
    path = talk.generator.store.path / "chats" / "n.jsonl"
    messages, content = talk.conversation.messages, path.read_bytes()

    with pytest.raises(UsageError, match="no"):
        list(talk.conversation.say("Say never"))

    assert (talk.conversation.messages, path.read_bytes()) == (messages, content)
    talk.say("Two?")


def test_conversation_without_a_store_is_answered_with_one_warning(
    folders: Mapping[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(PromptCacheWarning) as warned:
        generator = CachedGenerator.load(folders["llama"], store=tmp_path / "file")
        talk = Talk(generator)
        for number in range(3):
            talk.say(f"Turn {number}?")

    assert len(warned) == 1
    with pytest.raises(StoreError, match="no store"):
        Conversation(generator, name="n")


def test_conversation_with_a_read_only_store_is_answered_with_one_warning(
    load: Load,
    mount_read_only: Callable[[Path], Path],
) -> None:
    with load("llama") as generator:
        Talk(generator).say("One?")
        folder = mount_read_only(generator.store.path)

    with load("llama", folder) as generator:
        talk = Talk(generator)
        with pytest.warns(PromptCacheWarning, match="read-only") as warned:
            assert talk.say("One?").cached_tokens > 0
        assert len(warned) == 1
        with pytest.raises(StoreError, match="cannot be kept"):
            Conversation(generator, name="n")


# Answers that are saved without a conversation


@pytest.mark.parametrize("num_tokens", all_but([2, 64], [1, 2, 3, 64, None]))
def test_prompt_that_forks_in_a_saved_answer_equals_a_cold_one(
    load: Load, name: str, num_tokens: int | None
) -> None:
    generator = load(name)
    encode = generator.tokenizer.encode
    prompt = encode("Once upon a time there was a lighthouse.")
    options = {**Talk(generator).letters(num_tokens), "save": True, "save_answer": True}
    answer = [r.token for r in generator.stream_generate(prompt, **options)]
    read = [*prompt, *(answer if num_tokens is None else answer[:-1])]

    # The state of a prompt is taken before its last token, which is read alone.
    end = len(prompt) - (name == "qwen3_next")
    num_kept = len(read) if len(read) > len(prompt) else end
    assert [p.num_tokens for p in generator.store.prefixes()] == [num_kept]
    options = {"max_tokens": 3, "save": False}
    # Every other one: a window of 32 goes around twice on the way.
    for fork in {*range(len(prompt), len(read), 2), len(read)}:
        forked = [*read[:fork], *encode("?!")]
        warm = list(generator.stream_generate(forked, **options))
        cold = generator.stream_generate(forked, reuse=False, **options)
        assert [r.token for r in warm] == [r.token for r in cold], fork
        is_resumable = name != "qwen3_next" or fork == num_kept
        assert warm[-1].cached_tokens == (fork if is_resumable else end)
