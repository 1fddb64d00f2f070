"""Sources of rows: columns, templates, the held-out share, and mixtures by weight."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graftwork.datasets.examples import Example, iter_examples
from graftwork.datasets.keys import KeyCheck
from graftwork.datasets.rows import DataSpec, read_rows
from graftwork.datasets.sources import MixturePart, RowSource
from graftwork.errors import ConfigError, DataError
from graftwork.training.evaluation.questions import probes_of
from graftwork.training.objectives.rows import prepare
from graftwork.training.run import run_paths
from tests.training import task, write_rows


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def asked(examples: Any) -> list[str]:
    return [example.messages[0].content for example in examples]


def source_of(uri: str, **more: Any) -> RowSource:
    return RowSource((MixturePart(path=uri),), **more)


# Columns and templates.


def test_columns_are_read_under_other_names_and_the_rest_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("question;answer;prompt;lang\nq;a;old;en\n", encoding="utf-8")
    data = DataSpec.model_validate({"train": str(path), "columns": {"prompt": "question", "completion": "answer"}})
    keys = KeyCheck()
    [found] = iter_examples(data.source("train", 0), "conversations", keys=keys)
    assert [turn.content for turn in found.messages] == ["q", "a"]
    assert keys.ignored == {"prompt (of the file)": 1, "lang": 1}


def test_a_missing_column_lists_the_columns(tmp_path: Path) -> None:
    uri = write(tmp_path / "rows.jsonl", {"question": "q", "answer": "a"}, {"question": "q"})
    source = source_of(uri, columns={"prompt": "question", "completion": "answer"})
    with pytest.raises(DataError, match=r"row 2: data.columns.completion=answer: no column 'answer'") as error:
        list(iter_examples(source, "conversations"))
    assert error.value.rule == "columns of the row: question"


def test_a_template_writes_text_or_turns_from_columns(tmp_path: Path) -> None:
    row = {"id": "r", "english": 'the "cat"', "french": "le chat", "lang": "fr"}
    uri = write(tmp_path / "rows.jsonl", row)
    text = {"prompt": "To {{ lang }} ({{ id }}): {{ english }}", "completion": "{{ french }}"}
    turns = (
        '[{"role": "user", "content": {{ english | tojson }}}, {"role": "assistant", "content": {{ french | tojson }}}]'
    )
    [of_text] = iter_examples(source_of(uri, template=text), "conversations")
    [of_turns] = iter_examples(source_of(uri, template={"messages": turns}), "conversations")
    assert (of_text.id, [turn.content for turn in of_text.messages]) == ("r", ['To fr (r): the "cat"', "le chat"])
    assert [turn.content for turn in of_turns.messages] == ['the "cat"', "le chat"]


def test_a_template_makes_calls_of_columns_with_json_text(tmp_path: Path) -> None:
    """The form of xLAM's data: a query, and its calls and functions as JSON text."""
    calls = json.dumps([{"name": "now", "arguments": {"zone": "CET"}}])
    tools = json.dumps([{"name": "now", "description": "d", "parameters": {"zone": {"type": "str"}}}])
    uri = write(tmp_path / "rows.jsonl", {"query": 'the "time"', "answers": calls, "tools": tools})
    turns = '[{"role": "user", "content": {{ query | tojson }}}, {"role": "assistant", "tool_calls": {{ answers }}}]'
    [found] = iter_examples(source_of(uri, template={"messages": turns}), "conversations")
    assert found.messages[0].content == 'the "time"'
    assert [(call.name, call.arguments) for call in found.messages[1].tool_calls] == [("now", {"zone": "CET"})]
    assert found.tools[0]["function"]["name"] == "now"


@pytest.mark.parametrize(
    ("template", "at", "found"),
    [
        ({"prompt": "{{ nothing }}"}, "data.template.prompt", "'nothing' is undefined"),
        ({"messages": '[{"role": {{ a }}}]'}, "data.template.messages", "it is not JSON"),
        ({"prompt": "{{ a + 1 }}"}, "data.template.prompt", "can only concatenate"),
        ({"prompt": "{{ a.__class__.__mro__ }}"}, "data.template.prompt", "unsafe"),
    ],
)
def test_a_template_that_fails_names_row_and_key(tmp_path: Path, template: dict[str, str], at: str, found: str) -> None:
    source = source_of(write(tmp_path / "rows.jsonl", {"a": "x"}), template=template)
    with pytest.raises(DataError, match=f"row 1: {at}: .*{found}"):
        list(iter_examples(source, "conversations"))


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ({"train": "a", "template": {"prompt": "{{ x"}}, r"data.template.prompt: it is not valid Jinja"),
        (
            {"train": "a", "template": {"prompt": "x"}, "columns": {"prompt": "x"}},
            "prompt is in columns and in template",
        ),
        (
            {"train": "a", "columns": {"promt": "x"}},
            "columns.promt is no key of a row in any format; did you mean 'prompt'",
        ),
        ({"train": "a", "template": {"answer": "x"}}, "template.answer is no key of a row"),
        ({"train": []}, "empty list"),
        ({"train": [{"path": "a"}, {"path": "a"}]}, "a is named twice"),
        ({"train": [{"path": "a", "weight": 1}, {"path": "b"}]}, "some sources have a weight and some have none"),
        ({"train": [{"path": "a", "weight": 0}]}, "weight=0: it is out of range"),
        ({"train": [{"path": "a"}, {"path": "b"}], "eval": "b"}, "held-out rows are not trained on"),
        ({"train": "a", "eval": 1.5}, "less than 1"),
        ({"train": "a", "thinking": "hide"}, "keep"),
    ],
)
def test_keys_without_effect_or_sense_are_refused(tmp_path: Path, data: dict[str, Any], found: str) -> None:
    spec = task(tmp_path)
    with pytest.raises(ConfigError, match=found):
        spec.with_({"data": data})


