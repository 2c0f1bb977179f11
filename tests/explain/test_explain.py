"""Explanations name the planted cause of a miss, and the token where it begins."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import pytest

from promptcache import CachedGenerator, PrefixStore
from promptcache.explain.types import Explanation
from promptcache.models.settings import Settings
from promptcache.prompts.parts import compose
from promptcache.segments.fingerprint import Fingerprint
from promptcache.store.reports import PrunePolicy
from tests.helpers import segments, tiny
from tests.helpers.adapters import LORA, save_adapter
from tests.helpers.adventures import (
    LOOK,
    QUESTION,
    ROLL,
    SING,
    TEMPLATE,
    WALK,
    conversation,
    read_only,
    templated,
    tool,
)
from tests.helpers.commands import tree_hash
from tests.helpers.marks import all_but

SYSTEM = """You are the narrator of a story.
Today is 2026-11-21.
It is 14:05:10 now.
Request: 123e4567-e89b-12d3-a456-426614174000
Trace: 4d2a233ef5bce2c0
hostname: alpha
Working directory: /srv/games/one
Session: 41
Answer in two sentences, kindly, and never break character."""
STARE = tool("look", "Look about")


@dataclass(frozen=True)
class Ask:
    """A prompt with all that its generation depends on."""

    generator: CachedGenerator
    prompt: Any
    tools: tuple[dict[str, Any], ...] = (ROLL, LOOK, WALK)
    config: dict[str, Any] | None = None
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def token_ids(self) -> list[int]:
        return self.generator.render(self.prompt, self.tools, self.config).token_ids

    @property
    def store(self) -> PrefixStore:
        assert self.generator.store is not None
        return self.generator.store

    @property
    def fingerprint(self) -> Fingerprint:
        return self.generator.fingerprint(Settings.of(**dict(self.settings)))

    @property
    def options(self) -> dict[str, Any]:
        config = {"tools": self.tools, "chat_template_config": self.config}
        return {**config, **dict(self.settings)}

    def save(self, **options: Any) -> None:
        options = {"save": True, "max_tokens": 1, **self.options, **options}
        list(self.generator.stream_generate(self.prompt, **options))

    def explain(self) -> Explanation:
        return self.generator.explain(self.prompt, **self.options)

    def asking(self, question: str) -> "Ask":
        return replace(self, prompt=compose(system=SYSTEM, user=question))

    def loaded(self, folder: Path, **options: Any) -> "Ask":
        generator = CachedGenerator.load(folder, store=self.store, **options)
        return replace(self, generator=generator)


@pytest.fixture
def ask(folder: Path, store: PrefixStore) -> Ask:
    """What is stored, or to be stored."""
    generator = CachedGenerator.load(folder, store=store)
    return Ask(generator, compose(system=SYSTEM, user=QUESTION))


def distractors(ask: Ask) -> list[Ask]:
    """Return unrelated prompts: other systems, other tools, the same 20 tokens."""
    other = compose(system="You check grammar.\nToday is 2025-01-01.", user=QUESTION)
    plain = compose(system="You sort lists. Session: 40", user="a c b")
    paint = compose(system="You paint.", user=QUESTION)
    return [
        replace(ask, prompt=other, tools=()),
        replace(ask, prompt=plain, tools=(tool("sort", "Sort"), WALK)),
        replace(ask, prompt=[*ask.token_ids[:20], *range(100, 160)], tools=()),
        replace(ask, prompt=paint, tools=(tool("paint", "Paint"),)),
        replace(ask, prompt="Once upon a time on 2026-11-22. " * 5, tools=()),
    ]


def save_among_distractors(ask: Ask) -> list[list[int]]:
    """Save a prompt after and before unrelated ones; return all token ids."""
    *before, one, two = distractors(ask)
    asks = [*before, ask, one, two]
    for each in asks:
        each.save()
    return [each.token_ids for each in asks]


Change = Callable[[Ask, Path], Ask]


class Cause(NamedTuple):
    """What is changed, and what has to be told of it."""

    change: Change
    kind: str
    words: tuple[str, ...]
    first: Change


def cause(change: Change, kind: str, *words: str, first: Change | None = None) -> Cause:
    return Cause(change, kind, words, first or (lambda ask, _: ask))


def text(before: str, after: str) -> Change:
    """Return a change of the system prompt's text."""
    assert before in SYSTEM
    changed = compose(system=SYSTEM.replace(before, after), user=QUESTION)
    return lambda ask, _: replace(ask, prompt=changed)


