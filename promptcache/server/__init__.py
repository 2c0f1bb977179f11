"""The server: OpenAI's API over HTTP, with a prompt cache that survives.

`http` is what clients see; `backend` is mlx-lm's loop, on which requests run.
"""
