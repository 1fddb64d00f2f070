"""Context parallelism: workers that share one row, each with a part of its tokens (`strategy.context_parallel`).

DeepSpeed-Ulysses (arXiv 2309.14509): in each attention layer an all-to-all gives every worker all tokens of some of
the heads, and a second one gives the tokens back. Everything else is computed on a worker's own tokens. torch's ring
attention needs CUDA kernels, and DeepSpeed 0.19's class of it wants batches of one fixed size.

Legend: B rows, H heads of queries, K heads of keys, T tokens of a worker, W workers of a group, S = W T, D head size.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import AttentionInterface, AttentionMaskInterface

from graftwork.base.support import PROBE_LENGTH, most_mixed, probe_ids
from graftwork.compat.hf import set_attention
from graftwork.errors import ConfigError
from graftwork.training.objectives.protocol import Rows, WrappedRows
from graftwork.training.objectives.rows import IGNORED

NAME = "context_parallel"
"""Of the attention function, in transformers' registry."""
UNSUPPORTED = ("softcap", "s_aux")
"""Arguments of attention functions, set by models whose attention is more than a causal softmax."""


@dataclass(frozen=True)
class ContextParallelRows(WrappedRows):
    """Rows of which each batch holds the part of one worker."""

    rank: int
    """Of the worker within its group."""
    size: int
    """Workers of a group."""

    def collate(self, indices: Any, pad_id: int) -> dict[str, torch.Tensor]:
        """Return a worker's part (B, T) of a batch that is padded to equal parts on all workers.

        labels (B, T + 1): the first column is never scored; the others are the next tokens, the last of them from the
        part behind.
        """
        batch = self.rows.collate(indices, pad_id)
        ids_BS, labels_BS = batch["input_ids"], batch["labels"]
        part = math.ceil(ids_BS.shape[1] / self.size)
        more = part * self.size - ids_BS.shape[1]
        ids_BS = torch.nn.functional.pad(ids_BS, (0, more), value=pad_id)
        labels_BS = torch.nn.functional.pad(labels_BS, (0, more + 1), value=IGNORED)
        start, end = self.rank * part, (self.rank + 1) * part
        labels_BT = labels_BS[:, start : end + 1].clone()
        labels_BT[:, 0] = IGNORED
        places_BT = torch.arange(start, end).expand(len(ids_BS), -1)
        return {"input_ids": ids_BS[:, start:end], "position_ids": places_BT, "labels": labels_BT}


def parts_of(rows: Rows, size: int, rank: int) -> Rows:
    """Return the rows as the worker with this rank among all workers computes them."""
    return ContextParallelRows(rows, rank % size, size) if size > 1 else rows