def with_tools(*tools: dict[str, Any]) -> Change:
    return lambda ask, _: replace(ask, tools=tools)


def with_config(**config: Any) -> Change:
    return lambda ask, _: replace(ask, config=config)


def with_settings(**settings: Any) -> Change:
    return lambda ask, _: replace(ask, settings=tuple(settings.items()))


def with_prompt(prompt: Any) -> Change:
    return lambda ask, _: replace(ask, prompt=prompt, tools=())


def with_template(template: str) -> Change:
    def change(ask: Ask, folder: Path) -> Ask:
        return ask.loaded(templated(folder, template))

    return change


def with_model(*, seed: int = 0, **values: Any) -> Change:
    def change(ask: Ask, folder: Path) -> Ask:
        config = {**tiny.LLAMA, **values}
        other = tiny.save_model(folder.with_name("other"), config, seed=seed)
        return ask.loaded(templated(other))

    return change


def with_adapter(ask: Ask, folder: Path) -> Ask:
    adapter = save_adapter(folder, folder.with_name("adapter"), LORA)
    return ask.loaded(folder, adapter_path=adapter)


def in_namespace(ask: Ask, folder: Path) -> Ask:
    return ask.loaded(folder, namespace="tenant")


RAW = "Chapter one. " * 20 + "Written on 2026-11-21. " + "She went home. " * 20
HEADED = "<|bos|>" + TEMPLATE
TAGGED = TEMPLATE.replace("<|{{ message.role }}|>", "<{{ message.role }}>")
# The user's text has been read by then, so that it is no miss.
AT_THE_END = "argument of the very end"
CAUSES = {
    "date": cause(text("11-21", "11-22"), "date", "2026-11-21", "2026-11-22"),
    "time": cause(text("14:05:10", "09:11:42"), "time", "14:05:10", "09:11:42"),
    "UUID": cause(text("123e4567", "923a4567"), "UUID", "923a4567-e89b"),
    "random id": cause(text("4d2a233e", "9b2a233e"), "random id", "9b2a233ef5bce2c0"),
    "hostname": cause(text("alpha", "beta-2"), "hostname", "alpha", "beta-2"),
    "directory": cause(text("games/one", "games/two"), "working directory", "two"),
    "counter": cause(text("Session: 41", "Session: 42"), "counter", "41", "42"),
    "CRLF": cause(text("\n", "\r\n"), "line endings", "line endings"),
    "whitespace": cause(text("two ", "two  "), "whitespace", "whitespace"),
    "tool added": cause(with_tools(ROLL, LOOK, WALK, SING), "tools", "sing added"),
    "tool removed": cause(with_tools(ROLL, LOOK), "tools", "walk removed"),
    "tool changed": cause(with_tools(ROLL, STARE, WALK), "tools", "look changed"),
    "tools reordered": cause(with_tools(ROLL, WALK, LOOK), "tools", "order", "walk"),
    "no tools": cause(with_tools(), "tools", "roll, look, walk removed"),
    "template": cause(with_template(HEADED), "template", "another chat template"),
    "template's tags": cause(with_template(TAGGED), "template", "another chat"),
    "argument": cause(
        with_config(effort="high"),
        "template argument",
        "effort was not given and is 'high'",
    ),
    "argument's value": cause(
        with_config(effort="high"),
        "template argument",
        "effort was 'low' and is 'high'",
        first=with_config(effort="low"),
    ),
    AT_THE_END: cause(
        with_config(budget=900),
        "template argument",
        "budget was 100 and is 900",
        first=with_config(budget=100),
    ),
    "thinking": cause(
        with_prompt(conversation((1, "It creaks."))),
        "thinking",
        "thinking was dropped",
        "in an earlier message",
        first=with_prompt(conversation()),
    ),
    "edited message": cause(
        with_prompt(conversation((0, "I open the window"))),
        "text",
        "door",
        "window",
        "in an earlier message",
        first=with_prompt(conversation()),
    ),
    "raw text": cause(
        with_prompt(RAW.replace("11-21", "11-22")),
        "date",
        "2026-11-22",
        first=with_prompt(RAW),
    ),
    "model": cause(with_model(num_hidden_layers=3), "model", "narrator, not for other"),
    "weights": cause(with_model(seed=5), "weights", "other weights"),
    "config": cause(with_model(rope_theta=5000.0), "config", "other config"),
    "adapter": cause(
        with_adapter,
        "layers",
        "other layers (adapter, quantization) and weights",
    ),
    "KV bits": cause(with_settings(kv_bits=8), "KV bits", "none became 8"),
    "KV group size": cause(
        with_settings(kv_bits=8, kv_group_size=64, quantized_kv_start=0),
        "KV group size",
        "32 became 64",
        first=with_settings(kv_bits=8, kv_group_size=32, quantized_kv_start=0),
    ),
    "KV bits of raw text": cause(
        with_settings(kv_bits=8), "KV bits", "none became 8", first=with_prompt(RAW)
    ),
    "weights of raw text": cause(
        with_model(seed=5), "weights", "other weights", first=with_prompt(RAW)
    ),
    # What is in another one is not told.
    "namespace": cause(in_namespace, "nothing cached", "nothing cached for narrator"),
    "max_kv_size": cause(
        with_settings(max_kv_size=4000), "max_kv_size", "none became 4000"
    ),
}
FEW = ["edited message", "raw text", "weights", "adapter", "KV bits", "namespace"]


