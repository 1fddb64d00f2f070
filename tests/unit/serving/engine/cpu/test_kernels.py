"""Compiling the CPU's kernels: once, for this machine; and what is said where that cannot be."""

import shutil
from pathlib import Path

import pytest
import torch

from graftwork import environment
from graftwork.serving.engine.cpu import kernels

wide = pytest.mark.skipif(
    "avx512f" not in environment.flags() or shutil.which("cc") is None, reason="needs AVX-512 and cc"
)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path))
    return tmp_path


@wide
def test_they_are_compiled_once_and_kept(empty_cache: Path) -> None:
    kernels.load()
    (made,) = (empty_cache / "kernels").glob("*/kernels.so")
    written = made.stat().st_mtime_ns
    kernels.load()
    assert [(path, path.stat().st_mtime_ns) for path in (empty_cache / "kernels").glob("*/kernels.so")] == [
        (made, written)
    ]


@wide
@pytest.mark.parametrize(
    ("compiler", "said"),
    [("no-such-compiler", "No such file"), ("false", "false failed"), ("cc --no-such-option", "no-such-option")],
)
def test_a_compiler_that_fails_is_named_with_what_it_said(empty_cache: Path, compiler: str, said: str) -> None:
    with pytest.raises(kernels.NoKernels, match=said):
        kernels.load(compiler)
    assert not list((empty_cache / "kernels").glob("*/kernels.so")), "nothing half made is left"


@wide
def test_a_library_that_cannot_be_loaded_is_no_end(empty_cache: Path) -> None:
    compiler = empty_cache / "cc"
    compiler.write_text('#!/bin/sh\nfor last; do :; done\necho nonsense > "$last"\n', encoding="utf-8")
    compiler.chmod(0o755)
    with pytest.raises(kernels.NoKernels, match=r"kernels\.so"):
        kernels.load(str(compiler))


def test_a_cpu_without_wide_vectors_has_none() -> None:
    with pytest.raises(kernels.NoKernels, match="AVX-512"):
        kernels.load(flags={"avx2"})


def test_there_is_none_for_other_types() -> None:
    assert kernels.kernels_for(torch.float16) is None
