"""Loading: the tensors of blobs into memory, verified.

Rows are read to where the cache will use them, in host memory or on a GPU.
"""
