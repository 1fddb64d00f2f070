"""`graftwork data show`: what is shown is what a run learns, counted as a person would."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from graftwork.base.load import resolve
from graftwork.base.load import template as base_template
from graftwork.cli import app
from graftwork.errors import ConfigError, DataError
from graftwork.prompts.render import Message, render
from graftwork.training.dataset_report import report_on, spec_of_file, token_texts
from graftwork.training.objectives.rows import TokenRows, prepare
from tests.chat_templates import FAMILIES
from tests.training import pair_task, task, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("show")
    task(folder)
    pair_task(folder)
    return folder


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def as_json(*words: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["data", "show", *words, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_the_tokens_shown_are_those_that_a_run_trains_on(folder: Path) -> None:
    spec = task(folder, num_workers=1)
    trained = prepare(spec).train
    assert isinstance(trained, TokenRows)
    report = report_on(spec, rows=5)
    assert [row.id for row in report.rows] == [f"row{number}" for number in range(5)]
    for index, row in enumerate(report.rows):
        ids, mask = trained.row(index)
        assert [token.id for token in row.tokens] == ids.tolist()
        assert [token.trained for token in row.tokens] == mask.tolist()
    assert report.tokens is not None
    assert report.tokens.total == int(trained.lengths_N.sum())
    assert report.tokens.trained == int(trained.scored_N.sum())
    assert sum(report.tokens.histogram.values()) == report.count == 48
    assert report.eval == {"rows": 8, "overlap": 8}, "ids differ, questions and answers do not"


def test_text_of_tokens_adds_up_to_the_rendered_text(folder: Path) -> None:
    template = base_template(resolve(task(folder).base))
    turns = (Message("user", "Grüße 😀 日本"), Message("assistant", "مرحبا 👩‍👩‍👧 end"))
    ids = render(turns, template, generate=False).ids
    texts = token_texts(ids, template)
    assert len(texts) == len(ids)
    assert "".join(texts) == template.decode(ids, skip_special=False)


def test_keys_duplicates_and_rows_that_are_too_long_are_counted(folder: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    long = [turns[0], {"role": "assistant", "content": "word " * 60}]
    records = [{"messages": turns, "source": "web"}, {"messages": turns}, {"messages": long}, {"messages": turns}]
    uri = write(tmp_path / "rows.jsonl", *records)
    spec = spec_of_file(uri, str(folder / "base")).with_({"max_length": 40})
    report = report_on(spec)
    assert (report.format, report.count, report.duplicates, report.eval) == ("openai", 4, 2, None)
    assert (report.used["messages"], report.ignored) == (4, {"source": 1})
    assert report.tokens is not None
    assert (report.tokens.too_long, report.tokens.max_length, report.tokens.sequences) == (1, 40, 4)
    assert report.tokens.quantiles["max"] > 40
    assert [row.id for row in report_on(spec, rows=4).rows] == ["1", "2", "4"], "the third is dropped"


def test_both_answers_of_a_pair_are_shown(folder: Path) -> None:
    report = report_on(pair_task(folder, num_workers=1), rows=1)
    assert [(row.id, row.side) for row in report.rows] == [("pair0", "chosen"), ("pair0", "rejected")]
    learned = ["".join(token.text for token in row.tokens if token.trained) for row in report.rows]
    assert learned == ["red<|im_end|>", "green<|im_end|>"]


FORMS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
    {"prompt": "Hi", "completion": "Hello."},
    {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello."}]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    {"instruction": "Hi", "output": "Hello."},
    {"q": "Hi", "a": "Hello."},
]


def test_every_format_trains_the_same_tokens(folder: Path, tmp_path: Path) -> None:
    digests = set()
    for number, record in enumerate(FORMS):
        spec = task(folder, num_workers=1, **{"data.train": write(tmp_path / f"{number}.jsonl", record)})
        columns = {"prompt": "q", "completion": "a"} if "q" in record else {}
        read = spec.objective.read(
            spec.model_copy(update={"data": spec.data.model_copy(update={"columns": columns})}),
            base_template(resolve(spec.base)),
            "train",
        )
        digests.add(read.rows.digest())
    assert len(digests) == 1


def test_calls_are_learned_and_results_and_turns_of_weight_0_are_not(folder: Path, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "now", "arguments": '{"zone": "CET"}'}}
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Well.", "weight": 0},
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "12:00"},
        {"role": "assistant", "content": "Noon."},
    ]
    tool = {"type": "function", "function": {"name": "now", "description": "d", "parameters": {}}}
    uri = write(tmp_path / "rows.jsonl", {"messages": turns, "tools": [tool]})
    spec = task(folder, num_workers=1, **{"data.train": uri, "base.chat_template": "hermes"})
    [row] = report_on(spec).rows
    runs = "".join(token.text if token.trained else "\0" for token in row.tokens)
    first, second = (run for run in runs.split("\0") if run)
    assert "".join(first.split()) == '<tool_call>{"name":"now","arguments":{"zone":"CET"}}</tool_call><|im_end|>'
    assert second == "Noon.<|im_end|>"
    text = "".join(token.text for token in row.tokens)
    assert text.index("Well.") < text.index("<tool_response>") < text.index("12:00") < text.index("Noon.")


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"text": "<|im_start|>user\nHi<|im_end|>\n<b>x</b> <|eot_id|>"}, "cpt"),
        ({"prompt": "<|im_start|>user", "completion": "ok <|im_end|>"}, "sft"),
        (
            {"messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "<|im_start|>"}]},
            "sft",
        ),
        ({"prompt": "Hi", "chosen": "a<|im_end|>", "rejected": "<|im_start|>b"}, "dpo"),
    ],
)
def test_control_tokens_in_the_text_of_rows_are_reported(
    folder: Path, tmp_path: Path, record: dict[str, Any], kind: str
) -> None:
    spec = spec_of_file(write(tmp_path / "rows.jsonl", record, {**record, "id": 2}), str(folder / "base"))
    assert spec.objective.kind == kind
    found = [note for note in report_on(spec).notes if "control" in note]
    assert found == [
        "data.train: <|im_end|> (in 2 rows), <|im_start|> (in 2 rows): characters in the text, no control tokens; "
        "turns are written as messages"
    ]
    assert found[0] in prepare(spec).warnings


def test_a_name_that_the_template_does_not_write_is_reported(folder: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi", "name": "ann"}, {"role": "assistant", "content": "Hello."}]
    spec = task(folder, num_workers=1, **{"data.train": write(tmp_path / "rows.jsonl", {"messages": turns})})
    said = "data.train: name of turns (in 1 row) is left out: the chat template does not write it"
    assert said in prepare(spec).warnings
    assert said in report_on(spec).notes
    template = "{% for m in messages %}<|im_start|>{{ m.name or m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    path = tmp_path / "named.jinja"
    path.write_text(template + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    named = report_on(spec.with_({"base.chat_template": str(path)}))
    assert said not in named.notes
    assert "ann" in "".join(token.text for token in named.rows[0].tokens)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "u", "chosen": [{"role": "assistant", "content": "b", "reasoning": "r"}], "rejected": "c"},
        {"prompt": "u", "completion": [{"role": "assistant", "content": "b", "reasoning": "r"}], "label": True},
        {"prompt": "u", "completion": [{"role": "assistant", "content": "b", "reasoning": "r"}]},
    ],
)
def test_what_a_template_cannot_write_is_an_error_of_the_row(folder: Path, tmp_path: Path, record: Any) -> None:
    uri = write(tmp_path / "rows.jsonl", record | {"id": "this"})
    with pytest.raises(DataError, match=r"rows.jsonl row 1: messages\[1\]\.reasoning_content"):
        report_on(spec_of_file(uri, str(folder / "base")))


TRL_FAMILIES = [
    "llama3",
    "qwen2_5",
    "qwen3",
    "qwen3_instruct_2507",
    "qwen3_5_think",
    "qwen3_8",
    "gemma",
    "gemma3",
    "phi3",
    "cohere",
    "cohere2",
    "glm4moe",
]
"""Families with a training template in TRL that writes no date and begins an answer as its prompt does."""


@pytest.mark.parametrize("name", TRL_FAMILIES)
def test_shown_tokens_are_those_of_transformers_and_trl(folder: Path, tmp_path: Path, name: str) -> None:
    """Source: apply_chat_template(return_assistant_tokens_mask=True) on TRL's training template of the family.

    TRL's mask also has what a template writes in front of an answer or behind its end token.
    """
    base = shutil.copytree(folder / "base", tmp_path / "base")
    for file in (*base.glob("*token*"), *base.glob("*.jinja")):
        file.unlink()
    FAMILIES[name].write(base)
    turns = [{"role": "user", "content": "Where is ZPPP?"}, {"role": "assistant", "content": "In Kunming."}]
    if name not in ("qwen3", "qwen3_5_think", "qwen3_8", "glm4moe", "phi3"):  # these rewrite earlier turns
        turns += [{"role": "user", "content": "And LFPG?"}, {"role": "assistant", "content": "In Paris."}]
    uri = write(tmp_path / "rows.jsonl", {"messages": turns})
    [row] = report_on(spec_of_file(uri, str(base))).rows
    tokenizer = AutoTokenizer.from_pretrained(base)
    theirs = tokenizer.apply_chat_template(
        turns,
        return_dict=True,
        return_assistant_tokens_mask=True,
        chat_template=FAMILIES[name].training_source,
    )
    assert [token.id for token in row.tokens] == theirs["input_ids"]
    more = [bool(mask) and not token.trained for token, mask in zip(row.tokens, theirs["assistant_masks"], strict=True)]
    assert all(mask for token, mask in zip(row.tokens, theirs["assistant_masks"], strict=True) if token.trained)
    assert "".join(token.text for token, extra in zip(row.tokens, more, strict=True) if extra).replace("\n", "") in (
        "",
        "<think>",
        "<|endoftext|>",
        "<|END_OF_TURN_TOKEN|>" * 2,
    )
    learned = "".join(token.text if token.trained else "\0" for token in row.tokens)
    answers = [run for run in learned.split("\0") if run]
    assert [turn["content"] in run for turn, run in zip(turns[1::2], answers, strict=True)] == [True] * len(answers)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # set by TRL 1.16 itself
def test_prompt_and_completion_are_learned_as_by_trl(folder: Path, tmp_path: Path) -> None:
    """Source: the labels that TRL 1.16's SFTTrainer builds; it learns the line end behind the end token too."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    turns = [("user", "Hi"), ("assistant", "Well."), ("user", "Time?")]
    prompt = [{"role": role, "content": text} for role, text in turns]
    record = {"prompt": prompt, "completion": [{"role": "assistant", "content": "Noon."}]}
    base = str(folder / "base")
    [row] = report_on(spec_of_file(write(tmp_path / "rows.jsonl", record), base)).rows
    settings = SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, max_length=None, bf16=False)
    rows = Dataset.from_list([record])
    [theirs] = SFTTrainer(
        model=base, args=settings, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(base)
    ).train_dataset
    assert [token.id for token in row.tokens] == theirs["input_ids"]
    learned = [label != -100 for label in theirs["labels"]]
    assert "".join(token.text for token, on in zip(row.tokens, learned, strict=True) if on) == "Noon.<|im_end|>\n"
    assert "".join(token.text for token in row.tokens if token.trained) == "Noon.<|im_end|>"


