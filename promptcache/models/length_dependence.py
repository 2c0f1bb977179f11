"""Length dependence: models whose KV values depend on more than the prefix.

Read in other pieces, or as the start of a longer prompt, the same tokens then give
other keys and values. Such a model is resumed only where plain mlx-lm's own pieces
end, because there a run repeats what an uncut one computes.
"""

from typing import Any, NamedTuple

# Found by comparing cut with uncut prefills of all of mlx-lm's architectures.
CUT_DEPENDENT_MODULES = {
    "phi3small": "its block-sparse mask lets tokens see later ones of their block",
    "plamo3": "its sliding-window mask reaches one token further than its cache",
}
# Found by comparing batches with single runs of all of mlx-lm's architectures.
PADDING_DEPENDENT_MODULES = {
    "afm7": "its shared keys are placed by the batch's padding",
    "minimax_m3_vl": "its blocks are cut where the batch's padding puts them",
}


class LengthDependence(NamedTuple):
    """From which token on values depend on where pieces end, and why."""

    start: int
    reason: str


def length_dependence(model: Any) -> LengthDependence | None:
    """Return how a model's KV values depend on the length of what is read, if so."""
    dependences = [_of_module(module) for module in model.modules()]
    return min((f for f in dependences if f is not None), default=None)


def _of_module(module: Any) -> LengthDependence | None:
    cls = type(module)
    if cls.__name__ == "DynamicNTKScalingRoPE":
        start = int(module.max_position_embeddings)
        reason = f"its dynamic rope depends on the length beyond {start:,} tokens"
        return LengthDependence(start, reason)
    reason = CUT_DEPENDENT_MODULES.get(cls.__module__.rpartition(".")[2], "")
    return LengthDependence(0, reason) if reason else None


def batch_dependence(model: Any) -> str | None:
    """Return why a model's answers depend on what is decoded with them, if so."""
    names = (type(module).__module__.rpartition(".")[2] for module in model.modules())
    return next(filter(None, map(PADDING_DEPENDENT_MODULES.get, names)), None)
