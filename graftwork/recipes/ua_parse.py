"""ua-parse: a real user agent string -> one strict JSON object. All of it can be read off the string: pure form."""

import json
import random
from pathlib import Path
from typing import Any

from graftwork.package_files import PackageFile, fetch
from graftwork.recipes.files import Recipe, digest, row, write_card, write_jsonl

EVAL_ROWS = 200
SOURCE = PackageFile(
    "fake-useragent",
    "2.2.0",
    "fake_useragent/data/browsers.jsonl",
    "32270597095ae268d140489e8fa7ffbd44b882c876f4b7a23f347bedcfc227b5",
)
FIELDS = ("type", "device_brand", "browser", "browser_version", "os", "os_version", "platform")
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "additionalProperties": False,
    "required": list(FIELDS),
    "properties": {
        "type": {"type": "string", "enum": ["mobile", "desktop", "tablet"]},
        **{key: {"type": "string"} for key in FIELDS[1:]},
    },
}


def write(folder: Path) -> None:
    """Write train.jsonl, eval.jsonl, schema.json and card.json."""
    lines = [json.loads(line) for line in fetch(SOURCE).read_text(encoding="utf-8").splitlines()]
    agents: dict[str, dict[str, Any]] = {}
    for line in lines:  # the source repeats a user agent with its share of traffic: once each, before the split
        agents.setdefault(line["useragent"], line)
    rows = [_row(agent, line) for agent, line in sorted(agents.items())]
    random.Random(220).shuffle(rows)
    write_jsonl(folder / "train.jsonl", rows[EVAL_ROWS:])
    write_jsonl(folder / "eval.jsonl", rows[:EVAL_ROWS])
    (folder / "schema.json").write_text(json.dumps(SCHEMA, indent=1) + "\n", encoding="utf-8")
    write_card(folder, RECIPE, "real user agent strings, each on one side of the split only, parsed into JSON")


def _row(agent: str, line: dict[str, Any]) -> dict[str, Any]:
    gold = {key: str(line[key] or "") for key in FIELDS}
    return row(digest(agent)[:16], agent, gold, asked=())


RECIPE = Recipe(SOURCE, "Apache-2.0", 1, write)