def test_packed_rows_are_shown_one_by_one(folder: Path) -> None:
    plain, packed = (
        report_on(task(folder, num_workers=1, objective={"kind": "sft", "packing": packing}))
        for packing in ("none", "best_fit")
    )
    assert plain.rows == packed.rows
    assert plain.tokens == packed.tokens


def test_overlap_with_held_out_rows_is_counted(folder: Path) -> None:
    lines = write_rows(folder / "some.jsonl", 3).read_text().splitlines()
    turns = [{"role": "user", "content": "new"}, {"role": "assistant", "content": "red"}]
    some = write(folder / "overlap.jsonl", *map(json.loads, lines), {"messages": turns})
    report = report_on(task(folder, num_workers=1, **{"data.eval": some}))
    assert report.eval == {"rows": 4, "overlap": 3}


@pytest.mark.parametrize(
    ("record", "kind", "form"),
    [
        ({"instruction": "u", "output": "a"}, "sft", "alpaca"),
        ({"prompt": "u", "chosen": "a", "rejected": "b"}, "dpo", "trl_preference"),
        ({"text": "words"}, "cpt", "text"),
        ({"prompt": "u", "completion": "a", "label": False}, "kto", "trl"),
        (
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}], "label": 3},
            "sft",
            "openai",
        ),
    ],
)
def test_a_file_alone_is_read_by_the_objective_of_its_format(
    folder: Path, tmp_path: Path, record: Any, kind: str, form: str
) -> None:
    uri = write(tmp_path / "rows.jsonl", record)
    assert spec_of_file(uri, str(folder / "base")).objective.kind == kind
    found = as_json(uri, "--base", str(folder / "base"))
    assert (found["objective"], found["format"], found["count"]) == (kind, form, 1)
    assert any(token["trained"] for token in found["rows"][0]["tokens"])
    without = as_json(uri)
    assert (without["format"], without["tokens"], without["rows"]) == (form, None, [])