@pytest.mark.parametrize("name", all_but(FEW, CAUSES))
def test_planted_cause_is_named_among_distractors(
    name: str, ask: Ask, folder: Path
) -> None:
    cause = CAUSES[name]
    first = cause.first(ask, folder)
    stored = save_among_distractors(first)
    changed = cause.change(first, folder)

    explanation = changed.explain()

    divergence = explanation.divergence
    assert divergence is not None, explanation.verdict
    assert divergence.kind == cause.kind, divergence.culprit
    for word in cause.words:
        assert word in divergence.culprit
    is_same = changed.fingerprint == first.fingerprint
    position = segments.shared_length(changed.token_ids, first.token_ids)
    assert divergence.position == (position if is_same else 0)
    assert explanation.cached_tokens == (
        segments.longest_shared(changed.token_ids, stored) if is_same else 0
    )
    assert explanation.prompt_tokens == len(changed.token_ids)
    assert explanation.is_miss == (name != AT_THE_END)
    assert divergence.culprit in explanation.verdict
    if divergence.position >= explanation.cached_tokens:
        assert f"from token {divergence.position} on" in explanation.verdict


# Templates that drop what was thought


def forced(token_ids: list[int]) -> Callable[[mx.array], mx.array]:
    """Return a sampler that makes the model say this."""
    rest = iter(token_ids)
    return lambda logprobs: mx.array([next(rest, 0)])


def test_thinking_that_a_template_drops_is_named_after_a_saved_answer(
    ask: Ask,
) -> None:
    thought = "<think>The door is old.</think>It creaks."
    first = ask.asking(QUESTION)
    said = ask.generator.tokenizer.encode(thought, add_special_tokens=False)
    first.save(save_answer=True, max_tokens=len(said), sampler=forced(said))
    for other in distractors(ask):
        other.save()
    answered = [*first.prompt, {"role": "assistant", "content": thought}]
    second = replace(ask, prompt=[*answered, {"role": "user", "content": "I go in"}])

    explanation = second.explain()

    divergence = explanation.divergence
    assert divergence is not None
    assert divergence.kind == "thinking"
    assert divergence.culprit.startswith("thinking was dropped from an earlier answer")
    assert divergence.position == len(first.token_ids)
    assert divergence.expected.startswith("<think>The door")
    assert divergence.found.startswith("It creaks.")
    assert explanation.is_miss


