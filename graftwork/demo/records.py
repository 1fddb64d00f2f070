"""What the stages return, as the records that the report shows."""

from graftwork.data import read_rows
from graftwork.demo.specs import DemoSpecs
from graftwork.report.sweep_records import SweepRecord
from graftwork.tuning.page import SweepEnd, sweep_record
from graftwork.tuning.run import TuneReport
from graftwork.tuning.spec import TuneSpec


def base_name(uri: str) -> str:
    """The last part of a base's URI, without a file ending."""
    return uri.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")


def build_data(specs: DemoSpecs) -> str:
    """Read every dataset once (recipes are built on first use). Returns how many rows each gives."""
    uris = dict.fromkeys([*(spec.data.train for spec in specs.train), specs.compare.eval])
    return ", ".join(f"{len(read_rows(uri, need='train'))} rows in {uri.removeprefix('recipe://')}" for uri in uris)


def tune_record(found: TuneReport, spec: TuneSpec) -> SweepRecord:
    """The sweep as on its own page."""
    ended = SweepEnd("finished", found.eval_rows, found.sampler, found.wall_s, found.choice, found.reused)
    return sweep_record(spec, found.trials, ended)
