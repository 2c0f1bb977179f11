"""Batches: many requests over one model, in turns and together.

A `Run` is a request on its way. The `Scheduler` says which goes on next; what they
read and generate is `engine`'s.
"""
