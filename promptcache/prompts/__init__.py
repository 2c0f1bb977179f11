"""Prompts: text, chats and tools to token ids.

A chat goes through the model's own template; the boundaries at which other prompts are
likely to part from it come with it. No model is needed, only its tokenizer.
"""