def test_a_spec_decides_how_a_file_is_read(folder: Path, tmp_path: Path) -> None:
    uri = write(tmp_path / "rows.jsonl", {"q": "u", "a": "x"})
    spec = tmp_path / "train.yaml"
    spec.write_text(
        f"kind: train\nname: t\nbase: {folder / 'base'}\nprompt: {{system: be brief}}\n"
        f"data: {{train: {uri}, columns: {{prompt: q, completion: a}}}}\n"
    )
    for words in (("--spec", str(spec)), (uri, "--spec", str(spec))):
        text = "".join(token["text"] for token in as_json(*words)["rows"][0]["tokens"])
        assert "be brief" in text
        assert "u<|im_end|>" in text
    held_out = write(tmp_path / "held-out.jsonl", {"q": "new", "a": "y"})
    spec.write_text(spec.read_text().replace("data: {", f"data: {{eval: {held_out}, "))
    named = as_json(f"{tmp_path}/../{tmp_path.name}/held-out.jsonl", "--spec", str(spec))
    assert (named["source"], named["count"], named["eval"]) == (held_out, 1, None)
    with pytest.raises(DataError, match="no format that sft reads has the keys q, a"):
        as_json(uri)


def test_marks_and_control_characters_of_the_printed_rows(folder: Path, tmp_path: Path) -> None:
    uri = write(tmp_path / "rows.jsonl", {"prompt": "u", "completion": "red \x1b[31m [bold]"})
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from graftwork.cli import main; main()",
            "data",
            "show",
            uri,
            "--base",
            folder / "base",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "<|im_start|>assistant\n[[red \\x1b[31m [bold]<|im_end|>]]\n" in done.stdout
    assert "\x1b" not in done.stdout


def test_missing_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match="neither FILE nor --spec"):
        as_json()
    with pytest.raises(ConfigError, match="--set changes a spec"):
        as_json("rows.jsonl", "--set", "seed=1")


def test_set_changes_the_spec_of_a_file_shown_with_a_base(folder: Path, tmp_path: Path) -> None:
    """Keys of `data` for other column names, and of a base that is given by its short form."""
    base = str(folder / "base")
    tools = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]
    uri = write(tmp_path / "rows.jsonl", {"question": "Where?", "answer": "Here.", "tools": tools})
    columns = "data.columns={prompt: question, completion: answer}"
    found = as_json(uri, "--base", base, "--set", columns, "--set", "base.chat_template=hermes")
    [row] = found["rows"]
    text = "".join(token["text"] for token in row["tokens"])
    assert '"name": "now"' in text
    assert "".join(token["text"] for token in row["tokens"] if token["trained"]).startswith("Here.")
