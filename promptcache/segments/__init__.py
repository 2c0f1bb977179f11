"""Segments: what a piece of a prompt's KV cache is called, and how it is written.

A segment is a range of tokens with its key, a chain hash over all tokens up to its
end and a fingerprint of what else its values depend on. This package defines both,
the values that describe segments and the format of a blob. It opens no file, and
knows neither the index nor mlx.
"""
