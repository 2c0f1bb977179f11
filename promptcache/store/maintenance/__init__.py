"""Maintenance: what keeps a store small and sound.

Pruning plans first and executes afterwards; verification finds damage, and a lost
index is rebuilt from the blobs.
"""
