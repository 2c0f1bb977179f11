"""Real chat templates."""

from pathlib import Path

REAL_TEMPLATES = Path(__file__).parents[3] / "shared" / "data" / "chat-templates"
SYSTEM = "You narrate. Answer briefly, in one sentence."
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "roll",
            "description": "Roll a die",
            "parameters": {
                "type": "object",
                "properties": {"sides": {"type": "integer", "description": "Faces"}},
                "required": ["sides"],
            },
        },
    }
]
