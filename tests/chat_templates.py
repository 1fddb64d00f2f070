"""Chat templates of model families, from the installed TRL, each with a tiny tokenizer that has its special tokens."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from tests.tiny import write_tiny_tokenizer

_SPECIAL = re.compile(
    r"<\|[A-Za-z_0-9]+\|?>|<[a-z_]+\|>|<｜[^｜>]+｜>|<(?:start|end)_of_turn>|<bos>|\[gMASK\]|<sop>"  # noqa: RUF001
)
PLAIN_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""Added tokens that are not special: text of people may spell them."""


@dataclass(frozen=True)
class Family:
    """One template of TRL and its end tokens."""

    name: str
    eos: str = "<|im_end|>"
    more_eos: tuple[str, ...] = ()
    """End tokens that generation_config.json names besides `eos`."""

    @property
    def source(self) -> str:
        """Text of the template."""
        return _read(self.name)

    @property
    def training_source(self) -> str:
        """TRL's form of it, which marks the assistant's tokens for transformers."""
        return _read(f"{self.name}_training")

    def write(self, folder: Path) -> Path:
        """Write template and tokenizer into `folder`, and return it."""
        from tokenizers import AddedToken, Tokenizer

        write_tiny_tokenizer(folder, self.source)
        path = folder / "tokenizer.json"
        tokenizer = Tokenizer.from_file(str(path))
        special = {*_SPECIAL.findall(self.source), self.eos, *self.more_eos, "<|endoftext|>"}
        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in sorted(special)])
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in PLAIN_TOKENS])
        tokenizer.save(str(path))
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings |= {"eos_token": self.eos, "pad_token": "<|endoftext|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        ids = [tokenizer.token_to_id(token) for token in (self.eos, *self.more_eos)]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        return folder


def _read(name: str) -> str:
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


FAMILIES = {
    family.name: family
    for family in (
        Family("llama3", "<|eot_id|>"),
        Family("llama3_1", "<|eot_id|>", ("<|eom_id|>",)),
        Family("llama3_2", "<|eot_id|>"),
        Family("qwen2_5"),
        Family("qwen3"),
        Family("qwen3_instruct_2507"),
        Family("qwen3_5_think"),
        Family("qwen3_5_nothink"),
        Family("qwen3_8"),
        Family("gemma", "<end_of_turn>"),
        Family("gemma3", "<end_of_turn>"),
        Family("gemma4_v5", "<turn|>"),
        Family("phi3", "<|endoftext|>", ("<|end|>",)),
        Family("gptoss", "<|return|>", ("<|endoftext|>",)),
        Family("deepseek_r1_distill", "<｜end▁of▁sentence｜>"),  # noqa: RUF001
        Family("deepseekv3", "<｜end▁of▁sentence｜>"),  # noqa: RUF001
        Family("glm4moe", "<|endoftext|>", ("<|user|>", "<|observation|>")),
        Family("cohere", "<|END_OF_TURN_TOKEN|>"),
        Family("cohere2", "<|END_OF_TURN_TOKEN|>"),
        Family("lfm2_2_5"),
        Family("nemotron_3_nano"),
    )
}
