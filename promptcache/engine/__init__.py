"""The engine: a model run over a prompt.

Prefill, decoding, a whole generation and a build. Where the cached part comes from, and
who keeps the rest, is left to `tiers`.
"""
