"""The identity of a model: hashes over all that it computes with.

What counts is the model in memory, now: its code, arguments and arrays, whatever became
of the files that it was loaded from.
"""
