"""The server's doors: keys, limits, errors, what it tells about its cache."""

import json
import socket
import threading
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from promptcache.server.auth import ApiKeys, is_loopback
from tests.helpers.commands import assert_fails, invoke
from tests.helpers.served import wait_until
from tests.helpers.serving import Server, ask, running, system_and

SYSTEM = "You are the narrator of a long story about a lighthouse. " * 12
ANNA, BERT, METRICS = "sk-anna-1", "sk-bert-2", "sk-metrics-3"
# Of the tiny models' tokenizer: after 256 bytes, 6 merges and the BOS.
END_ID = 263
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server(
    make_model: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    options = ("--api-key", ANNA, "--max-request-size", "2MB")
    env = {"PROMPTCACHE_MEMORY_LIMIT": "64MB", "HF_HUB_OFFLINE": "1"}
    env |= {"HF_HOME": str(tmp_path_factory.mktemp("hub"))}
    store = tmp_path_factory.mktemp("served") / "store"
    options = (*options, "--api-key", BERT, "--log-level", "INFO")
    options = (*options, "--metrics-key", METRICS, "--pin-quota", "2MB")
    model = make_model("llama")
    with running(model, *options, store=store, env=env, key=METRICS) as server:
        yield server
        assert not [line for line in server.said if "Traceback" in line]


@pytest.fixture
def anna(server: Server) -> openai.OpenAI:
    return server.client(ANNA)


@pytest.fixture
def bert(server: Server) -> openai.OpenAI:
    return server.client(BERT)


# Keys


@pytest.mark.parametrize("key", ["", "sk-anna-2", "sk-anna-", "sk-anna-11", "é"])
def test_wrong_keys_are_refused(server: Server, key: str) -> None:
    for path in ("/v1/models", "/v1/cache", "/metrics"):
        with pytest.raises(urllib.error.HTTPError) as error:
            server.get(path, key.encode().decode("latin-1") or None)
        assert error.value.code == 401
        told = json.loads(error.value.read())["error"]
        assert told["code"] == "invalid_api_key"


def test_wrong_key_gets_no_answer(server: Server) -> None:
    with pytest.raises(openai.AuthenticationError):
        ask(server.client("sk-else"), HELLO)


def test_health_needs_no_key(server: Server) -> None:
    assert json.loads(server.get("/health")) == {"status": "ok"}


def test_keys_do_not_share_prefixes(anna: openai.OpenAI, bert: openai.OpenAI) -> None:
    messages = system_and(f"{SYSTEM} Private.", "Hello")

    answers = [ask(client, messages) for client in (anna, anna, bert, bert)]

    assert [a.cached_tokens > 0 for a in answers] == [False, True, False, True]
    assert len({a.text for a in answers}) == 1


def test_only_bearers_of_a_key_get_its_namespace() -> None:
    keys = ApiKeys([ANNA, BERT], secret=b"1")

    anna, bert = (keys.namespace(f"Bearer {key}") for key in (ANNA, BERT))

    assert anna and bert and anna != bert
    assert ANNA not in anna
    assert keys.namespace(f"bearer  {ANNA}") == anna
    assert keys.namespace(ANNA) is None
    assert keys.namespace(f"Basic {ANNA}") is None
    assert keys.namespace(None) is None
    assert ApiKeys().namespace(None) == ""


def test_outside_needs_a_key(model_dir: Path) -> None:
    result = invoke("serve", "-m", model_dir, "--host", "0.0.0.0", "--port", "0")

    assert_fails(result, 2, "0.0.0.0", "--api-key", "--insecure")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("127.evil.example", False),
        ("192.168.0.3", False),
    ],
)
def test_loopback_is_known(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_keys_come_from_the_environment(model_dir: Path, tmp_path: Path) -> None:
    env = {"PROMPTCACHE_API_KEY": f"{ANNA}, {BERT}"}
    with running(model_dir, store=tmp_path / "store", env=env) as server:
        with pytest.raises(openai.AuthenticationError):
            ask(server.client("none"), HELLO)
        assert ask(server.client(BERT), HELLO, max_tokens=1).completion_tokens == 1


# Errors and limits

BAD = [
    {"messages": []},
    {"messages": "Hello"},
    {"messages": [1]},
    {"messages": [{"content": "Hello"}]},
    {"messages": [{"role": "king", "content": "Hello"}]},
    {"messages": [{"role": "user", "content": 7}]},
    {"messages": [{"role": "user", "content": [7]}]},
    {"messages": [{"role": "user", "content": "\ud800"}]},
    {"temperature": -1},
    {"temperature": "hot"},
    {"temperature": float("nan")},
    {"temperature": float("inf")},
    {"max_tokens": 0},
    {"max_tokens": 10**30},
    {"max_tokens": "many"},
    {"top_p": 2},
    {"top_k": 10**9, "temperature": 1},
    {"top_k": -1},
    {"top_logprobs": 500},
    {"logit_bias": {"99999999": 1}},
    {"logit_bias": {"-1": 1}},
    {"logit_bias": {"a": 1}},
    {"logit_bias": {"1": "b"}},
    {"logit_bias": []},
    {"stop": [1]},
    {"stop": {"a": 1}},
    {"stop": ""},
    {"stop": [""]},
    {"seed": -1},
    {"seed": 2**70},
    {"seed": "x"},
    {"stream": "yes"},
    {"stream": True, "stream_options": 7},
    {"tools": "hammer"},
    {"tools": ["hammer"]},
    {"chat_template_kwargs": 7},
    {"chat_template_kwargs": {"tokenize": False}},
    {"model": 7},
    {"num_draft_tokens": -1},
    {"repetition_penalty": -3},
    {"xtc_probability": 7.0},
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_requests_are_refused_in_openais_format(
    server: Server, bad: dict[str, Any]
) -> None:
    body = {"model": "default_model", "messages": HELLO, "max_tokens": 2, **bad}

    with pytest.raises(urllib.error.HTTPError) as error:
        server.post("/v1/chat/completions", body, ANNA)

    told = json.loads(error.value.read())["error"]
    assert error.value.code == 400
    assert told["type"] == "invalid_request_error"
    assert told["message"] and "\n" not in told["message"]
    assert json.loads(server.get("/health")) == {"status": "ok"}


@pytest.mark.parametrize("prompt", ["", None, 7, [], [[]], {}])
def test_bad_text_prompts_are_refused(server: Server, prompt: object) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        server.post("/v1/completions", {"model": "m", "prompt": prompt}, ANNA)

    assert error.value.code == 400


def test_unknown_model_is_not_found(anna: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        ask(anna, HELLO, model="no/such-model")
    assert error.value.code == "model_not_found"

    assert ask(anna, HELLO, max_tokens=2).completion_tokens == 2


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/cache/else", "/"])
def test_unknown_paths_are_not_found(server: Server, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        server.post(path, {}, ANNA)
    assert error.value.code == 404
    assert json.loads(error.value.read())["error"]["message"]
    with pytest.raises(urllib.error.HTTPError) as error:
        server.get(path, ANNA)
    assert error.value.code == 404
    assert json.loads(error.value.read())["error"]["message"]


def test_large_requests_are_refused(anna: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as error:
        ask(anna, system_and("x" * 3_000_000, "Hello"))

    assert error.value.status_code == 413
    assert error.value.code == "request_too_large"


def test_long_prompts_are_refused(anna: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(anna, system_and("x" * 200_000, "Hello"))

    assert error.value.code == "context_length_exceeded"
    assert "32768" in str(error.value)


RAW = [
    b"\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9,
    b"GET\r\n\r\n",
    b"BREW /tea HTTP/1.1\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nAuthorization: Bearer sk-anna-1\r\n\r\n",
    *(
        b"POST /v1/chat/completions HTTP/1.1\r\nAuthorization: Bearer sk-anna-1\r\n"
        b"Content-Length: %s\r\n\r\n%s" % (length, body)
        for length, body in [
            (b"-1", b"{}"),
            (b"9" * 40, b"{}"),
            (b"x", b"{}"),
            (b"4", b"{\xff\xfe}"),
            (b"9", b"[[[[[[[[["),
            (b"2", b"[]"),
            (b"100000", b"[" * 100000),
        ]
    ),
]


@pytest.mark.parametrize("raw", RAW, ids=range(len(RAW)))
def test_what_is_no_request_is_refused(server: Server, raw: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(raw)
        client.shutdown(socket.SHUT_WR)
        answer = b""
        while received := client.recv(65536):
            answer += received

    assert b"Traceback" not in answer
    head, _, body = answer.partition(b"\r\n\r\n")
    if body:
        assert json.loads(body)["error"]["type"] == "invalid_request_error"
        assert b" 500 " not in head
    assert json.loads(server.get("/health")) == {"status": "ok"}


# What mlx-lm's server does


def test_models_are_listed(anna: openai.OpenAI) -> None:
    assert [model.id for model in anna.models.list()] == ["llama"]
    assert anna.models.retrieve("llama").id == "llama"
    assert ask(anna, HELLO, model="llama", max_tokens=2).completion_tokens == 2


def test_text_is_completed(anna: openai.OpenAI) -> None:
    text = "Once upon a time there was a lighthouse. " * 5
    answers = [
        anna.completions.create(
            model="default_model", prompt=text, max_tokens=8, temperature=0
        )
        for _ in range(2)
    ]

    assert answers[0].choices[0].text == answers[1].choices[0].text
    details = answers[1].usage.prompt_tokens_details
    assert details.cached_tokens == answers[1].usage.prompt_tokens - 1


def test_logprobs_are_told(anna: openai.OpenAI) -> None:
    answer = anna.chat.completions.create(
        model="default_model",
        messages=HELLO,
        max_tokens=4,
        logprobs=True,
        top_logprobs=3,
        temperature=0,
    )

    told = answer.choices[0].logprobs
    assert told is not None and told.content is not None
    assert len(told.content) == 4


def test_tools_are_part_of_the_prompt(anna: openai.OpenAI) -> None:
    tool = {
        "type": "function",
        "function": {"name": "look", "parameters": {"type": "object"}},
    }
    plain = ask(anna, HELLO, max_tokens=2)

    answers = [ask(anna, HELLO, max_tokens=2, tools=[tool]) for _ in range(2)]

    assert answers[0].prompt_tokens > plain.prompt_tokens
    assert answers[1].prefilled_tokens == 1


# The cache


def test_cache_lists_explains_and_pins(server: Server, anna: openai.OpenAI) -> None:
    system = f"It is 2026-11-25 10:00. {SYSTEM}"
    ask(anna, system_and(system, "Hello"))
    server.wait_saved()

    listed = json.loads(server.get("/v1/cache", ANNA))["data"]
    changed = system_and(system.replace("10:00", "10:01"), "Hello")
    told = server.post("/v1/cache/explain", {"messages": changed}, ANNA)
    pinned = server.post(
        "/v1/cache/pin", {"key": listed[0]["key"], "name": "keeper"}, ANNA
    )
    unpinned = server.post("/v1/cache/unpin", {"name": "keeper"}, ANNA)

    assert {"key", "name", "num_tokens", "nbytes", "hits", "pinned"} <= set(listed[0])
    assert told["is_miss"] and told["divergence"]["kind"] in ("time", "date")
    assert pinned["pinned"] and pinned["name"] == "keeper"
    assert not unpinned["pinned"]


def _answer(server: Server, path: str, body: Any = None) -> tuple[int, Any]:
    """Return what Bert is answered, errors too."""
    try:
        if body is None:
            return 200, json.loads(server.get(path, BERT))
        return 200, server.post(path, body, BERT)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_key_is_answered_as_if_it_were_the_only_one(
    server: Server, anna: openai.OpenAI, bert: openai.OpenAI
) -> None:
    secret = "The password of the lighthouse is 4711, tell it to nobody at all. " * 4
    ask(bert, HELLO)
    server.wait_saved()
    mine = _answer(server, "/v1/cache")[1]["data"][0]["key"]
    # Each guess is closer by a word, or only a token from the whole.
    words = secret.split(" ")
    plan = [" ".join(words[:n]) for n in range(1, 12)]
    guesses = [system_and(cut, "Hello") for cut in [*plan, secret, secret[:-9] + "x"]]
    questions: list[tuple[str, Any]] = [
        *(("/v1/cache/explain", {"messages": guess}) for guess in guesses),
        *(("/v1/cache/explain", {"prompt": cut}) for cut in plan),
        ("/v1/cache", None),
        ("/v1/cache/pin", {"key": mine, "name": "anna's"}),
        ("/v1/cache/unpin", {"name": "anna's"}),
        ("/v1/cache/unpin", {"name": "anna's"}),
        *(("/v1/cache/pin", {"key": digit, "name": "x"}) for digit in "0123456789"),
        ("/v1/cache/unpin", {"name": "x"}),
        ("/metrics", None),
    ]
    before = [_answer(server, *question) for question in questions]

    ask(anna, system_and(secret, "Hello"))
    anna.completions.create(model="default_model", prompt=secret, max_tokens=1)
    server.wait_saved()
    theirs = [p["key"] for p in json.loads(server.get("/v1/cache", ANNA))["data"]]
    for name, key in zip(("anna's", "x"), theirs, strict=False):
        server.post("/v1/cache/pin", {"key": key, "name": name}, ANNA)

    assert [_answer(server, *question) for question in questions] == before
    unknown = ("/v1/cache/pin", {"key": "0" * 32, "name": "mine"})
    for key in theirs:
        mine_now = ("/v1/cache/pin", {"key": key, "name": "mine"})
        status, told = _answer(server, *mine_now)
        assert status == 404
        assert json.dumps(told).replace(key, "0" * 32) == json.dumps(
            _answer(server, *unknown)[1]
        )
    names = {p["name"] for p in json.loads(server.get("/v1/cache", ANNA))["data"]}
    assert {"anna's", "x"} <= names


def test_keys_pin_no_more_than_their_share(server: Server, bert: openai.OpenAI) -> None:
    ask(bert, system_and(SYSTEM * 4, "Hello"), max_tokens=1)
    server.wait_saved()
    listed = json.loads(server.get("/v1/cache", BERT))["data"]
    longest = max(listed, key=lambda prefix: prefix["num_tokens"])

    large = _answer(server, "/v1/cache/pin", {"key": longest["key"], "name": "large"})
    long = _answer(server, "/v1/cache/pin", {"key": longest["key"], "name": "n" * 129})

    assert (large[0], large[1]["error"]["code"]) == (403, "pin_quota_exceeded")
    assert "would be pinned and 2.0 MB may be" in large[1]["error"]["message"]
    assert long[0] == 400 and "too long for a name" in long[1]["error"]["message"]
    assert not any(p["name"] for p in json.loads(server.get("/v1/cache", BERT))["data"])


def test_metrics_want_a_key_of_their_own(server: Server) -> None:
    assert "promptcache_hits" in server.get("/metrics", METRICS)
    assert _answer(server, "/metrics")[0] == 403
    with pytest.raises(urllib.error.HTTPError) as error:
        server.get("/v1/cache", METRICS)
    assert error.value.code == 401


@pytest.mark.parametrize(
    ("keys", "metrics_key", "given", "expected"),
    [
        ([], None, None, True),
        ([], "m", None, False),
        ([], "m", "Bearer m", True),
        ([ANNA], None, f"Bearer {ANNA}", False),
        ([ANNA], "m", f"Bearer {ANNA}", False),
        ([ANNA], "m", "bearer m", True),
        ([ANNA], "m", "m", False),
    ],
)
def test_who_may_see_the_metrics(
    keys: list[str], metrics_key: str | None, given: str | None, expected: bool
) -> None:
    found = ApiKeys(keys, secret=b"1", metrics_key=metrics_key)

    assert found.opens_metrics(given) is expected


def test_model_that_is_not_loaded_is_not_explained(server: Server) -> None:
    body = {"messages": HELLO}

    for name in ("default_model", "llama"):
        assert _answer(server, "/v1/cache/explain", {**body, "model": name})[0] == 200
    status, told = _answer(server, "/v1/cache/explain", {**body, "model": "other"})

    assert (status, told["error"]["code"]) == (503, "unavailable")
    assert _answer(server, "/v1/cache/explain", {**body, "model": []})[0] == 400


def test_pages_of_other_origins_learn_nothing(server: Server) -> None:
    head = "GET /v1/cache HTTP/1.0\r\nAuthorization: Bearer sk-anna-1\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(f"{head}Origin: https://else.example\r\n\r\n".encode())
        answer = client.recv(65536)

    assert b" 403 " in answer.splitlines()[0]
    assert b"Access-Control-Allow-Origin" not in answer


def test_logs_show_what_clients_say_and_do_not_obey(server: Server) -> None:
    name = "claude-\x1b]52;c;ZXZpbA==\x07\x9b2J\x7f"
    ask(server.client(ANNA), HELLO, model=name, max_tokens=1)

    shown = "claude-\\x1b]52;c;ZXZpbA==\\x07\\x9b2J\\x7f"
    wait_until(lambda: any(shown in line for line in server.said))
    assert all(line.isprintable() for line in server.said)


def test_metrics_are_prometheus_text(server: Server, anna: openai.OpenAI) -> None:
    for _ in range(2):
        ask(anna, system_and(f"{SYSTEM} Metrics.", "Hello"))

    text = server.get("/metrics", METRICS)

    names = {family.name for family in text_string_to_metric_families(text)}
    assert names >= {
        f"promptcache_{name}"
        for name in (
            *("hits", "misses", "tokens_reused", "seconds_saved", "bytes"),
            *("evictions", "writer_queue_bytes", "limit_bytes"),
        )
    }


# Clients that go


def _send(server: Server, body: dict[str, Any]) -> socket.socket:
    raw = json.dumps({"model": "default_model", **body}).encode()
    client = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    client.sendall(
        b"POST /v1/chat/completions HTTP/1.0\r\nAuthorization: Bearer sk-anna-1\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(raw), raw)
    )
    return client


def _active(server: Server) -> float:
    return server.metric("active_requests")


@pytest.mark.parametrize("options", [{}, {"stream": True}, {"seed": 3}], ids=str)
def test_client_that_hangs_up_frees_its_work(
    server: Server, options: dict[str, Any]
) -> None:
    bias = {"logit_bias": {str(END_ID): -100}}  # It never ends.
    client = _send(server, {"messages": HELLO, "max_tokens": 30000, **bias, **options})
    wait_until(lambda: _active(server) == 1)

    client.close()

    wait_until(lambda: _active(server) == 0, seconds=5)
    started = time.monotonic()
    assert ask(server.client(ANNA), HELLO, max_tokens=2).completion_tokens == 2
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("options", [{}, {"seed": 3}], ids=str)
def test_health_does_not_wait_for_a_long_prefill(
    server: Server, options: dict[str, Any]
) -> None:
    text = f"{time.time()} " + "The sea is rough today. " * 1200
    client = _send(
        server, {"messages": system_and(text, "Hello"), "max_tokens": 1, **options}
    )
    wait_until(lambda: _active(server) == 1)

    waits = []
    for _ in range(5):
        started = time.monotonic()
        assert json.loads(server.get("/health")) == {"status": "ok"}
        waits.append(time.monotonic() - started)
    was_active = _active(server)
    client.close()

    assert was_active == 1
    assert max(waits) < 1
    wait_until(lambda: _active(server) == 0, seconds=20)


@pytest.mark.long
def test_those_who_wait_go_on_when_the_first_hangs_up(server: Server) -> None:
    text = f"{time.time()} " + "The sea is calm today. " * 600
    messages = system_and(text, "Hello")
    first = _send(server, {"messages": messages, "max_tokens": 1})
    wait_until(lambda: _active(server) == 1)
    answers: list[Any] = []

    def second() -> None:
        answers.append(ask(server.client(ANNA), messages, max_tokens=2))

    thread = threading.Thread(target=second)
    thread.start()
    time.sleep(0.3)
    first.close()
    thread.join(60)

    assert answers[0].completion_tokens == 2
