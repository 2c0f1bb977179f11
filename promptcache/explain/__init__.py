"""Explanations: why a prompt hits or misses, and which text changes too early.

Everything here reads the store and changes nothing.
"""
