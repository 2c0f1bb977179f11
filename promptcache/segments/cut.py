"""Cutting a segment, as plain bytes.

A tensor has its tokens along the last axis but one, token ids along their only axis.
"""

import math
from collections.abc import Iterable
from dataclasses import replace

from promptcache.segments.types import SegmentInfo, Tensor, TensorSpec


def token_nbytes(info: SegmentInfo, specs: Iterable[TensorSpec]) -> int:
    """Return the size of each token of a segment, 0 if the segment cannot be cut."""
    num_tokens = info.end - info.start
    sizes = [(spec.shape[_axis(spec.shape) :][:1], spec.nbytes) for spec in specs]
    has_rows = all(length == (num_tokens,) for length, _ in sizes)
    if not info.resumption.sliceable or not num_tokens or not has_rows:
        return 0
    return sum(nbytes for _, nbytes in sizes) // num_tokens


def first_tokens(tensor: Tensor, num_tokens: int) -> Tensor:
    """Return a copy of the first tokens of a tensor."""
    axis = _axis(tensor.shape)
    num_runs = math.prod(tensor.shape[:axis])
    stride = tensor.data.nbytes // num_runs if num_runs else 0
    length = stride // tensor.shape[axis] * num_tokens
    runs = (tensor.data[i * stride :][:length] for i in range(num_runs))
    shape = (*tensor.shape[:axis], num_tokens, *tensor.shape[axis + 1 :])
    return replace(tensor, shape=shape, data=memoryview(b"".join(runs)))


def _axis(shape: tuple[int, ...]) -> int:
    return max(len(shape) - 2, 0)
