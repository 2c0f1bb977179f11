"""Maintenance: what keeps a store small and sound.

Eviction and pruning plan first and execute afterwards; verification finds damage and
rebuilds a lost index from the blobs.
"""
