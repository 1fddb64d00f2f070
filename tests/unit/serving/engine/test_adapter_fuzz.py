"""Damaged adapter files, made at random: each is refused with an ArtifactError, or it is the adapter that was written.

Whatever is wrong with a file, reading it ends in that error and no other: no crash, no memory by the file's word, and
no adapter in the engine that differs from the one that was published.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graftwork.errors import ArtifactError
from graftwork.serving.engine.engine import NativeEngine
from tests import engines
from tests.tiny import write_tiny_base

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FEW, MANY = 40, 20_000
quick = settings(max_examples=FEW, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
long = settings(max_examples=MANY, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Bench:
    """A tiny engine, one good adapter, and a folder for damaged copies of it."""

    def __init__(self, tmp: Path) -> None:
        base = write_tiny_base(tmp / "base")
        good = engines.write_lora(base, tmp / "good", 1, r=4, target_modules=["q_proj", "v_proj"])
        self.engine = NativeEngine(engines.load_model(base), engines.spec(), "cpu")
        self.weights, self.config = (good / WEIGHTS).read_bytes(), (good / CONFIG).read_bytes()
        self.folder = tmp / "damaged"
        self.folder.mkdir()
        self.digests = {WEIGHTS: _sha256(self.weights), CONFIG: _sha256(self.config)}

    def read(self, weights: bytes, config: bytes, digests: dict[str, str] | None = None) -> bool:
        """Whether the engine takes these files. Anything but ArtifactError is the test's failure."""
        (self.folder / WEIGHTS).write_bytes(weights)
        (self.folder / CONFIG).write_bytes(config)
        try:
            self.engine.check_adapter(self.folder, digests)
        except ArtifactError as error:
            if not (error.problem and error.rule):
                raise
            return False
        return True

    def header(self) -> dict[str, Any]:
        size = struct.unpack("<Q", self.weights[:8])[0]
        tree: dict[str, Any] = json.loads(self.weights[8 : 8 + size])
        return tree

    def with_header(self, tree: object) -> bytes:
        """The same tensor bytes behind another header."""
        size = struct.unpack("<Q", self.weights[:8])[0]
        text = json.dumps(tree).encode()
        return struct.pack("<Q", len(text)) + text + self.weights[8 + size :]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    made = Bench(tmp_path_factory.mktemp("fuzz"))
    assert made.read(made.weights, made.config, made.digests)
    return made


def truncated(bench: Bench, data: st.DataObject) -> None:
    """A file cut anywhere is refused, with a digest and without."""
    cut = data.draw(st.integers(0, len(bench.weights) - 1))
    assert not bench.read(bench.weights[:cut], bench.config)
    cut = data.draw(st.integers(0, len(bench.config) - 1))
    assert not bench.read(bench.weights, bench.config[:cut])


def flipped(bench: Bench, data: st.DataObject) -> None:
    """A flipped bit is never served under the published digest; without one it may be, but nothing breaks."""
    name = data.draw(st.sampled_from([WEIGHTS, CONFIG]))
    content = bytearray(bench.weights if name == WEIGHTS else bench.config)
    place = data.draw(st.integers(0, 8 * len(content) - 1))
    content[place // 8] ^= 1 << place % 8
    files = (bytes(content), bench.config) if name == WEIGHTS else (bench.weights, bytes(content))
    assert not bench.read(*files, bench.digests)
    bench.read(*files)


def noise(bench: Bench, data: st.DataObject) -> None:
    """Bytes that are no safetensors at all, behind any header length."""
    length = data.draw(st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 600)))
    body = data.draw(st.one_of(st.binary(max_size=400), st.just(bench.weights[8:])))
    if (content := struct.pack("<Q", length) + body) != bench.weights:
        assert not bench.read(content, bench.config)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-3, 2**65), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def header(bench: Bench, data: st.DataObject) -> None:
    """One entry of the header replaced: overlapping offsets, other shapes, unknown or integer dtypes, wrong types."""
    tree = bench.header()
    name = data.draw(st.sampled_from(sorted(tree)))
    change = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "entry", "drop", "name"]))
    before = json.dumps(tree)
    if change == "entry":
        tree[name] = data.draw(VALUES)
    elif change == "drop":
        del tree[name]
    elif change == "name":
        tree[data.draw(st.text(max_size=12))] = tree.pop(name)
    elif name != "__metadata__":
        known = {
            "dtype": st.sampled_from(["F64", "F16", "BF16", "I8", "U8", "I64", "BOOL", "F8_E4M3", "f32"]),
            "shape": st.lists(st.integers(0, 2**40), max_size=4),
            "data_offsets": st.lists(st.integers(0, 2 * len(bench.weights)), min_size=2, max_size=2),
        }
        tree[name][change] = data.draw(st.one_of(VALUES, known[change]))
    if name != "__metadata__" and json.dumps(tree) != before:
        assert not bench.read(bench.with_header(tree), bench.config)
    else:
        bench.read(bench.with_header(tree), bench.config)


