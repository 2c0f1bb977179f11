"""What of a request is taken and not used, each with the client that sends it.

Every other field of a request that is not supported is refused by its name. So is what
is no text in contents. Codex and Claude Code always send tools that are no functions:
these are left out, and the requests tell which. What else the objects in a request
have is left out, too, like `strict` of tools, `is_error` of results,
`cache_control` and `disable_parallel_tool_use`.
"""

from collections.abc import Mapping
from typing import Final

Fields = Mapping[str, str]

_OPENAI: Final[Fields] = {
    "metadata": "OpenAI's clients",
    "prompt_cache_key": "Codex, opencode",
    "prompt_cache_options": "OpenAI's clients",
    "prompt_cache_retention": "OpenAI's clients",
    "safety_identifier": "OpenAI's clients",
    "service_tier": "Codex, LangChain",
    "user": "OpenAI's clients, Open WebUI",
}

CHAT: Final[Fields] = {
    **_OPENAI,
    "parallel_tool_calls": "OpenAI's Agents SDK, LangChain",
    "store": "OpenAI's clients, opencode",
    "verbosity": "opencode",
}

TEXT: Final[Fields] = {**_OPENAI, "store": "OpenAI's clients"}

RESPONSES: Final[Fields] = {
    **_OPENAI,
    "client_metadata": "Codex",
    "parallel_tool_calls": "Codex",
    "reasoning": "Codex",
    "stream_options": "OpenAI's clients",
    "truncation": "OpenAI's Agents SDK",
    "verbosity": "Codex",
}

MESSAGES: Final[Fields] = {
    "betas": "Anthropic's clients",
    "cache_control": "Claude Code",
    "context_management": "Claude Code",
    "metadata": "Claude Code",
    "service_tier": "Anthropic's clients",
    "thinking": "Claude Code",
}
