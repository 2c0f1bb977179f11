"""The blobs: one file for each segment, written once and never changed.

Files are written under a temporary name, made durable, and published by a rename.
`segments` defines what a file contains, `index` which files there should be.
"""
