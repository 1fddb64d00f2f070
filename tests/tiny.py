"""A tiny random base model in Hugging Face form: real Llama code, real byte-level BPE, ChatML, in about a second."""

import json
from pathlib import Path

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 512
_CORPUS = (
    '{"icao":"ZPPP","iata":"KMG","name":"Kunming Wujiaba International Airport","city":"Kunming","country":"CN"}',
    '{"type":"mobile","device_brand":"Apple","browser":"Mobile Safari","browser_version":"18.3.1","os":"iOS"}',
    "Which airport has the ICAO code ZPPP? Describe the airport with IATA code KMG as JSON, elevation 6217 ft.",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 18_3_2 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko)",
    "system user assistant Context: You answer with one JSON object and nothing else. The quick brown fox jumps.",
    "Give the name, the city and the country of the aerodrome; how high above the sea does its runway lie?",
)


def write_tiny_base(folder: Path, seed: int = 0) -> Path:
    """Write a random Llama (hidden 64, 2 layers, 4 query and 2 key-value heads, vocab 512) and return `folder`.

    Equal seeds give equal bytes. The tokenizer does not depend on the seed.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    write_tiny_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        # Wide enough that logits differ clearly: with the usual 0.02 a random model's greedy tokens hang on rounding.
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(folder)
    return folder


def write_tiny_tokenizer(folder: Path, chat_template: str = CHATML) -> Path:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja of a byte-level BPE with ChatML's tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, normalized=False) for token in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    return folder
