"""The CPU's kernels: compiled once, for this machine; attention of decoding tokens as the formula says."""

import random
import shutil
from pathlib import Path

import pytest
import torch

from graftwork import environment
from graftwork.serving.engine.cpu import kernels
from graftwork.serving.engine.cpu.kernels import DecodeRows, Kernels, fits, kernels_for
from graftwork.serving.engine.kv_cache import KvRow, KvShape, KvStore

MAX_LEN = 512
needs_kernels = pytest.mark.skipif(kernels_for(torch.float32) is None, reason="needs a C compiler and AVX-512")
wide = pytest.mark.skipif(
    "avx512f" not in environment.flags() or shutil.which("cc") is None, reason="needs AVX-512 and cc"
)


@pytest.fixture
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


@pytest.mark.usefixtures("empty_cache")
def test_a_cpu_without_wide_vectors_has_none() -> None:
    with pytest.raises(kernels.NoKernels, match="AVX-512"):
        kernels.load(flags={"avx2"})


@pytest.mark.usefixtures("empty_cache")
def test_there_is_none_for_other_types() -> None:
    assert kernels.kernels_for(torch.float16) is None


def kernels_of(dtype: torch.dtype) -> Kernels:
    found = kernels_for(dtype)
    assert found is not None
    return found


def expected(
    query_HD: torch.Tensor, keys_KSD: torch.Tensor, values_KSD: torch.Tensor, window: int | None, softcap: float | None
) -> torch.Tensor:
    """In float64, head by head."""
    groups = len(query_HD) // len(keys_KSD)
    keys, values = (
        part.double().repeat_interleave(groups, 0)[:, -(window or MAX_LEN) :] for part in (keys_KSD, values_KSD)
    )
    scores = torch.einsum("hd,hsd->hs", query_HD.double(), keys) * 0.2
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return torch.einsum("hs,hsd->hd", scores.softmax(-1), values)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "window", "softcap"),
    [
        (9, 3, 64, None, None),
        (4, 4, 16, None, None),
        (8, 1, 128, 40, None),
        (20, 1, 32, None, 5.0),
        (2, 2, 256, 100, 8.0),
    ],
)
def test_rows_attend_as_the_formula_says(
    heads: int, kv_heads: int, size: int, window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(heads)
    kv = KvStore([KvShape(kv_heads, size)], 8192, MAX_LEN, dtype, torch.device("cpu"))
    lengths = [1, 2, 15, 16, 17, 63, 64, 65, 128, 129, 300, MAX_LEN]
    random.Random(0).shuffle(lengths)
    rows = [kv.allocate(length) for length in lengths]
    assert all(row is not None for row in rows)
    placed = [row for row in rows if row is not None]
    for row, length in zip(placed, lengths, strict=True):
        for view in kv.row_view(row, 0):
            view.copy_(torch.full_like(view, 1e4))  # what lies behind a row must not be looked at
            view[:, :length] = torch.randn(kv_heads, length, size).to(dtype)
    query, key, value = (_fresh(len(rows), count, size, dtype) for count in (heads, kv_heads, kv_heads))
    out = torch.empty(len(rows), heads, size, dtype=dtype)
    step = DecodeRows(kernels_of(dtype), kv, placed, lengths)
    assert step.takes(0, query, value)
    for writes in (False, True):
        step.attend(0, query, (key, value), out, writes=writes, scale=0.2, window=window, softcap=softcap)
        for number, (row, length) in enumerate(zip(placed, lengths, strict=True)):
            keys, values = kv.row_view(row, 0)
            if writes:
                assert torch.equal(keys[:, length - 1], key[number])
                assert torch.equal(values[:, length - 1], value[number])
            right = expected(query[number], keys[:, :length], values[:, :length], window, softcap)
            close = 2e-6 if dtype == torch.float32 else 2**-8
            torch.testing.assert_close(out[number].double(), right, rtol=close, atol=4 * close, msg=f"row of {length}")
            assert bool((keys[:, length:] == 1e4).all()), "nothing is written behind a row"


def _fresh(count: int, heads: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """[count, heads, size], its heads further apart than their values, as the parts of one projection are."""
    return torch.randn(count, heads, 2 * size).to(dtype)[..., :size]


@needs_kernels
def test_scores_far_apart_and_far_off_are_no_nan() -> None:
    kv = KvStore([KvShape(1, 16)], 1024, 128, torch.float32, torch.device("cpu"))
    row = kv.allocate(100)
    assert isinstance(row, KvRow)
    keys, values = kv.row_view(row, 0)
    keys[0, :100] = torch.linspace(-1e4, 1e4, 100)[:, None]
    values[0, :100] = torch.arange(100.0)[:, None]
    query, out = torch.ones(1, 1, 16), torch.empty(1, 1, 16)
    DecodeRows(kernels_of(torch.float32), kv, [row], [100]).attend(
        0, query, (query, query), out, writes=False, scale=1.0, window=None, softcap=None
    )
    torch.testing.assert_close(out, torch.full_like(out, 99.0))


def test_heads_that_are_no_whole_vectors_stay_with_pytorch() -> None:
    assert [size for size in (16, 20, 64, 80, 128, 256, 320) if fits(size)] == [16, 64, 80, 128, 256]