def config(bench: Bench, data: st.DataObject) -> None:
    """A key of the config replaced by anything: refused, or without effect on what is read."""
    tree = json.loads(bench.config)
    key = data.draw(st.one_of(st.sampled_from(sorted(tree)), st.text(max_size=10)))
    patterns = st.text(alphabet="q_proj.*+?()[]{}|\\\\^$0123,", max_size=12)
    tree[key] = data.draw(st.one_of(VALUES, patterns, st.dictionaries(patterns, st.integers(0, 9), max_size=2)))
    bench.read(bench.weights, json.dumps(tree).encode())


def not_finite(bench: Bench, data: st.DataObject) -> None:
    """One value of the weights is inf or nan."""
    size = struct.unpack("<Q", bench.weights[:8])[0]
    start = 8 + size + 4 * data.draw(st.integers(0, (len(bench.weights) - 8 - size) // 4 - 1))
    bad = data.draw(st.sampled_from([float("inf"), float("-inf"), float("nan")]))
    content = bench.weights[:start] + struct.pack("<f", bad) + bench.weights[start + 4 :]
    assert not bench.read(content, bench.config)


DAMAGE = [truncated, flipped, noise, header, config, not_finite]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_adapter_is_refused_and_nothing_else(
    bench: Bench, damage: Callable[[Bench, st.DataObject], None]
) -> None:
    quick(given(data=st.data())(lambda data: damage(bench, data)))()
    assert bench.read(bench.weights, bench.config, bench.digests)
    assert bench.engine.adapters() == []


@pytest.mark.soak
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_adapter_is_refused_many_times(bench: Bench, damage: Callable[[Bench, st.DataObject], None]) -> None:
    long(given(data=st.data())(lambda data: damage(bench, data)))()


def test_a_file_of_another_kind_is_refused(bench: Bench) -> None:
    """A pickle, an archive, and a folder under the name of the weights."""
    import io
    import pickle

    archive = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, archive)
    for content in (pickle.dumps({"a": 1}), archive.getvalue(), b"", b"{}"):
        assert not bench.read(content, bench.config)
    os.unlink(bench.folder / WEIGHTS)
    (bench.folder / WEIGHTS).mkdir()
    with pytest.raises(ArtifactError, match=WEIGHTS):
        bench.engine.check_adapter(bench.folder)
    (bench.folder / WEIGHTS).rmdir()


@pytest.mark.parametrize(
    "pattern", ["(", "(a+)+$", r"(.*)*x", r".*.*.*.*x", "q" * 2000, r"(?:layers\.\d+\.)+q_proj", "[", "*", "(?P<1>x)"]
)
def test_a_pattern_that_could_run_for_ever_is_not_run(bench: Bench, pattern: str) -> None:
    for key, value in (("target_modules", pattern), ("rank_pattern", {pattern: 4}), ("alpha_pattern", {pattern: 4})):
        tree = json.loads(bench.config)
        tree[key] = value
        assert not bench.read(bench.weights, json.dumps(tree).encode())


@pytest.mark.parametrize(
    "pattern", [r".*\.(q_proj|v_proj)", r"^model\.layers\.[01]\.self_attn\.(q|v)_proj$", ".*[qv]_proj"]
)
def test_the_patterns_that_people_write_are_run(bench: Bench, pattern: str) -> None:
    tree = {**json.loads(bench.config), "target_modules": pattern}
    assert bench.read(bench.weights, json.dumps(tree).encode())


def test_weights_beyond_float16_are_refused_on_such_an_engine(bench: Bench, tmp_path: Path) -> None:
    """They are finite in the file and would be inf in the engine."""
    from safetensors.torch import load_file, save_file

    model = engines.load_model(bench.folder.parent / "base").half()
    engine = NativeEngine(model, engines.spec(), "cpu")
    (tmp_path / WEIGHTS).write_bytes(bench.weights)
    (tmp_path / CONFIG).write_bytes(bench.config)
    engine.check_adapter(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = 1e6
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="float16"):
        engine.check_adapter(tmp_path)