# Evicted


def test_nothing_cached_is_told_of_an_empty_store(ask: Ask) -> None:
    explanation = ask.explain()

    assert explanation.divergence is not None
    assert explanation.divergence.kind == "nothing cached"
    assert explanation.divergence.position == 0
    assert explanation.divergence.expected == ""
    assert "nothing cached for narrator yet" in explanation.verdict
    assert (explanation.cached_tokens, explanation.key) == (0, None)
    assert explanation.is_miss


def test_nothing_cached_begins_like_an_unknown_prompt(ask: Ask) -> None:
    for other in distractors(ask):
        other.save()
    unknown = replace(ask, prompt="Quite another thing", tools=())

    divergence = unknown.explain().divergence

    assert divergence is not None
    assert divergence.kind == "nothing cached"
    assert "nothing cached begins like this for narrator" in divergence.culprit


def remove(ask: Ask) -> None:
    key = ask.store.segments.key_of(ask.token_ids, ask.fingerprint)
    ask.store.remove(key)


def prune(ask: Ask) -> None:
    plan = ask.store.plan_prune(PrunePolicy(older_than=0), now=time.time() + 90)
    ask.store.execute(plan)


def outgrow(ask: Ask) -> None:
    """Save something else where there is room for one of both only."""
    ask.store.max_nbytes = ask.store.total_nbytes()
    for i in range(6):
        replace(ask, prompt=f"{i}. Something else. " * 40, tools=()).save()


@pytest.mark.parametrize(
    ("take_away", "reason"),
    [(remove, "removed"), (prune, "not used for"), (outgrow, "makes room")],
)
def test_evicted_prompt_is_told_with_the_reason(
    take_away: Callable[[Ask], None], reason: str, ask: Ask
) -> None:
    save_among_distractors(ask)

    take_away(ask)

    explanation = ask.explain()
    divergence = explanation.divergence
    assert divergence is not None
    assert divergence.kind == "evicted", divergence.culprit
    assert f"up to token {len(ask.token_ids)} was evicted" in divergence.culprit
    assert reason in divergence.culprit
    assert divergence.position == explanation.cached_tokens
    assert divergence.expected == ""
    assert explanation.is_miss


# Known defects


def test_change_is_that_from_the_nearest_prompt_with_this_system(ask: Ask) -> None:
    ask.save()
    replace(ask, tools=()).save()
    changed = replace(ask, tools=(ROLL, LOOK, tool("walk", "Walk away")))

    divergence = changed.explain().divergence

    assert divergence is not None
    assert divergence.culprit == "other tools: walk changed"
    assert divergence.position == changed.explain().cached_tokens


def test_eviction_is_told_to_another_question(ask: Ask) -> None:
    ask.save()
    remove(ask)

    divergence = ask.asking("What now?").explain().divergence

    assert divergence is not None
    assert divergence.kind == "evicted"


def test_template_that_changes_answers_is_named(ask: Ask, folder: Path) -> None:
    first = replace(ask, prompt=conversation())
    first.save()
    role = "'model' if message.role == 'assistant' else message.role"
    template = TEMPLATE.replace("{{ message.role }}", f"{{{{ {role} }}}}")

    divergence = first.loaded(templated(folder, template)).explain().divergence

    assert divergence is not None
    assert divergence.kind == "template"


# No misses


def test_full_hit_says_so(ask: Ask) -> None:
    save_among_distractors(ask)

    explanation = ask.explain()

    assert explanation.divergence is None
    assert explanation.is_full
    assert not explanation.is_miss
    assert explanation.verdict.startswith("a full hit: ")
    assert explanation.cached_tokens == len(ask.token_ids) - 1
    assert explanation.key == ask.store.segments.key_of(ask.token_ids, ask.fingerprint)


def test_new_question_after_a_built_system_prompt_is_no_miss(ask: Ask) -> None:
    built = ask.generator.build(system=SYSTEM, tools=ask.tools)
    for other in distractors(ask):
        other.save()

    explanation = ask.asking("What now?").explain()

    assert explanation.divergence is None
    assert not explanation.is_miss
    assert explanation.cached_tokens == built.num_tokens
    assert explanation.key == built.key
    assert explanation.verdict.endswith("the rest is new")


