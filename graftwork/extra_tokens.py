"""Rows added to a base's embedding and output layer, for tokens that its tokenizer lacks: trained, served by id."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def marked(digest: str, count: int) -> str:
    """The digest of the base with added rows, readable: `DIGEST.rows-4`."""
    return f"{digest}.rows-{count}"


def count_of(digest: str) -> int:
    """How many rows were added to the base of this digest."""
    _, _, count = digest.partition(".rows-")
    return int(count or 0)


def grow(model: Any, count: int) -> None:
    """Add rows behind the last: each is the mean of the base's own, so that equal bases stay equal everywhere."""
    old = int(model.get_input_embeddings().num_embeddings)
    model.resize_token_embeddings(old + count, mean_resizing=False)
    layers: tuple[torch.nn.Module, ...] = (model.get_input_embeddings(), model.get_output_embeddings())
    for layer in layers:
        weight: Any = layer.weight
        weight.data[old:] = weight.data[:old].float().mean(dim=0).to(weight.dtype)
