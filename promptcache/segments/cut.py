"""Cutting: the first rows of a segment, as plain bytes.

A tensor has its tokens along the last axis but one, token ids along their only one.
What is in them is the codec's business.
"""

import math
from collections.abc import Iterable
from dataclasses import replace

from promptcache.segments.types import SegmentInfo, Tensor, TensorSpec


def token_nbytes(info: SegmentInfo, specs: Iterable[TensorSpec]) -> int:
    """Return what each token of a segment takes, or 0 if it cannot be cut."""
    num_tokens = info.end - info.start
    found = list(specs)
    if not info.resumption.sliceable or not num_tokens:
        return 0
    if any(spec.shape[_axis(spec.shape) :][:1] != (num_tokens,) for spec in found):
        return 0
    return sum(spec.nbytes for spec in found) // num_tokens


def first_tokens(tensor: Tensor, num_tokens: int) -> Tensor:
    """Return what a tensor has of the first tokens, copied."""
    axis = _axis(tensor.shape)
    num_runs = math.prod(tensor.shape[:axis])
    stride = tensor.data.nbytes // num_runs if num_runs else 0
    wanted = stride // tensor.shape[axis] * num_tokens
    runs = (tensor.data[i * stride :][:wanted] for i in range(num_runs))
    shape = (*tensor.shape[:axis], num_tokens, *tensor.shape[axis + 1 :])
    return replace(tensor, shape=shape, data=memoryview(b"".join(runs)))


def _axis(shape: tuple[int, ...]) -> int:
    return max(len(shape) - 2, 0)
