"""Tiers: where a prefix may be, in memory or on disk.

They are asked in turn for the longest cached prefix of a prompt; what was read goes
back into them, in the background. A tier that fails is a miss, and a warning.
"""
