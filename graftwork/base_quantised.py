"""An nf4 base kept quantised in the cache: made once, then read instead of quantised in every process.

Bit for bit what quantising at load gives (tests/unit/test_base_quantised.py). SmolLM2-135M: 2.5 of a process' first
CPU seconds went into bitsandbytes' quantiser on a CPU. A GPU quantises faster than a file is read, and keeps doing so.
"""

import hashlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from graftwork import base_source
from graftwork.build_once import build_once
from graftwork.config import canonical_json
from graftwork.errors import BaseModelError
from graftwork.storage import cache_root

WORTH_BYTES = 64 * 2**20
"""Weights of a base from which on it is kept: smaller ones are quantised in no time."""
_DIGEST = "digest.txt"


def worth_keeping(base: Path) -> bool:
    """Whether quantising the weights in folder `base` takes longer than a look into the cache."""
    return sum(path.stat().st_size for path in base.glob("*.safetensors")) >= WORTH_BYTES


def cache_quantised(base: Path, settings: dict[str, Any], quantise: Callable[[], Any]) -> Path:
    """Folder in Hugging Face form of the base in folder `base`, quantised with `settings` by `quantise()`: a model.

    Raises BaseModelError where the folder's digest is no longer the one it was made with, or the disk is full.
    """
    what = {
        "base": base_source.base_digest(base),
        "settings": settings,
        "libraries": [version(name) for name in ("bitsandbytes", "transformers")],
    }
    name = hashlib.sha256(canonical_json(what).encode()).hexdigest()

    def build(empty: Path) -> None:
        model = quantise()
        # transformers 5.23 writes on rank 0 of a process group alone; whichever rank comes first builds this folder
        model.should_save_on_this_rank = lambda is_main_process: is_main_process
        model.save_pretrained(empty)
        (empty / _DIGEST).write_text(base_source.base_digest(empty), encoding="utf-8")

    try:
        folder = build_once(cache_root() / "quantised" / name, build)
        found, wanted = base_source.base_digest(folder), (folder / _DIGEST).read_text(encoding="utf-8")
    except OSError as error:
        raise BaseModelError(
            f"quantised form of {base}", f"a file cannot be read or written ({error})",
            "it is kept in the cache, $GRAFTWORK_CACHE or ~/.cache/graftwork",
            "free disk space, or set GRAFTWORK_CACHE to another folder",
        ) from error  # fmt: skip
    if found != wanted:
        raise BaseModelError(
            f"quantised form of {base}", f"{folder} has sha256 {found}, made with {wanted}",
            "a kept base is used only as it was made", f"delete {folder}: it is made again",
        )  # fmt: skip
    return folder
