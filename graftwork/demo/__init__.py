"""The main job, end to end: plan, tune, train, serve with a swap under load, compare, report."""

from graftwork.demo.job import DemoReport, run_demo

__all__ = ["DemoReport", "run_demo"]
