"""A chat template that drops what was thought."""

from collections.abc import Iterator, Sequence

import numpy as np

from promptcache import PrefixStore
from promptcache.segments.blob_format import BlobHeader
from promptcache.store.blobs.folder import BlobFolder
from tests.helpers import tiny

# As templates of thinking models do: what was thought is no history.
THINKING_TEMPLATE = tiny.CHAT_TEMPLATE.replace(
    "{{ message.content }}", "{{ message.content.split('|')[-1] }}"
)


def shared_tokens(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many leading tokens two prompts share."""
    length = min(len(left), len(right))
    same = np.equal(left[:length], right[:length])
    return length if same.all() else int(same.argmin())


def headers(store: PrefixStore) -> Iterator[BlobHeader]:
    """Yield the headers of all blobs."""
    blobs = BlobFolder(store.path)
    for key, _ in blobs.stored():
        yield blobs.read_header(key)
