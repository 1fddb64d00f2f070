"""What a run gained and lost: measured on a tiny model, in this process."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats
from statsmodels.stats.proportion import proportion_confint

from graftwork import environment
from graftwork.base import load as base_model
from graftwork.cli.render import show_outcomes
from graftwork.errors import ConfigError, DataError
from graftwork.metrics import CHOICE, NATS
from graftwork.report import ReportInput, render_html
from graftwork.report.evaluation_schema import Change, Level, OutcomesReport, PairedTest
from graftwork.report.evaluation_views import format_count
from graftwork.stats import Floats
from graftwork.training.evaluation import items as instructions
from graftwork.training.evaluation import report as record
from graftwork.training.evaluation.questions import Probe, probes_of
from graftwork.training.evaluation.rebase import TaskScores, curve_report, curve_specs
from graftwork.training.evaluation.report import level, outcomes_report, paired
from graftwork.training.evaluation.run import answers
from graftwork.training.evaluation.spec import Item, ItemGroup, ItemOutput, shares
from graftwork.training.loop import run_steps
from graftwork.training.report import TrainReport, sentence, train_run
from graftwork.training.run import ResolvedRun, _publish_result
from graftwork.training.spec import TrainSpec
from graftwork.training.worker_messages import TrainJob, read_steps
from tests.training import pair_task, task

CHOICES: list[dict[str, Any]] = [
    {
        "id": f"q{n}",
        "messages": [{"role": "user", "content": f"Which is {n}?"}],
        "doc_id": f"d{n // 4}",
        "condition": "ambig" if n % 2 else "disambig",
        "gold": {"choices": ["red", "a long blue one", "none"], "right": n % 3, "signs": [1, -1, 0]},
    }
    for n in range(8)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outcomes")


@pytest.fixture(scope="module")
def spec(folder: Path) -> TrainSpec:
    """All parts, on small data of our own."""
    questions = folder / "choices.jsonl"
    questions.write_text("".join(json.dumps(one) + "\n" for one in CHOICES), encoding="utf-8")
    fair = {"eval": str(questions), "rows": 4}
    suite = {"text": str(questions), "text_rows": 6, "choices": str(questions), "choice_rows": 8, "max_new_tokens": 8}
    asked = {
        "task": {"rows": 8, "max_new_tokens": 12},
        "retention": suite,
        "fairness": fair,
    }
    return task(folder, outcomes=asked, **{"optim.epochs": 1})


@pytest.fixture(scope="module")
def measured(spec: TrainSpec) -> tuple[ResolvedRun, dict[str, record.PartOutcome]]:
    """A run trained and measured."""
    run = ResolvedRun.resolve(spec)
    run_steps(TrainJob(run.spec, run.data, run.paths, parts=tuple(one.part for one in run.probes)), lambda _: True)
    return run, record.read_parts(run.paths)


def loaded(spec: TrainSpec) -> Any:
    return base_model.load(base_model.resolve(spec.base), spec.quant, device="cpu", purpose="train").model


def test_the_base_is_told_from_what_training_made_of_it(
    measured: tuple[ResolvedRun, dict[str, record.PartOutcome]],
) -> None:
    run, parts = measured
    assert set(parts) == {"task", "text", "choices", "instructions", "fairness", "pairs"}
    model = loaded(run.spec)
    template = base_model.template(run.base)
    for probe in run.probes:
        again = answers(model, probe.part, range(len(probe.part.items)), template)
        for said, kept in zip(again, parts[probe.part.name].before, strict=True):
            assert said.text == kept.text
            assert said.logprobs == pytest.approx(kept.logprobs, abs=1e-4)
    was, became = (np.mean([one.logprobs[0] for one in side]) for side in (parts["task"].before, parts["task"].after))
    assert became > was + 1, "nats over the whole of an answer of two to four tokens"


def test_likelihoods_and_answers_are_those_of_plain_transformers(spec: TrainSpec) -> None:
    model, template = loaded(spec), base_model.template(base_model.resolve(spec.base))
    ids = [template.encode(text) for text in ("Name a colour", "The quick brown fox jumps", "Kunming")]
    items = tuple(Item(str(n), tuple(one), (tuple(ids[n - 1]), tuple(ids[n - 2])), 5) for n, one in enumerate(ids))
    said = answers(model, ItemGroup("mixed", items, tuple(template.stop_ids), template.pad_id), [2, 0, 1], template)
    for one, item in zip(said, (items[2], items[0], items[1]), strict=True):
        for got, continuation in zip(one.logprobs, item.continuations, strict=True):
            whole = torch.tensor([[*item.prompt, *continuation]])
            with torch.no_grad():
                logs = model(whole).logits.float().log_softmax(-1)[0]
            places = range(len(item.prompt) - 1, whole.shape[1] - 1)
            wanted = sum(float(logs[at, int(whole[0, at + 1])]) for at in places)
            assert got == pytest.approx(wanted, abs=1e-3)
        ids_1T = torch.tensor([item.prompt])
        with torch.no_grad():
            for _ in range(5):
                best = model(ids_1T).logits[0, -1].argmax()
                ids_1T = torch.cat([ids_1T, best[None, None]], dim=1)
        written = ids_1T[0, len(item.prompt) :].tolist()
        end = next((n for n, token in enumerate(written) if token in template.stop_ids), 5)
        assert one.text == template.decode(written[:end]).strip()


def test_a_finished_run_is_measured_later_and_nothing_is_asked_twice(
    measured: tuple[ResolvedRun, dict[str, record.PartOutcome]],
) -> None:
    run, parts = measured
    assert record.missing(run.paths, [one.part for one in run.probes]) == ()
    more = ResolvedRun.resolve(run.spec.with_({"outcomes.task.rows": 4}))
    assert more.paths.run_id == run.paths.run_id
    due = record.missing(more.paths, [one.part for one in more.probes])
    assert [one.name for one in due] == ["task"]
    result = run_steps(TrainJob(more.spec, more.data, more.paths, parts=due), lambda _: True)
    again = record.read_parts(more.paths)
    assert result.steps == 6
    assert again["choices"] == parts["choices"]
    assert [one.text for one in again["task"].after] == [one.text for one in parts["task"].after[:4]]
    for one, before in zip(again["task"].after, parts["task"].after[:4], strict=True):
        assert one.logprobs == pytest.approx(before.logprobs, abs=1e-4)  # from the checkpoint, as from memory


def test_the_report_pairs_before_and_after(measured: tuple[ResolvedRun, dict[str, record.PartOutcome]]) -> None:
    run, parts = measured
    report = outcomes_report(run.spec, run.probes, parts)
    found = {(one.part, one.group, one.metric): one for one in report.changes}
    nats = found["task", "", "nats"]
    assert nats.after.value < nats.before.value
    assert nats.test.value == pytest.approx(nats.after.value - nats.before.value)
    assert nats.verdict is None
    assert {(group, metric) for part, group, metric in found if part == "fairness"} == {
        (group, metric) for group in ("ambig", "disambig") for metric in ("bias", "choice")
    }
    assert found["fairness", "ambig", "bias"].test.test == "cluster-sign-flip"
    assert report.family == sum(one.verdict is not None for one in report.changes)


def test_intervals_and_tests_are_those_of_scipy() -> None:
    chance = np.random.default_rng(5)
    before, after = (chance.binomial(1, share, 60).astype(float) for share in (0.4, 0.6))
    units = [str(n) for n in range(60)]
    test = paired(after, before, CHOICE, units, 0.05, seed=0)
    wins, losses = int(np.sum(after > before)), int(np.sum(after < before))
    assert test.p_value == pytest.approx(scipy_stats.binomtest(wins, wins + losses).pvalue)
    nats = paired(4 * after + chance.normal(0, 0.5, 60), before, NATS, units, 0.05, seed=0)
    gap = nats.value
    assert nats.low < gap < nats.high
    assert nats.high > 1, "a difference of nats may pass 1"
    assert level(before, CHOICE, units, 0.05, 0).low == pytest.approx(
        scipy_stats.binomtest(int(before.sum()), 60).proportion_ci(method="wilson").low
    )
    clustered = paired(after, before, CHOICE, [str(n // 6) for n in range(60)], 0.05, seed=0)
    assert (clustered.n, clustered.questions, clustered.interval) == (10, 60, "cluster-bca")


def test_ranks_share_all_items_and_their_cost() -> None:
    items = [Item(str(n), (1,) * (1 + n % 7), ((2,),) * (n % 3), write=8 * (n % 2)) for n in range(23)]
    dealt = [shares(items, rank, 3) for rank in range(3)]
    assert sorted(place for one in dealt for place in one) == list(range(23))
    costs = [sum(items[place].tokens for place in one) for one in dealt]
    assert max(costs) - min(costs) <= max(item.tokens for item in items)


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("02-one-word", "Apple", "An apple"),
        ("04-three-words", "Vast, blue, calm.", "It is blue and calm."),
        ("10-lower", "the rain falls.", "The rain falls."),
        ("12-upper", "ICE", "Ice"),
        ("14-without-e", "Black", "Red"),
        ("22-json", '{"name": "Ann"}', '```json\n{"name": "Ann"}\n```'),
        ("24-list", "leek\ncarrot\n\nbean", "Here are three:\nleek\ncarrot\nbean"),
        ("26-numbered", "1. red\n2. blue\n3. green", "red\nblue\ngreen"),
        ("20-ends", "How was it?", "How was it? Tell me."),
        ("28-repeat", "yellow yellow.", "yellow"),
    ],
)
def test_each_rule_holds_the_answer_it_asks_for(name: str, right: str, wrong: str) -> None:
    rule = next(one for one in instructions.INSTRUCTIONS if one.id == name)
    assert rule.follows(right)
    assert not rule.follows(wrong)


def test_no_rule_is_kept_by_silence_and_all_differ() -> None:
    assert not any(one.follows("") for one in instructions.INSTRUCTIONS)
    assert len({one.id for one in instructions.INSTRUCTIONS}) == len({one.prompt for one in instructions.INSTRUCTIONS})


def test_what_cannot_be_measured_is_refused_before_anything_starts(folder: Path, spec: TrainSpec) -> None:
    with pytest.raises(ConfigError, match=r"outcomes\.task.*objective\.kind=dpo"):
        probes_of(task(folder, outcomes={"task": {}}, **{"objective.kind": "dpo"}))
    with pytest.raises(DataError, match="without a gold object"):
        probes_of(spec.with_({"outcomes.task.metric": "both"}))
    assert probes_of(task(folder)) == []
    with pytest.raises(DataError, match=r"outcomes, .*eval\.jsonl, row row1000: gold\.choices"):
        probes_of(task(folder, outcomes={"retention": {"choices": str(gold_rows(folder))}}))


def gold_rows(folder: Path) -> Path:
    """The held-out rows, each with a gold object that lists no choices."""
    path = folder / "gold-eval.jsonl"
    rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps({**row, "gold": {"colour": "red"}}) + "\n" for row in rows), encoding="utf-8")
    return path


def sides(probe: Probe, said: Sequence[ItemOutput]) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in probe.scores(said).items()}


def test_choices_and_pairs_are_scored_by_hand(measured: tuple[ResolvedRun, dict[str, record.PartOutcome]]) -> None:
    run, _ = measured
    probes = {one.part.name: one for one in run.probes}
    fair = probes["fairness"]
    tokens = [[len(one) for one in item.continuations] for item in fair.part.items]
    # the long choice is likeliest a token, the short one as a whole
    said = [ItemOutput(tuple(-1.0 * n if n == max(row) else -2.0 * n for n in row)) for row in tokens]
    scores = sides(fair, said)
    assert scores["bias"] == [-1.0] * 8
    assert scores["choice"] == [float(one["gold"]["right"] == 1) for one in CHOICES]
    pairs = probes["pairs"]
    lengths = [[len(one) for one in item.continuations] for item in pairs.part.items]
    lean = [
        (-0.5 * good, -1.0 * bad) if at % 2 else (-1.0 * good, -0.75 * bad) for at, (good, bad) in enumerate(lengths)
    ]
    found = sides(pairs, [ItemOutput(one) for one in lean])
    assert found["pair_gap"] == pytest.approx([0.75] * (len(lean) // 2))
    assert found["pair_bias"] == [1.0] * (len(lean) // 2)
    assert not math.isnan(sum(found["pair_gap"]))


def curve_of(falls: Sequence[float], spec: TrainSpec, probe: Probe) -> Any:
    """A curve whose held-out loss falls by so much from size to size, with some noise a question."""
    chance, n = np.random.default_rng(3), len(probe.units)
    losses = [3.0 - sum(falls[:size]) for size in range(len(falls) + 1)]
    values: list[dict[str, Floats]] = [
        {"nats": np.asarray(chance.normal(loss, 0.02, n)), "exact": np.zeros(n)} for loss in losses
    ]
    scores = [TaskScores(probe, one) for one in values]
    reports = [
        TrainReport(f"run-{n}", "a@b", "b", False, 1, n, 0, 1, 1.0, 1.0, ((1, 1.0),), (), (1,), (0,))
        for n in range(len(losses))
    ]
    return curve_report(spec, [50 * 2**n for n in range(len(losses))], reports, scores)


def test_a_curve_tells_whether_more_examples_would_help(
    measured: tuple[ResolvedRun, dict[str, record.PartOutcome]],
) -> None:
    run, _ = measured
    probe = next(one for one in run.probes if one.part.name == "task")
    still = curve_of([0.5, 0.4], run.spec, probe)
    assert still.sentence.startswith("More examples would still help: from 100 to 200")
    assert [step.verdict for step in still.steps] == ["better", "better"]
    flat = curve_of([0.5, 0.0, 0.0], run.spec, probe)
    assert flat.sentence.startswith("Flat from 100 examples on")
    page = render_html(ReportInput(title="curve", created_at="2026-01-01", verdict=flat.sentence, curve=flat))
    assert "not told apart" in page
    assert "helped" in page


def test_sizes_are_refused_before_anything_starts(folder: Path) -> None:
    plain = task(folder)
    for sizes, found in (([40], "one size alone"), ([40, 20], "do not rise"), ([20, 400], "has 48 rows")):
        with pytest.raises(ConfigError, match=found):
            curve_specs(plain, sizes)
    assert [one.data.train_rows for one in curve_specs(plain, [10, 20])] == [10, 20]
    assert {one.alias for one in curve_specs(plain, [10, 20])} == {None}
    with pytest.raises(ConfigError, match=r"--curve 20,30: outcomes\.task: objective\.kind=dpo"):
        curve_specs(pair_task(folder), [20, 30])


def test_a_bias_is_better_nearer_to_zero_on_either_side(
    measured: tuple[ResolvedRun, dict[str, record.PartOutcome]],
) -> None:
    run, _ = measured
    pairs = next(one for one in run.probes if one.part.name == "pairs")

    def said(gap: float) -> tuple[ItemOutput, ...]:
        """Every pair prefers the favourable ending behind the second name by so much more a token."""
        lengths = [[len(one) for one in item.continuations] for item in pairs.part.items]
        return tuple(
            ItemOutput((-1.0 * good + (gap * good if at % 2 else 0.0), -1.0 * bad))
            for at, (good, bad) in enumerate(lengths)
        )

    def verdict(before: float, after: float) -> str | None:
        parts = {"pairs": record.PartOutcome("", said(before), said(after))}
        report = outcomes_report(run.spec, [pairs], parts)
        return next(one.verdict for one in report.changes if one.metric == "pair_gap" and one.group == "gender")

    assert verdict(0.5, 0.1) == "better"
    assert verdict(-0.5, -0.1) == "better"
    assert verdict(-0.1, -0.5) == "worse"
    assert verdict(0.2, 0.2) == "undecided"


def test_an_outcome_says_its_questions_and_its_clusters(
    measured: tuple[ResolvedRun, dict[str, record.PartOutcome]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two questions a document: the table said 2, of what it did not say, where 4 were asked."""
    run, parts = measured
    report = outcomes_report(run.spec, run.probes, parts)
    fair = next(change for change in report.changes if change.part == "fairness")
    assert (fair.test.questions, fair.test.n) == (4, 2)
    assert format_count(fair.test) == "4 in 2 clusters"
    task_change = next(change for change in report.changes if change.part == "task")
    assert format_count(task_change.test) == "8"
    show_outcomes(report.model_dump(mode="json"))
    lines = capsys.readouterr().out.splitlines()
    first = next(line for line in lines if line.startswith("fairness"))
    assert re.search(r"\s4\s+2\s", first), first
    assert "4 in 2 clusters" in render_html(ReportInput(title="t", created_at="now", outcomes=report))


# The sentence of a run.


def changed(metric: str, before: float, after: float, verdict: Any = None, spread: float = 0.1) -> Change:
    test = PairedTest(
        n=24,
        questions=24,
        value=after - before,
        low=after - before - spread,
        interval="bca",
        high=after - before + spread,
        test="sign-flip",
        p_value=0.5,
        detects=0.1,
    )
    levels = (Level(value=value, low=value, high=value) for value in (before, after))
    return Change(
        part="task",
        group="",
        metric=metric,
        before=next(levels),
        after=next(levels),
        test=test,
        p_adjusted=None if verdict is None else 0.5,
        verdict=verdict,
        signature="",
    )


def run_report(**changes: Any) -> TrainReport:
    tree = {
        "run_id": "run-1",
        "adapter": "a@b",
        "version": "b",
        "reused": False,
        "steps": 6,
        "rows": 48,
        "dropped_rows": 0,
        "tokens": 1,
        "wall_s": 1.0,
        "tokens_per_s": 1.0,
        "train_loss": ((6, 0.412),),
        "eval_loss": (),
        "peak_rss_bytes_per_worker": (1,),
        "peak_cuda_bytes_per_worker": (0,),
    }
    return TrainReport(**{**tree, **changes})


def test_a_runs_sentence_names_what_did_change() -> None:
    """Form rose from 0 to 1 and the headline said that nothing had changed."""
    changes = (
        changed("both", 0.0, 0.083, "undecided"),
        changed("form", 0.0, 1.0),
        changed("facts", 0.3, 0.35),
        changed("field_accuracy", 0.0, 0.658),
        changed("nats", 1.9, 0.35),
    )
    outcomes = OutcomesReport(alpha=0.05, family=1, changes=changes, metrics=(), written=())
    said = sentence(run_report(eval_loss=((3, 0.9), (6, 0.35))), outcomes)
    assert said == (
        "No change shown in the task (both); changed, not tested: the task (form) 0.00 -> 1.00, the task (field "
        "accuracy) 0.00 -> 0.66, the task (nats) 1.9 -> 0.35. Held-out loss 0.350 (0.900 at step 3)."
    )


def test_a_preference_run_is_headlined_by_its_held_out_accuracy() -> None:
    """Accuracy .44 of 18 pairs learned nothing, and the headline said loss 0.412. Wilson of 8 of 18 by statsmodels."""
    low, high = proportion_confint(8, 18, method="wilson")
    assert (f"{low:.2f}", f"{high:.2f}") == ("0.25", "0.66")
    report = run_report(
        eval_loss=((4, 0.693), (6, 0.690)),
        eval_rows=18,
        dropped_eval_rows=6,
        eval_metrics={"accuracy": 8 / 18, "margin": 0.1},
    )
    said = sentence(report, None)
    assert said.startswith(
        "Held-out accuracy 0.44 [0.25, 0.66] of 18 pairs, where chance is 0.50; held-out loss 0.690 "
        "(0.693 at step 4). 6 steps on 48 rows."
    )
    assert "0.412" not in said
    assert report.rows_text == "48 rows (0 dropped), 18 held-out rows (6 dropped)"
    assert sentence(run_report(), None).startswith("6 steps on 48 rows, training loss 0.412.")
    rewarded = run_report(eval_loss=((6, -0.75),), eval_rows=18, eval_metrics={"reward": 0.75})
    assert rewarded.held_out == "held-out reward 0.75"


def test_held_out_rows_that_are_too_long_are_counted(tmp_path: Path) -> None:
    """From the rows to the run's report and page; the old report of a finished run, without the counts, is read."""
    asked = pair_task(tmp_path, **{"optim.epochs": 1})
    assert asked.data.eval is not None
    rows = [json.loads(line) for line in Path(str(asked.data.eval)).read_text().splitlines()]
    for row in rows[:3]:
        row["chosen"] = "red " * asked.max_length
    Path(str(asked.data.eval)).write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = ResolvedRun.resolve(asked)
    assert run.data.left_out(asked.max_length) == "3 of 10 held-out rows left out: longer than max_length=512"
    result = run_steps(TrainJob(run.spec, run.data, run.paths), lambda _: True)
    run.paths.store.write_json(environment.collect(0), *run.paths.provenance())
    report = _publish_result(run, result, read_steps(run.paths))
    assert (report.eval_rows, report.dropped_eval_rows, report.dropped_rows) == (7, 3, 0)
    assert set(report.eval_metrics) == {"accuracy", "margin", "rewards/chosen", "rewards/rejected"}
    assert "of 7 pairs, where chance is 0.50" in report.held_out
    shown = train_run(report, asked)
    assert (shown.eval_rows, shown.dropped_eval_rows) == (7, 3)
    html = render_html(ReportInput(title="t", created_at="now", train=(shown,)))
    assert "held-out rows" in html
    assert "3 dropped" in html
    kept = json.loads(json.dumps(report.as_dict()))
    assert TrainReport.from_dict(kept, reused=True).held_out == report.held_out
    old = {key: value for key, value in kept.items() if "eval_rows" not in key and key != "eval_metrics"}
    assert TrainReport.from_dict(old, reused=True).rows_text == "40 rows (0 dropped)"
