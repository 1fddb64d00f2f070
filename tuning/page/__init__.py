"""The page of a sweep: what its trials say, as records, and the files in its folder."""

from graftwork.tuning.page.record import SweepEnd, sweep_record
from graftwork.tuning.page.write import write_page

__all__ = ["SweepEnd", "sweep_record", "write_page"]
