"""Linear layers of a base by their function (attention, MLP, keys, values), found by the names of its family."""

from typing import Any

from graftwork.errors import ConfigError

ATTENTION_WORDS = ("attn", "attention")
MLP_WORDS = ("mlp", "feed_forward", "ffn", "fc")
ATTENTION_ENDS = ("o_proj", "out_proj", "attn.c_proj", "attention.dense", "self_attention.dense", "self_attn.dense")
MLP_ENDS = ("down_proj", "fc2", "fc_out", "mlp.c_proj", "dense_4h_to_h", "w2")
"""The last linear of a block."""
KEYS, VALUES = ("k_proj",), ("v_proj",)


def linears(model: Any) -> list[str]:
    """Full names of the linear layers, the head left out."""
    import torch  # not above: plans read the names alone

    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if module is not head and (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D")
    ]


def within(asked: str, words: tuple[str, ...], model: Any) -> list[str]:
    """Full names of the linear layers in whose names one of the words stands. Raises ConfigError for none."""
    found = [name for name in linears(model) if any(word in name.lower() for word in words)]
    if not found:
        raise _nowhere(asked, "no linear layer of {} lies in such a block", model)
    return found


def ends(asked: str, names: tuple[str, ...], model: Any) -> list[str]:
    """Those of the names that layers of the model end in, as PEFT takes them for targets. Raises ConfigError for none.

    `asked` begins the error.
    """
    known = linears(model)
    found = [name for name in names if any(layer.endswith(f".{name}") for layer in known)]
    if not found:
        raise _nowhere(asked, f"{{}} has no layer named {', '.join(names)}", model)
    return found


def _nowhere(asked: str, found: str, model: Any) -> ConfigError:
    known = sorted({name.rsplit(".", 1)[-1] for name in linears(model)})
    return ConfigError(
        asked,
        found.format(type(model).__name__),
        f"its linear layers: {', '.join(known)}",
        "set adapter.kind=lora and adapter.targets=all-linear",
    )
