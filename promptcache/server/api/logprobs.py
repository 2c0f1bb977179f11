"""Log-probabilities and token counts in OpenAI's forms."""

import itertools
from collections.abc import Sequence
from typing import Any

from promptcache.server.completion import TokenLogprob, Usage

# What OpenAI says of tokens that are very unlikely; JSON has no infinity.
MIN_LOGPROB = -9999.0


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Return log-probabilities in the form of chats and responses."""
    return [
        {**_entry(token), "top_logprobs": [_entry(other) for other in token.top]}
        for token in tokens
    ]


def _entry(token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": token.token,
        "logprob": finite(token.logprob),
        "bytes": list(token.data),
    }


def text_logprobs(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """Return log-probabilities in the form of text completions.

    Args:
        tokens: The tokens.
        offset: How many characters come before them.
    """
    lengths = [len(token.token) for token in tokens]
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [finite(token.logprob) for token in tokens],
        "top_logprobs": [
            {other.token: finite(other.logprob) for other in token.top}
            for token in tokens
        ],
        "text_offset": list(itertools.accumulate(lengths, initial=offset))[:-1],
    }


def finite(logprob: float) -> float:
    """Return a log-probability that JSON can say."""
    # Also for what is not a number.
    return logprob if logprob > MIN_LOGPROB else MIN_LOGPROB


def completion_usage(usage: Usage) -> dict[str, Any]:
    """Return the token counts of a chat or text completion."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }
