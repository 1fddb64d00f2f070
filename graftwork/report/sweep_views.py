"""Sentences under the sweep charts, and rows of the sweep tables."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from graftwork.report import format as words
from graftwork.report.charts import Mark, Scale, interval_track
from graftwork.report.sweep_charts import loss, short, timeline, title, trials_above_axis
from graftwork.report.sweep_schema import (
    FinalistRecord,
    FinalsRecord,
    FrontRecord,
    HeatRecord,
    ImportanceRecord,
    RateRow,
    RatesRecord,
    StopsRecord,
    SweepRecord,
    SweepState,
    SweepTrial,
)

SHOWN = 20
"""Rows of the table of trials before it is folded."""


def sentence(sweep: SweepRecord) -> str:
    """Return the verdict of the sweep."""
    best = sweep.best
    if best is None:
        return _no_choice_sentence(sweep)
    said = f"Best: {_values(best)}, held-out loss {loss(best.last_loss)} at step {best.last_step}"
    if sweep.finals is not None:
        return f"Best: {_values(best)}, {_finals_clause(sweep.finals, best.id)}."
    searched = [trial for trial in sweep.trials if trial.state == "finished" and trial.repeat_of is None]
    ended = sorted(trial.losses[-1][1] for trial in searched if trial.last_step == best.last_step)
    if len(ended) < 2:
        return f"{said}; no other trial ran to its end."
    return (
        f"{said}, the next of {len(ended)} that ran to their end {loss(ended[1])}. One run each: that cannot tell a "
        "better point from a luckier seed."
    )


def _finals_clause(finals: FinalsRecord, chosen_id: str) -> str:
    """Return the finals' result for the chosen trial; the verdict below has all figures."""
    chosen = next(one for one in finals.finalists if one.id == chosen_id)
    others = [one for one in finals.finalists if one is not chosen]
    beaten = sum(one.beaten for one in others)
    tied = sum(one.low is None or one.low <= 0 for one in others if not one.beaten)
    ahead = len(others) - beaten - tied
    mean = f"mean held-out loss {loss(chosen.mean)} over {len(chosen.losses)} seeds"
    parts = [f"told apart from {beaten} of {len(others)} other finalists"] if beaten else []
    parts += [f"not for certain from {ahead}"] if ahead else []
    parts += [f"tied with {tied}, and taken by what it costs"] if tied else []
    return f"{mean}: {'; '.join(parts)}"


def _no_choice_sentence(sweep: SweepRecord) -> str:
    counts = Counter(trial.state for trial in sweep.trials)
    states = ", ".join(f"{count} {state}" for state, count in counts.items()) or "no trial was started"
    seen = [trial for trial in sweep.trials if trial.losses and trial.state != "failed"]
    leader = min(seen, key=lambda trial: (-trial.last_step, trial.last_loss or math.inf), default=None)
    so_far = f" Best so far: {title(leader)}." if leader else ""
    if sweep.state == "interrupted":
        return f"Interrupted before its choice: {states}.{so_far} The same command goes on."
    return f"No trial was chosen: {states}.{so_far}"


ENDS: Mapping[SweepState, str] = {
    "finished": "ran to their end",
    "stopped": "stopped early",
    "failed": "failed",
    "running": "were running",
    "pending": "not started",
}


def state_words(sweep: SweepRecord) -> str:
    """Return the count of trials, their ends, and their time."""
    counts = Counter(trial.state for trial in sweep.trials)
    parts = [f"{counts[state]} {word}" for state, word in ENDS.items() if counts[state]]
    taken = sum(map(sweep.took_s, sweep.trials))
    each, device = (sweep.gpus, "GPU") if sweep.gpus else (sweep.cpus, "core")
    cost = f"{words.seconds(sweep.wall_s)} in all, " if sweep.wall_s else ""
    return (
        f"{len(sweep.trials)} trials: {', '.join(parts) or 'none'}. "
        f"{cost}{words.number(taken * each / 3600)} {device} hours of training."
    )


def timeline_words(sweep: SweepRecord) -> str:
    """Return the utilisation of the time."""
    found = timeline(sweep)
    if found is None:
        return ""
    left = f" Not shown, as their time is not known: {found.left_out}." if found.left_out else ""
    return (
        f"{found.lanes} at a time at most; {words.percent(found.idle)} of that room went to the starts of processes, "
        f"to waiting and to the end, when fewer are left.{left}"
    )


def curves_words(sweep: SweepRecord) -> str:
    """From where on the chosen trial led, and how many curves are not in the picture."""
    out, ahead = trials_above_axis(sweep), _leading_since(sweep)
    lead = "No trial was chosen" if sweep.best is None else "The chosen trial was not the lowest at its last step"
    if ahead is not None:
        lead = f"The chosen trial had the lowest loss from step {ahead} on"
    return f"{lead}{f'; {out} end above the picture or have no loss' if out else ''}."


def _leading_since(sweep: SweepRecord) -> int | None:
    """The report from which on no trial had a lower loss than the chosen one."""
    first = None
    for step, value in reversed(sweep.best.losses if sweep.best else ()):
        if any((there := other.loss_at(step)) is not None and there < value for other in sweep.trials):
            break
        first = step
    return first


def importance_words(found: ImportanceRecord) -> str:
    """Return the most important key, and whether the trials separate it from the next."""
    if not found.keys:
        return f"Nothing can be told: {found.silent}."
    first, *others = found.keys
    rest = "more than any other" if first.low > others[0].high else f"not told apart from {short(others[0].key)}"
    predicts = found.predicts or 0.0
    weak = f" The keys explain little here ({words.percent(predicts)})." if predicts < 0.4 else ""
    return (
        f"Of what the keys explain of the losses, {short(first.key)} accounts for {words.percent(first.value)} "
        f"{words.percents(first.low, first.high)}, {rest}.{weak}"
    )


def heat_words(heat: HeatRecord) -> str:
    """The claim on the user's own data, for two numeric keys."""
    return "The lowest loss of each pair." if heat.rates is None else rates_words(heat.rates)


def rates_words(found: RatesRecord) -> str:
    """Return whether the best value of the columns moves with the rows."""
    row, column = short(found.row_key), short(found.column_key)
    said = {
        "hardly moves": f"The best {column} hardly moves with {row} here",
        "moves": f"The best {column} moves with {row} here",
        "can't be told": f"Whether the best {column} moves with {row} can't be told here",
    }[found.verdict]
    best = ", ".join(f"{one.best:.2g}{'*' if one.edge else ''}" for one in found.rows)
    edge = " (* at an edge of what was tried: the best may lie beyond)" if any(one.edge for one in found.rows) else ""
    shared = ""
    if found.shared is not None and found.shared_costs is not None:
        costs = f"costs {loss(found.shared_costs)} of loss at most" if found.shared_costs > 0 else "is best for each"
        shared = f" One {column} for all, {found.shared:.2g}, {costs}."
    return (
        f"{said}: {best} for {row} {', '.join(one.row for one in found.rows)} at step {found.step}, a factor of "
        f"{found.moves_by:.3g} where the grid's step is {found.grid_step:.3g}{edge}.{shared}"
    )


def rate_words(row: RateRow) -> str:
    """`0.004 [0.0028, 0.0057]`."""
    edge = {"low": " or lower", "high": " or higher", "": ""}[row.edge]
    return f"{row.best:.3g} [{row.low:.2g}, {row.high:.2g}]{edge}"


