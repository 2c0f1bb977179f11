"""The blobs: one file for each segment, written once and never changed.

Files are written under a temporary name, made durable, and published by a rename.
What a file holds is defined in `segments`; which files there should be, in `index`.
"""