def test_new_question_after_an_old_one_is_no_miss(ask: Ask) -> None:
    save_among_distractors(ask)
    new = ask.asking("What now?")

    explanation = new.explain()

    position = segments.shared_length(new.token_ids, ask.token_ids)
    assert not explanation.is_miss
    assert explanation.divergence is not None
    assert explanation.divergence.position == explanation.cached_tokens == position
    assert explanation.divergence.culprit.endswith("in the last message")


def test_rest_of_a_longer_conversation_is_new(ask: Ask) -> None:
    first = replace(ask, prompt=conversation()[:2])
    first.save()
    for other in distractors(ask):
        other.save()
    longer = replace(ask, prompt=conversation())

    explanation = longer.explain()

    assert explanation.divergence is None
    assert not explanation.is_miss
    assert not explanation.is_full
    assert explanation.cached_tokens == len(first.token_ids)


@pytest.fixture
def recurrent(tmp_path: Path, ask: Ask) -> Ask:
    """The same prompt for a model that is resumed at checkpoints only."""
    return ask.loaded(templated(tiny.save_model(tmp_path / "hybrid", tiny.QWEN3_NEXT)))


def test_rows_without_a_checkpoint_are_told(recurrent: Ask) -> None:
    stored = replace(recurrent, prompt=list(range(3, 203)), tools=())
    save_among_distractors(stored)
    shorter = replace(stored, prompt=stored.token_ids[:150])

    explanation = shorter.explain()

    divergence = explanation.divergence
    assert divergence is not None
    assert (divergence.kind, divergence.position) == ("checkpoint", 150)
    assert "150 tokens are stored" in divergence.culprit
    assert "resume at token 0 only" in divergence.culprit
    assert explanation.cached_tokens == 0
    assert explanation.is_miss


def test_cause_is_told_before_the_lack_of_a_checkpoint(recurrent: Ask) -> None:
    save_among_distractors(recurrent)
    changed = text("14:05:10", "09:11:42")(recurrent, Path())

    explanation = changed.explain()

    divergence = explanation.divergence
    assert divergence is not None
    assert divergence.kind == "time"
    assert explanation.cached_tokens < divergence.position
    assert divergence.position == segments.shared_length(
        changed.token_ids, recurrent.token_ids
    )


# Without a trace


def state(store: PrefixStore) -> tuple[Any, ...]:
    return tree_hash(store.path / "blobs"), store.prefixes(), store.usage()


def test_explaining_changes_nothing(ask: Ask, folder: Path) -> None:
    save_among_distractors(ask)
    changed = CAUSES["date"].change(ask, folder)
    before = state(ask.store)

    for each in (ask, changed, replace(changed, settings=(("kv_bits", 8),))):
        each.explain()

    assert state(ask.store) == before


def test_explaining_needs_no_permission_to_write(ask: Ask, folder: Path) -> None:
    save_among_distractors(ask)
    ask.store.close()

    with read_only(ask.store.path) as path, PrefixStore(path) as store:
        reader = replace(ask, generator=CachedGenerator.load(folder, store=store))
        changed = CAUSES["date"].change(reader, folder)

        assert store.is_read_only
        assert reader.explain().is_full
        divergence = changed.explain().divergence

    assert divergence is not None
    assert divergence.kind == "date"


@pytest.mark.alone
def test_explaining_is_quick_among_many_prompts(ask: Ask, folder: Path) -> None:
    for number in range(200):
        each = ask.asking(f"{number} doors")
        rendered = ask.generator.render(each.prompt, each.tools)
        key = segments.save(ask.store, rendered.token_ids, each.fingerprint)
        assert rendered.origin is not None
        ask.store.segments.set_origin(key, rendered.origin)
    changed = CAUSES["date"].change(ask, folder)

    started = time.perf_counter()
    explanation = changed.explain()
    seconds = time.perf_counter() - started

    assert explanation.divergence is not None
    assert explanation.divergence.kind == "date"
    assert seconds < 1
