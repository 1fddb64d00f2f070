"""Fixtures of the unit tests."""

import os
from pathlib import Path

import pytest

CARDS = "NVIDIA H100 80GB HBM3, 81559\nTesla T4, 15360\nNVIDIA H100 80GB HBM3, 81559\n"


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A driver's `nvidia-smi` first on the PATH, which lists three GPUs."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nprintf '{CARDS}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # another test of this process may have a Ray
    return program
