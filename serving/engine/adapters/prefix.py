"""Prefix tuning (arXiv 2101.00190) and prompt tuning (arXiv 2104.08691): virtual tokens before the prompt.

A prefix is each layer's keys and values, rotated already: they are copied to the front of the request's KV. A trained
prompt stands where word embeddings would and is computed with the request. Prompt tokens count their positions from
behind it, as in peft 0.21 (`PeftModelForCausalLM.prepare_inputs_for_generation`).
"""

from graftwork.adapters.prefix import EMBEDDINGS_KEY, PrefixSpec
from graftwork.serving.engine.adapters.base_view import BaseView
from graftwork.serving.engine.adapters.format import AdapterWeights, ConfigFile, ReadOptions, VirtualTokens
from graftwork.serving.engine.adapters.weights_file import TensorFile

_HONOURED = frozenset({"num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads"})
_WITHOUT_EFFECT_HERE = frozenset(
    {"num_transformer_submodules", "encoder_hidden_size", "prefix_projection", "init_weights"}
    | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
    | {"encoder_reparameterization_type", "encoder_num_layers", "encoder_dropout"}
)
"""How the embeddings were trained; what is saved is what comes out of the encoder. The submodules are checked."""


def read(config: ConfigFile, tensors: TensorFile, base: BaseView, options: ReadOptions) -> AdapterWeights:
    """Return a prefix, one tensor [N, layers * 2 * Hkv * D], or a trained prompt, one tensor [N, H]."""
    config.require_known(_HONOURED, _WITHOUT_EFFECT_HERE, {})
    if config.values.get("num_transformer_submodules") not in (None, 1):
        raise config.make_error("num_transformer_submodules", "a decoder has one")
    count, dtype = config.positive_int("num_virtual_tokens"), options.dtype
    if config.values["peft_type"] != PrefixSpec.peft_type:
        embeddings_NH = tensors.take(EMBEDDINGS_KEY, (count, base.hidden_size), dtype)
        tensors.require_empty(EMBEDDINGS_KEY)
        return AdapterWeights(virtual_tokens=VirtualTokens(count, embeddings_NH=embeddings_NH))
    if len(set(base.kv_shapes)) != 1:
        raise config.make_error("peft_type", "a prefix needs equal key-value heads in every layer of the base")
    shape, layers = base.kv_shapes[0], len(base.kv_shapes)
    saved = tensors.take(EMBEDDINGS_KEY, (count, layers * 2 * shape.heads * shape.head_dim), dtype)
    tensors.require_empty(EMBEDDINGS_KEY)
    parts_LHND = saved.view(count, layers * 2, shape.heads, shape.head_dim).permute(1, 2, 0, 3).contiguous()
    return AdapterWeights(virtual_tokens=VirtualTokens(count, tuple(parts_LHND[0::2]), tuple(parts_LHND[1::2])))
