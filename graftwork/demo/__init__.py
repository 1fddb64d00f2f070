"""The main job, end to end: plan, tune, train, serve with a swap under load, compare, report."""