def replicas(rows: Rows, rank: int, world: int) -> tuple[int, int]:
    """Return (number of the group of workers that shares a row, groups) for a worker among `world`."""
    return (rank // rows.size, world // rows.size) if isinstance(rows, ContextParallelRows) else (rank, world)


def use_context_parallel(model: Any, size: int) -> None:
    """Let the model's attention run over groups of `size` consecutive ranks. Called on all ranks.

    Raises ConfigError for a model whose logits differ from those that one worker computes.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    groups = [dist.new_group(list(range(start, start + size))) for start in range(0, world, size)]
    config = model.config.get_text_config()
    if config.num_attention_heads % size:
        raise ConfigError(
            f"strategy.context_parallel={size}",
            f"the base has {config.num_attention_heads} attention heads",
            "each worker computes the attention of an equal number of heads",
            "take a divisor of the number of heads",
        )
    whole_SV = _probe_logits(model)
    AttentionInterface.register(NAME, _Ulysses(groups[rank // size], size))
    AttentionMaskInterface.register(NAME, _no_mask)
    set_attention(config, NAME)
    if whole_SV is None:
        return
    part_TV = _probe_logits(model, rank % size, size)
    assert part_TV is not None, "the weights are not sharded"
    start = (rank % size) * len(part_TV)
    far = (part_TV - whole_SV[start : start + len(part_TV)]).abs().max() / whole_SV.abs().max()
    if far > most_mixed(model):
        raise ConfigError(
            f"strategy.context_parallel={size}",
            f"{type(model).__name__} computes other logits from parts of a row (by {far:.1%})",
            "attention is causal over all tokens, and nothing else looks from one token to another",
            "set strategy.context_parallel=1",
        )


@torch.no_grad()
def _probe_logits(model: Any, rank: int = 0, size: int = 1) -> torch.Tensor | None:
    """Logits of the probe, or of a part of it; None where a strategy has sharded the weights already."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return None
    length = 2 * PROBE_LENGTH // size
    device = next(model.parameters()).device
    ids_S = torch.tensor(probe_ids(int(model.config.get_text_config().vocab_size)), device=device)
    places_T = torch.arange(rank * length, (rank + 1) * length, device=device)
    training = model.training
    model.eval()
    logits_TV: torch.Tensor = model(
        input_ids=ids_S[None, places_T], position_ids=places_T[None], use_cache=False
    ).logits[0]
    model.train(training)
    return logits_TV


def _no_mask(*_args: Any, **_options: Any) -> None:
    """In place of transformers' mask: padding is on the right and never scored, the rest is causal."""


class _Ulysses:
    """Attention function in transformers' form over the tokens of a group of workers."""

    def __init__(self, group: Any, size: int) -> None:
        self._group, self._size = group, size

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """query (B, H, T, D); key, value (B, K, T, D) -> (B, T, H, D)."""
        tokens = query.shape[2] * self._size
        given = [name for name in UNSUPPORTED if options.get(name) is not None]
        if sliding_window is not None and tokens > sliding_window:
            given.append(f"sliding_window={sliding_window}, for rows of {tokens} tokens")
        if given:
            raise ConfigError(
                f"strategy.context_parallel={self._size}",
                f"the base's attention has {given[0]}",
                "attention over parts of a row is a causal softmax over all tokens",
                "set strategy.context_parallel=1, or a max_length within the window",
            )
        times = self._size // math.gcd(self._size, key.shape[1])  # too few heads of keys: some workers have equal ones
        key, value = (heads.repeat_interleave(times, dim=1) if times > 1 else heads for heads in (key, value))
        out_BHSD = torch.nn.functional.scaled_dot_product_attention(
            self._gather_tokens(query),
            self._gather_tokens(key),
            self._gather_tokens(value),
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        batch, _, _, width = query.shape
        # (B, H/W, W T, D) -> W x (B, T, H/W, D), a part for each worker; then (B, T, W, H/W, D)
        parts_WBTHD = out_BHSD.unflatten(2, (self._size, -1)).permute(2, 0, 3, 1, 4)
        heads_WBTHD = _all_to_all(parts_WBTHD, self._group)
        return heads_WBTHD.permute(1, 2, 0, 3, 4).reshape(batch, query.shape[2], -1, width), None

    def _gather_tokens(self, heads_BHTD: torch.Tensor) -> torch.Tensor:
        """(B, H, T, D) -> (B, H/W, W T, D): all tokens of this worker's heads."""
        parts_WBHTD = heads_BHTD.unflatten(1, (self._size, -1)).transpose(0, 1)
        tokens_WBHTD = _all_to_all(parts_WBHTD, self._group)
        return tokens_WBHTD.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _all_to_all(parts: torch.Tensor, group: Any) -> torch.Tensor:
    found: torch.Tensor = _AllToAll.apply(parts, group)  # type: ignore[no-untyped-call]  # torch has no type of it
    return found


class _AllToAll(torch.autograd.Function):
    """The first dimension has a part for each worker; afterwards one from each. Its gradient takes the way back."""

    @staticmethod
    def forward(ctx: Any, parts: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        found = torch.empty(parts.shape, dtype=parts.dtype, device=parts.device)
        dist.all_to_all_single(found, parts.contiguous(), group=group)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_to_all(gradients[0], ctx.group), None
