"""Chat templates of model families, each with a tiny tokenizer that has its special tokens.

Sources: the installed TRL, the wheel of axolotl, and llama.cpp in the sdist of llama-cpp-python. Nothing is copied.
"""

import functools
import json
import re
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from graftwork.base.package_source import PackageFile, fetch
from graftwork.storage.local import build_once
from graftwork.storage.store import cache_root
from tests.tiny import CHATML, write_tiny_tokenizer

_SPECIAL = re.compile(
    r"<\|[A-Za-z_0-9:]+\|?>|<[a-z_]+\|>|<｜[^｜>]+｜>|<(?:start|end)_of_turn>|<bos>|\[gMASK\]|<sop>"  # noqa: RUF001
    r"|\[/?[A-Z_]{3,}\]|\[\|[a-z]+\|\]|<SPECIAL_\d+>|</?seed:[a-z_]+>|</?(?:begin|beginning|end)_of_[a-z]+>|\[e~\[|\]~b\]"
)
PLAIN_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""Added tokens that are not special: text of people may spell them."""
_AXOLOTL, _LLAMA_CPP = ("axolotl", "0.19.0"), ("llama-cpp-python", "0.3.36")
_DOWNLOAD_TIMEOUT_S = 300
Source = Literal["trl", "axolotl", "llama.cpp"]
QUICK = ("mistral_v2v3", "mistral_v3_tekken", "phi_4")
"""Families of packages whose tests are quick: one small wheel."""


@dataclass(frozen=True)
class Family:
    """One template and its end tokens."""

    name: str
    eos: str = "<|im_end|>"
    more_eos: tuple[str, ...] = ()
    """End tokens that generation_config.json names besides `eos`."""
    place: Source = "trl"
    without: str = ""
    """Parts of a conversation that the template leaves out or refuses: functions, calls, parallel (calls), text (next
    to calls), reasoning, reasoning-with-calls, system, answers (without reasoning)."""
    for_tools: bool = False
    """The template is the one for functions of a base whose other one is ChatML."""

    @property
    def source(self) -> str:
        """Text of the template."""
        return _read(self.place, self.name)

    @property
    def training_source(self) -> str:
        """The form of it that marks the assistant's tokens for transformers: TRL's, else the template itself."""
        return _read("trl", f"{self.name}_training") if self.place == "trl" else self.source

    def write(self, folder: Path) -> Path:
        """Write template and tokenizer into `folder`, and return it."""
        from tokenizers import AddedToken, Tokenizer

        source = self.source
        write_tiny_tokenizer(folder, CHATML if self.for_tools else source)
        if self.for_tools:
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / "tool_use.jinja").write_text(source, encoding="utf-8")
        path = folder / "tokenizer.json"
        tokenizer = Tokenizer.from_file(str(path))
        begin = {"<s>"} if self.place != "trl" and "bos_token" in source else set()
        special = {*_SPECIAL.findall(source), self.eos, *self.more_eos, "<|endoftext|>", *begin}
        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in sorted(special)])
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in PLAIN_TOKENS])
        tokenizer.save(str(path))
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings |= {"eos_token": self.eos, "pad_token": "<|endoftext|>"} | dict.fromkeys(
            ["bos_token"] * len(begin), "<s>"
        )
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        ids = [tokenizer.token_to_id(token) for token in (self.eos, *self.more_eos)]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        return folder


@functools.cache
def _read(place: Source, name: str) -> str:
    if place == "axolotl":
        file = PackageFile(*_AXOLOTL, f"axolotl/utils/chat_templates/templates/{name}.jinja")
        return fetch(file).read_text(encoding="utf-8")
    if place == "llama.cpp":
        return (_llama_cpp_templates() / f"{name}.jinja").read_text(encoding="utf-8")
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def _llama_cpp_templates() -> Path:
    """Folder of llama.cpp's templates in the cache. The sdist has 76 MB; pip builds its metadata in about 12 s."""
    name, version = _LLAMA_CPP

    def build(folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:all:", "--quiet", "--no-input"]
        with TemporaryDirectory(dir=folder) as empty:
            command += ["--disable-pip-version-check", "--dest", empty, f"{name}=={version}"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S, check=False)
            assert done.returncode == 0, f"pip's index gives no sdist of {name} {version}: {done.stderr[-1000:]}"
            (sdist,) = Path(empty).glob("*.tar.gz")
            with tarfile.open(sdist) as archive:
                for member in archive:
                    if "/llama.cpp/models/templates/" in member.name and member.name.endswith(".jinja"):
                        text = archive.extractfile(member)
                        assert text is not None
                        (folder / Path(member.name).name).write_bytes(text.read())

    return build_once(cache_root() / "packages" / f"{name}-{version}-templates", build)


_DEEPSEEK_END = "<｜end▁of▁sentence｜>"  # noqa: RUF001
FAMILIES = {
    family.name: family
    for family in (
        Family("llama3", "<|eot_id|>", without="functions reasoning"),
        Family("llama3_1", "<|eot_id|>", ("<|eom_id|>",), without="parallel text reasoning"),
        Family("llama3_2", "<|eot_id|>", without="parallel text reasoning"),
        Family("qwen2_5", without="reasoning"),
        Family("qwen3"),
        Family("qwen3_instruct_2507", without="reasoning"),
        Family("qwen3_5_think"),
        Family("qwen3_5_nothink", without="reasoning"),
        Family("qwen3_8"),
        Family("gemma", "<end_of_turn>", without="functions reasoning system"),
        Family("gemma3", "<end_of_turn>", without="functions reasoning"),
        Family("gemma4_v5", "<turn|>", without="text"),
        Family("phi3", "<|endoftext|>", ("<|end|>",), without="functions reasoning"),
        Family("gptoss", "<|return|>", ("<|endoftext|>",), without="parallel"),
        Family("deepseek_r1_distill", _DEEPSEEK_END, without="functions"),
        Family("deepseekv3", _DEEPSEEK_END, without="functions"),
        Family("glm4moe", "<|endoftext|>", ("<|user|>", "<|observation|>")),
        Family("cohere", "<|END_OF_TURN_TOKEN|>", without="functions reasoning"),
        Family("cohere2", "<|END_OF_TURN_TOKEN|>", without="functions reasoning"),
        Family("lfm2_2_5"),
        Family("nemotron_3_nano"),
    )
}
"""Templates of the installed TRL."""
_CHATML, _LLAMA, _COHERE = "<|im_end|>", "<|eot_id|>", "<|END_OF_TURN_TOKEN|>"
_BY_END: dict[Source, dict[str, dict[str, str]]] = {
    "axolotl": {
        "</s>": {
            "mistral_v1": "functions reasoning",
            "mistral_v2v3": "text reasoning",
            "mistral_v3_tekken": "text reasoning",
            "mistral_v7_tekken": "functions reasoning",
            "deepseek_v2": "functions reasoning",
            "metharme": "functions reasoning",
        },
        _CHATML: {
            "phi_4": "functions",
            "falcon_h1": "calls reasoning",
            "nemotron_h": "functions reasoning",
        },
        "<|end|>": {"phi_35": "functions reasoning"},
        "[|endofturn|]": {"exaone": "functions reasoning", "exaone4": "reasoning"},
        "<end_of_turn>": {"gemma3n": "functions reasoning"},
        "<|eom|>": {"jamba": "reasoning"},
        "<|eot|>": {"llama4": "reasoning"},
        _COHERE: {
            "aya": "functions reasoning",
            "command_a": "functions reasoning",
            "command_a_tool_use": "text reasoning",
        },
        _DEEPSEEK_END: {"deepseek_v3": "functions reasoning"},
    },
    "llama.cpp": {
        "<|end_of_text|>": {
            "ibm-granite-granite-3.3-2B-Instruct": "calls",
            "ibm-granite-granite-4.0": "reasoning",
            "ibm-granite-granite-4.1": "reasoning",
        },
        _CHATML: {
            "HuggingFaceTB-SmolLM3-3B": "functions",
            "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "text reasoning",
            "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "text reasoning",
            "Bielik-11B-v3.0-Instruct": "",
            "Kimi-K2-Instruct": "calls reasoning",
            "Kimi-K2-Thinking": "calls reasoning",
            "moonshotai-Kimi-K2": "reasoning",
            "LFM2-8B-A1B": "calls reasoning",
            "LFM2.5-8B-A1B": "",
            "LFM2.5-Instruct": "calls",
            "MiMo-VL": "reasoning",
            "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": "",
            "Qwen-QwQ-32B": "reasoning",
            "Qwen-Qwen2.5-7B-Instruct": "reasoning",
            "Qwen-Qwen3-0.6B": "",
            "Qwen3-Coder": "reasoning",
            "Qwen3.5-4B": "",
            "StepFun3.5-Flash": "",
            "openbmb-MiniCPM5-1B": "",
        },
        "</s>": {
            "Mistral-Small-3.2-24B-Instruct-2506": "text reasoning",
            "mistralai-Mistral-Nemo-Instruct-2407": "text reasoning",
            "mistralai-Ministral-3-14B-Reasoning-2512": "reasoning",
            "unsloth-mistral-Devstral-Small-2507": "reasoning",
        },
        _LLAMA: {
            "meta-llama-Llama-3.1-8B-Instruct": "parallel text reasoning",
            "meta-llama-Llama-3.2-3B-Instruct": "parallel text reasoning",
            "meta-llama-Llama-3.3-70B-Instruct": "parallel text reasoning",
            "meetkai-functionary-medium-v3.1": "reasoning",
            "meetkai-functionary-medium-v3.2": "reasoning",
        },
        _DEEPSEEK_END: {
            "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "functions",
            "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "functions reasoning",
            "deepseek-ai-DeepSeek-V3.1": "functions reasoning",
            "deepseek-ai-DeepSeek-V3.2": "reasoning",
            "deepseek-ai-DeepSeek-V4": "reasoning",
            "Spark2.5": "",
        },
        "<|end|>": {
            "microsoft-Phi-3.5-mini-instruct": "functions reasoning",
            "unsloth-Apriel-1.5": "reasoning",
            "upstage-Solar-Open-100B": "text reasoning",
        },
        "<end_of_turn>": {"google-gemma-2-2b-it": "functions system reasoning"},
        "<turn|>": {"google-gemma-4-31B-it": "reasoning"},
        "<|user|>": {"GLM-4.6": "", "GLM-4.7-Flash": ""},
        "<|assistant_end|>": {"Apertus-8B-Instruct": "reasoning"},
        "<seed:eos>": {"ByteDance-Seed-OSS": ""},
        "<|message_sep|>": {"GigaChat3.1-10B-A1.8B": "parallel reasoning"},
        "<|end_of_msg|>": {"Kimi-K3": ""},
        "<end_of_sentence>": {"MiniMax-M1": "text reasoning"},
        "[e~[": {"MiniMax-M2": "", "MiniMax-M3": ""},
        "<SPECIAL_12>": {"NVIDIA-Nemotron-Nano-v2": "text reasoning-with-calls"},
        "<|role_end|>": {"inclusionai-ling-3.0-flash": ""},
        "<|eot|>": {"muse-glimmer": "text"},
        "<|return|>": {"openai-gpt-oss-120b": "parallel"},
        "<｜hy_eos:opensource｜>": {"tencent-Hy3": "reasoning"},  # noqa: RUF001
        _COHERE: {
            "Cohere2MoE": "answers text",
            "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "answers text reasoning",
        },
    },
}
"""Package -> end token -> template -> `without` of its family."""
_MORE_EOS = {"<|user|>": ("<|observation|>",)}
PACKAGED = {
    name: Family(name, eos, _MORE_EOS.get(eos, ()), place, without, for_tools="Hermes" in name)
    for place, by_end in _BY_END.items()
    for eos, families in by_end.items()
    for name, without in families.items()
}
"""Templates of packages that a test fetches."""
