"""Results that ranks exchange: an error of one rank ends all of them, whatever its class."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from graftwork.errors import RunError, StorageError
from graftwork.training.worker_messages import gather_results
from tests.process_races import ROOT

PROGRAM = """
import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from safetensors import safe_open

from graftwork.training.worker_messages import gather_results

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group(
    "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2, timeout=timedelta(seconds=30)
)
try:
    gather_results(lambda: safe_open(folder / "damaged.safetensors", framework="pt") if rank == 0 else None)
except Exception as error:
    print(f"{type(error).__name__}: {error.subject}: {error.problem[:15]}, cause {type(error.__cause__).__name__}")
dist.destroy_process_group()
"""


def test_an_error_of_any_class_is_raised_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "damaged.safetensors").write_bytes(b"x" * 64)
    ranks = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, str(rank), str(tmp_path)], cwd=ROOT, stdout=-1, text=True)
        for rank in (0, 1)
    ]
    said = [rank.communicate(timeout=120)[0].strip() for rank in ranks]
    text = "RunError: worker 0: SafetensorError"
    assert said == [f"{text}, cause SafetensorError", f"{text}, cause NoneType"]


@pytest.mark.parametrize(
    ("error", "raised"), [(SafetensorError("bad header"), RunError), (OSError(5, "disk"), StorageError)]
)
def test_the_original_error_is_the_cause(error: Exception, raised: type[Exception]) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(raised) as caught:
        gather_results(fail)
    assert caught.value.__cause__ is error
