"""Graftwork: finetune, sweep, serve and honestly compare many task adapters on one quantized base model."""

from pathlib import Path

__version__ = "0.1.0"

# A zip archive of the repository has no links: the four folders are then found at its top level.
if not (Path(__file__).parent / "training").is_dir():
    __path__.append(str(Path(__file__).parents[1]))