# The held-out share.


def chat(number: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": "a"}]}


def sides(uri: str, share: float) -> tuple[list[str], list[str]]:
    train, held_out = (
        asked(iter_examples(source_of(uri, share=share, side=side), "conversations")) for side in ("train", "eval")
    )
    return train, held_out


def test_a_share_is_held_out_by_content_whatever_the_order_format_and_id(tmp_path: Path) -> None:
    records = [chat(number) for number in range(2000)]
    train, held_out = sides(write(tmp_path / "rows.jsonl", *records), 0.1)
    assert sorted(train + held_out) == sorted(f"q{number}" for number in range(2000))
    assert abs(len(held_out) - 200) < 3 * (2000 * 0.1 * 0.9) ** 0.5
    others = [
        {
            "id": f"other {n}",
            "source": "web",
            "conversations": [{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": "a"}],
        }
        for n in reversed(range(2000))
    ]
    assert set(sides(write(tmp_path / "others.jsonl", *others), 0.1)[1]) == set(held_out)
    assert set(held_out) < set(sides(str(tmp_path / "rows.jsonl"), 0.2)[1]), (
        "a larger share holds out the same and more"
    )


def test_equal_rows_are_on_one_side(tmp_path: Path) -> None:
    records = [{**chat(number % 50), "id": number} for number in range(300)]
    train, held_out = sides(write(tmp_path / "rows.jsonl", *records), 0.3)
    assert train
    assert held_out
    assert not set(train) & set(held_out)


def test_the_hash_of_a_row_is_the_same_on_every_machine(tmp_path: Path) -> None:
    [example] = iter_examples(write(tmp_path / "rows.jsonl", chat(1)), "conversations")
    assert example.content_hash() == 4480987580845390249
    assert example.content_hash() == read_rows(str(tmp_path / "rows.jsonl"), need="train")[0].content_hash()


def test_a_side_without_rows_is_refused(tmp_path: Path) -> None:
    uri = write(tmp_path / "rows.jsonl", chat(1), chat(2))
    with pytest.raises(DataError, match=r"data.eval=0.001: no row of .* is held out"):
        sides(uri, 0.001)


def test_a_run_holds_out_a_share_and_its_rows_are_the_same_as_in_two_files(tmp_path: Path) -> None:
    spec = task(tmp_path, num_workers=1)
    uri = str(write_rows(tmp_path / "all.jsonl", 60))
    records = [json.loads(line) for line in Path(uri).read_text().splitlines()]
    for number, record in enumerate(records):  # 60 different questions
        record["messages"][0]["content"] += f" of {number}"
    write(tmp_path / "all.jsonl", *records)
    split = spec.with_({"data.train": uri, "data.eval": 0.2})
    train, held_out = (
        {example.id for example in iter_examples(split.data.source(side, 0), "conversations")}
        for side in ("train", "eval")
    )
    files = {
        "data.train": write(tmp_path / "t.jsonl", *(one for one in records if one["id"] in train)),
        "data.eval": write(tmp_path / "e.jsonl", *(one for one in records if one["id"] in held_out)),
    }
    by_files = spec.with_(files)
    assert prepare(split).digest() == prepare(by_files).digest()
    assert run_paths(split).run_id == run_paths(by_files).run_id
    assert any("rows held out" in note for note in prepare(split).notes)
    asked_of = probes_of(split.with_({"outcomes": {"task": {"rows": 4}}}))
    assert set(asked_of[0].units or ()) <= held_out


def test_a_spec_without_new_keys_keeps_its_rows_and_identity(tmp_path: Path) -> None:
    spec = task(tmp_path, num_workers=1)
    one = spec.with_({"data.train": [{"path": str(spec.data.train)}]})
    assert run_paths(one).run_id == run_paths(spec).run_id


# Mixtures.


def mixture(folder: Path, sizes: dict[str, int], weights: dict[str, float], seed: int = 0) -> RowSource:
    for name, size in sizes.items():
        records = ({"prompt": f"{name}{number}", "completion": "x"} for number in range(size))
        write(folder / f"{name}.jsonl", *records)
    parts = [{"path": str(folder / f"{name}.jsonl"), "weight": weights.get(name)} for name in sizes]
    return DataSpec.model_validate({"train": parts}).source("train", seed)


def names(examples: list[Example]) -> Counter[str]:
    return Counter(text[0] for text in asked(examples))


def test_sources_without_weights_follow_each_other(tmp_path: Path) -> None:
    found = list(iter_examples(mixture(tmp_path, {"a": 3, "b": 2}, {}), "conversations"))
    assert asked(found) == ["a0", "a1", "a2", "b0", "b1"]
    assert [example.id for example in found] == ["1:1", "1:2", "1:3", "2:1", "2:2"]


@pytest.mark.parametrize(
    ("sizes", "weights", "taken"),
    [
        ({"a": 100, "b": 100}, {"a": 0.7, "b": 0.3}, {"a": 100, "b": 42}),
        ({"a": 1000, "b": 30}, {"a": 7, "b": 3}, {"a": 70, "b": 30}),
        ({"a": 50, "b": 50, "c": 50}, {"a": 1, "b": 1, "c": 1}, {"a": 50, "b": 50, "c": 50}),
    ],
)
def test_weights_are_shares_without_a_row_twice(
    tmp_path: Path, sizes: dict[str, int], weights: dict[str, float], taken: dict[str, int]
) -> None:
    keys = KeyCheck()
    source = mixture(tmp_path, sizes, weights)
    found = list(iter_examples(source, "conversations", keys=keys))
    assert names(found) == taken
    assert len(set(asked(found))) == len(found)
    assert [rows for rows, _ in keys.taken.values()] == list(taken.values())
    half = names(found[: len(found) // 2])
    assert all(abs(half[name] - count / 2) <= 1 for name, count in taken.items()), "the sources alternate"
    assert asked(found) == asked(iter_examples(source, "conversations"))


def test_the_seed_does_not_draw_held_out_rows() -> None:
    data = DataSpec.model_validate({"train": [{"path": "a", "weight": 1}, {"path": "b", "weight": 1}], "eval": 0.1})
    assert data.source("eval", 1) == data.source("eval", 2)
    assert data.source("train", 1) != data.source("train", 2)


def test_the_seed_draws_the_rows_of_a_mixture(tmp_path: Path) -> None:
    drawn = [
        {text for text in asked(iter_examples(mixture(tmp_path, {"a": 90, "b": 9}, {"a": 1, "b": 1}, seed), "prompts"))}
        for seed in (0, 1)
    ]
    assert drawn[0] != drawn[1]
    assert all(sum(text[0] == "b" for text in one) == 9 for one in drawn)


def test_a_weight_of_less_than_a_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"b.jsonl: its weight 0.001 is less than one of the"):
        list(iter_examples(mixture(tmp_path, {"a": 10, "b": 10}, {"a": 1, "b": 0.001}), "conversations"))


def test_sources_may_have_different_formats_and_a_run_reports_what_it_takes(tmp_path: Path) -> None:
    spec = task(tmp_path, num_workers=1)
    alpaca = write(tmp_path / "b.jsonl", *({"instruction": f"Say {n}", "output": "x"} for n in range(4)))
    mixed = spec.with_({"data.train": [{"path": str(spec.data.train), "weight": 3}, {"path": alpaca, "weight": 1}]})
    found = prepare(mixed)
    assert len(found.train) == 12 + 4
    assert any("12 of 48 rows" in note and "4 of 4 rows" in note for note in found.notes)


def test_a_template_reads_the_files_columns_and_no_null(tmp_path: Path) -> None:
    uri = write(tmp_path / "rows.jsonl", {"prompt": "2+2", "answer": "4", "note": None})
    twice = {"prompt": "Solve: {{ prompt }}", "completion": "{{ prompt }} = {{ answer }}"}
    [row] = iter_examples(source_of(uri, template=twice), "conversations")
    assert [turn.content for turn in row.messages] == ["Solve: 2+2", "2+2 = 4"]
    with pytest.raises(DataError, match=r"row 1: data.template.completion: .*null"):
        list(iter_examples(source_of(uri, template={**twice, "completion": "{{ note }}"}), "conversations"))
    shown = {**twice, "completion": "{{ note or '-' }}"}
    [row] = iter_examples(source_of(uri, template=shown), "conversations")
    assert row.messages[1].content == "-"


def test_columns_win_over_turns_of_the_file(tmp_path: Path) -> None:
    uri, keys = write(tmp_path / "rows.jsonl", {**chat(1), "q": "Q", "a": "A"}), KeyCheck()
    [row] = iter_examples(source_of(uri, columns={"prompt": "q", "completion": "a"}), "conversations", keys=keys)
    assert [turn.content for turn in row.messages] == ["Q", "A"]
    assert any("messages (of the file)" in line for line in keys.note("data.train"))


def test_weights_hold_for_the_training_side_of_a_share(tmp_path: Path) -> None:
    source = mixture(tmp_path, {"many": 500, "few": 5}, {"many": 0.99, "few": 0.01})
    held_out = replace(source, share=0.05, side="eval")
    assert set(names(list(iter_examples(held_out, "conversations")))) >= {"m"}
