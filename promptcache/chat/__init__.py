"""Chats: conversations whose turns each reuse what the ones before have read."""
