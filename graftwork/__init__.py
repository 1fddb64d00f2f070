"""Graftwork: finetune, sweep, serve and honestly compare many task adapters on one quantized base model."""

from pathlib import Path

__version__ = "0.1.0"

# Links lost (a zip archive, a checkout without symlinks)? Then the four folders stand beside this package.
if not (Path(__file__).parent / "training").is_dir():
    __path__.append(str(Path(__file__).parent.parent))
