"""Results that ranks exchange: an error of one rank ends all of them, whatever its class."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from graftwork.base.load import resolve
from graftwork.base.source import BaseSpec
from graftwork.errors import RunError, StorageError
from graftwork.training.worker_messages import gather_results
from tests.process_races import ROOT

PROGRAM = """
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from safetensors import safe_open

from graftwork.base.source import BaseSpec
from graftwork.training.loop import resolve_on_all
from graftwork.training.worker_messages import gather_results

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group(
    "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2, timeout=timedelta(seconds=30)
)
try:
    gather_results(lambda: safe_open(folder / "damaged.safetensors", framework="pt") if rank == 0 else None)
except Exception as error:
    print(f"{type(error).__name__}: {error.subject}: {error.problem[:15]}, cause {type(error.__cause__).__name__}")
print(resolve_on_all(BaseSpec(uri=str(folder / "shared"))).folder.name)
os.chdir(folder / str(rank))
try:
    resolve_on_all(BaseSpec(uri="base"))
except Exception as error:
    print(f"{type(error).__name__}: {error.problem}")
dist.destroy_process_group()
"""


def write_bare_base(folder: Path, weights: bytes) -> str:
    """A folder that has what `resolve` reads, and its digest."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(weights)
    return resolve(BaseSpec(uri=str(folder))).digest


def test_ranks_raise_each_others_errors_and_refuse_different_bases(tmp_path: Path) -> None:
    """The same path has other files on the second rank's machine, here its own folder."""
    (tmp_path / "damaged.safetensors").write_bytes(b"x" * 64)
    write_bare_base(tmp_path / "shared", b"s")
    digests = [write_bare_base(tmp_path / str(rank) / "base", f"{rank}".encode()) for rank in (0, 1)]
    ranks = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, str(rank), str(tmp_path)], cwd=ROOT, stdout=-1, text=True)
        for rank in (0, 1)
    ]
    said = [rank.communicate(timeout=120)[0].splitlines() for rank in ranks]
    text = "RunError: worker 0: SafetensorError"
    both = ["shared", f"DifferentBases: sha256 {digests[0]} on worker 0; sha256 {digests[1]} on worker 1"]
    assert said == [[f"{text}, cause SafetensorError", *both], [f"{text}, cause NoneType", *both]]


@pytest.mark.parametrize(
    ("error", "raised"), [(SafetensorError("bad header"), RunError), (OSError(5, "disk"), StorageError)]
)
def test_the_original_error_is_the_cause(error: Exception, raised: type[Exception]) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(raised) as caught:
        gather_results(fail)
    assert caught.value.__cause__ is error
