"""GGUF to Hugging Face form: `python -m graftwork.base_convert FILE.gguf FOLDER`.

A process of its own, because reading the GGUF takes over a gigabyte that Python does not give back. Prints one JSON
line a stage, `{"share": 0.1, "doing": "..."}`, so that its starter can show progress.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from graftwork.errors import BaseModelError


def convert_gguf(gguf: Path, folder: Path, on_progress: Callable[[str, float], None] | None = None) -> None:
    """Fill `folder` with config, fp32 safetensors, tokenizer and chat template. Raises BaseModelError."""
    command = [sys.executable, "-P", "-m", "graftwork.base_convert", str(gguf), str(folder)]
    paths = [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if on_progress and line.startswith('{"share"'):
                stage = json.loads(line)
                on_progress(stage["doing"], stage["share"])
        process.wait()
    finally:
        process.kill()  # Ctrl-C here must not leave it running; no effect on an ended process
        process.wait()
    if process.returncode:
        said = [line for line in lines if line and not line.startswith("{")][-1:]
        raise BaseModelError(
            f"convert {gguf.name}", f"it failed: {' '.join(said)[:400] or f'exit code {process.returncode}'}",
            "a GGUF base is converted once by transformers (GgufConfig(dequantize=True))",
            "check that its architecture is one that transformers reads from GGUF, and that disk and memory suffice",
        )  # fmt: skip


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _say("reading the tokenizer", 0.05)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    _say("dequantizing the weights", 0.25)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    _say("writing safetensors", 0.95)
    model.save_pretrained(folder)


def _say(doing: str, share: float) -> None:
    print(json.dumps({"share": share, "doing": doing}), flush=True)


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
