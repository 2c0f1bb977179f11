"""The APIs that agents speak, on a real server."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.helpers.serving import Server, ask, running, system_and

SYSTEM = "You are the keeper of a lighthouse. " * 12
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server(model_dir: Any, tmp_path_factory: Any) -> Iterator[Server]:
    store = tmp_path_factory.mktemp("agents") / "store"
    with running(model_dir, "--memory-limit", "64MB", store=store) as server:
        yield server
        assert not [line for line in server.said if "Traceback" in line]


# OpenAI's responses


def response_of(server: Server, *, stream: bool, **options: Any) -> Any:
    arguments: Any = {"model": "gpt-5", "max_output_tokens": 12, **options}
    client = server.client()
    if not stream:
        return client.responses.create(**arguments)
    events = [*client.responses.create(**arguments, stream=True)]
    assert events[0].type == "response.created"
    assert [e.sequence_number for e in events] == [*range(len(events))]
    assert events[-1].type in ("response.completed", "response.incomplete")
    return events[-1].response


@pytest.mark.parametrize("stream", [False, True])
def test_response_goes_on_from_a_kept_one(server: Server, stream: bool) -> None:
    told = {"instructions": f"{stream} {SYSTEM}", "temperature": 0}
    first = response_of(server, stream=stream, input="Hello", **told)
    again = response_of(
        server,
        stream=stream,
        input="And then?",
        previous_response_id=first.id,
        **told,
    )
    whole = response_of(
        server,
        stream=False,
        input=[
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "And then?"},
        ],
        **told,
    )

    assert again.output_text == whole.output_text
    assert again.usage.input_tokens == whole.usage.input_tokens
    cached = again.usage.input_tokens_details.cached_tokens
    assert cached >= first.usage.input_tokens


def test_response_that_is_not_kept_is_not_found(server: Server) -> None:
    first = response_of(server, stream=False, input="Hello", store=False)

    for unknown in (first.id, "resp_unknown"):
        with pytest.raises(openai.NotFoundError, match="not kept"):
            response_of(
                server, stream=False, input="More", previous_response_id=unknown
            )


# Anthropic's messages


def message_of(server: Server, **body: Any) -> dict[str, Any]:
    given = {"model": "claude-opus-9", "max_tokens": 12, "messages": HELLO, **body}
    answer: dict[str, Any] = server.post("/v1/messages?beta=true", given)
    return answer


def test_message_counts_what_was_read_and_what_was_not(server: Server) -> None:
    body = {"system": [{"type": "text", "text": f"messages {SYSTEM}"}]}

    first, again = message_of(server, **body), message_of(server, **body)
    counted = server.post(
        "/v1/messages/count_tokens", {"model": "claude", "messages": HELLO, **body}
    )

    sizes = [
        usage["input_tokens"] + usage["cache_read_input_tokens"]
        for usage in (first["usage"], again["usage"])
    ]
    assert sizes == [counted["input_tokens"]] * 2
    assert first["usage"]["cache_read_input_tokens"] < 10
    assert again["usage"]["input_tokens"] == 1
    assert again["content"] == first["content"]


def test_billing_header_does_not_change_the_prompt(server: Server) -> None:
    def asked(number: int) -> Any:
        header = f"x-anthropic-billing-header: cc_version=2.1.{number}; cch={number};"
        blocks = [header, f"billing {SYSTEM}"]
        system = [{"type": "text", "text": text} for text in blocks]
        return message_of(server, system=system)["usage"]

    asked(1)
    assert asked(2)["input_tokens"] == 1


def test_errors_have_the_form_of_their_api(server: Server) -> None:
    for path, kind in (
        ("/v1/messages", "invalid_request_error"),
        ("/v1/messages/count_tokens", "invalid_request_error"),
    ):
        with pytest.raises(urllib.error.HTTPError) as error:
            server.post(path, {"model": "m", "max_tokens": 1, "messages": 7})
        told = json.loads(error.value.read())
        assert told["type"] == "error" and told["error"]["type"] == kind
        assert "messages" in told["error"]["message"]


# The cache, and the description


def test_warmed_prompt_is_not_read_again(server: Server) -> None:
    messages = system_and(f"warm {SYSTEM}", "Hello")

    told = server.post("/v1/cache/warm", {"messages": messages})
    answer = ask(server.client(), messages)

    assert told["cached_tokens"] < 10
    assert told["prompt_tokens"] == answer.prompt_tokens
    assert answer.prefilled_tokens == 1


def test_paths_are_described(server: Server) -> None:
    described = json.loads(server.get("/openapi.json"))

    assert {"/v1/chat/completions", "/v1/messages", "/health"} <= {*described["paths"]}
    for path, operations in described["paths"].items():
        for operation in operations.values():
            for content in operation.get("requestBody", {}).get("content", {}).values():
                name = content["schema"]["$ref"].rpartition("/")[2]
                assert name in described["components"]["schemas"], path


# Web pages


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/metrics", "/v1/cache"])
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Host": "evil.example"},
        {"Host": "evil.example:8080"},
    ],
)
def test_web_pages_get_nothing(
    server: Server, path: str, headers: dict[str, str]
) -> None:
    request = urllib.request.Request(server.url + path, headers=headers)
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=10)

    assert error.value.code == 403
    assert "Access-Control-Allow-Origin" not in error.value.headers


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:80", "[::1]:80"])
def test_this_machines_names_are_taken(server: Server, host: str) -> None:
    request = urllib.request.Request(f"{server.url}/health", headers={"Host": host})

    assert urllib.request.urlopen(request, timeout=10).status == 200
