"""The KV cache: mlx-lm's cache objects to segments, and back.

Each cache class has one entry in `classes`, which says how it is kept. This package
turns a token range of a cache into tensors and restores a cache from them; it never
sees a row of the index, and runs no model.
"""
