"""Segments: the KV cache of a range of tokens, how it is named and how it is written.

Its key is a chain hash over all tokens up to its end and a fingerprint of what else
its values depend on. This package knows neither the index nor mlx.
"""