def stops_words(found: StopsRecord) -> str:
    """Return the savings of early stops and their possible loss."""
    share = words.percent(found.saved_steps / found.all_steps) if found.all_steps else words.NONE
    time = f", about {words.seconds(found.saved_s)} of training" if found.saved_s else ""
    trials = "1 trial was" if found.stopped == 1 else f"{found.stopped} trials were"
    return (
        f"{trials} stopped before {words.count(found.saved_steps)} of "
        f"{words.count(found.all_steps)} steps ({share}{time}). {_lost_sentence(found)}"
    )


def _lost_sentence(found: StopsRecord) -> str:
    n = max((one.n for one in found.closest), default=0)
    if n < 3:
        others = "1 finished trial" if n == 1 else f"{n} finished trials"
        return (
            f"The loss by early stops is unknown: only {others} next to the winner show how far a trial can catch up."
        )
    one = found.closest[0]
    if not one.caught_up:
        return (
            f"None of {n} other finished trials caught up on the winner by as much as any stopped one lacked, which "
            f"leaves a chance of up to 1 in {n + 1} for each, were it like them."
        )
    return (
        f"The closest, {one.id}, lacked {loss(one.gap)} at step {one.step}: {one.caught_up} of {one.n} finished trials "
        f"caught up by that much. Could none do better than those, at most {loss(found.regret)} of loss was lost."
    )


def finals_words(found: FinalsRecord) -> str:
    """Return the decision of the finals and its test."""
    seeds = max(len(one.losses) for one in found.finalists)
    rule = f"{len(found.finalists)} finalists, {seeds} seeds each, Student's t by seed, Holm, alpha={found.alpha:g}"
    return f"{found.verdict[:1].upper()}{found.verdict[1:]} ({rule})."


def finals_tracks(found: FinalsRecord) -> list[tuple[FinalistRecord, Markup | None]]:
    """Each finalist's distance from the lowest mean with its interval, zero marked; none for the lowest itself."""
    bounds = [abs(bound) for one in found.finalists for bound in (one.low, one.high) if bound is not None]
    scale = Scale(-max(bounds, default=1.0), max(bounds, default=1.0))
    return [(one, _distance(one, scale)) for one in found.finalists]


def _distance(one: FinalistRecord, scale: Scale) -> Markup | None:
    if one.difference is None or one.low is None or one.high is None:
        return None
    title = f"{signed_loss(one.difference)} [{signed_loss(one.low)}, {signed_loss(one.high)}]"
    return interval_track(Mark(one.difference, one.low, one.high, "latency", title), scale, reference=0.0)


def signed_loss(value: float) -> str:
    """A difference of losses with its sign."""
    return f"{value:+.3f}".replace("-", "−")


def front_words(front: FrontRecord) -> str:
    """Return the count of trials on the Pareto front."""
    best = sum(point.on_front for point in front.points)
    return (
        f"{best} of {len(front.points)} trials are on the front: for each of the others some trial is at least as good "
        f"in {', '.join(front.objectives)} and better in one."
    )


def table(sweep: SweepRecord) -> tuple[Sequence[SweepTrial], Sequence[SweepTrial]]:
    """Trials by how far they came and how good they were: those shown, and those folded away."""
    ordered = sorted(sweep.trials, key=lambda trial: _sort_key(trial, sweep.best_id))
    shown = len(ordered) if len(ordered) <= SHOWN + 5 else SHOWN
    return ordered[:shown], ordered[shown:]


def _sort_key(trial: SweepTrial, best_id: str | None) -> tuple[bool, bool, int, float]:
    stood = trial.last_loss if trial.last_loss is not None else math.inf
    return trial.id != best_id, trial.state == "failed", -trial.last_step, stood


def remarks(trial: SweepTrial) -> str:
    """Its error and its notes."""
    repeat = f"repeats {trial.repeat_of} with another seed" if trial.repeat_of else ""
    return "; ".join(part for part in (repeat, trial.error or "", *trial.notes) if part)


def _values(trial: SweepTrial) -> str:
    return ", ".join(f"{short(key)} {words.format_setting(value)}" for key, value in trial.values.items())
