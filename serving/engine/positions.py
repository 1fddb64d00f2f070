"""How long a sequence may be so that its rotary positions hang on nothing but itself."""

from typing import Any


def longest_sequence(config: Any) -> tuple[int | None, str]:
    """(tokens, the rule that sets them); None: the config names no limit.

    transformers rotates all rows of a batch by one set of frequencies. "longrope" (Phi 3) takes another set as soon as
    the longest row passes its original length, so up to there no row changes its neighbours. "dynamic" takes another
    one beyond max_position_embeddings, where every base ends here.
    """
    longest: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    for own in [rope] if "rope_type" in rope else [one for one in rope.values() if isinstance(one, dict)]:
        original = own.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", 0)
        if own.get("rope_type") == "longrope" and original and (longest is None or original < longest):
            return original, f"beyond {original} tokens this base's longrope rotates every row of the batch otherwise"
    return longest, f"the base takes sequences up to {longest} tokens"
