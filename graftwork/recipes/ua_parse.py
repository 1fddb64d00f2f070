"""ua-parse: a browser's user agent -> one strict JSON object. All form: nothing has to be looked up.

Source: fake-useragent (Apache-2.0), real user agents. Rows are made unique before they are split, so no user agent
stands in two splits.
"""

import json
import random
from collections import Counter
from typing import Any

from graftwork.base.package_source import PackageFile
from graftwork.recipes import Built, jsonl, object_schema, row

SOURCE = PackageFile(
    "fake-useragent",
    "2.2.0",
    "fake_useragent/data/browsers.jsonl",
    "32270597095ae268d140489e8fa7ffbd44b882c876f4b7a23f347bedcfc227b5",
)
LICENCE = "Apache-2.0"

SPLITS = {"train": 475, "valid": 64, "eval": 300}
_SEED = 220
_FIELDS: dict[str, dict[str, Any]] = {
    "type": {"type": "string", "enum": ["desktop", "mobile", "tablet"]},
    "device_brand": {"type": "string"},
    "browser": {"type": "string", "minLength": 1},
    "browser_version": {"type": "string", "pattern": "^[0-9]+(\\.[0-9]+)*$"},
    "os": {"type": "string", "minLength": 1},
    "os_version": {"type": "string"},
    "platform": {"type": "string", "minLength": 1},
}


def make(source: bytes) -> Built:
    """Splits and schema from browsers.jsonl."""
    labels: dict[str, Counter[tuple[str, ...]]] = {}
    for line in source.decode("utf-8").splitlines():
        record = json.loads(line)
        answer = tuple(record[field] or "" for field in _FIELDS)  # null and "" both say: not known
        labels.setdefault(record["useragent"], Counter())[answer] += 1
    agents = sorted(labels)
    random.Random(_SEED).shuffle(agents)
    assert len(agents) == sum(SPLITS.values()), f"{len(agents)} user agents, splits {SPLITS}"
    files = {}
    for split, size in SPLITS.items():
        part, agents = agents[:size], agents[size:]
        # Some agents were seen with two platforms: the one seen most often counts
        golds = [dict(zip(_FIELDS, labels[agent].most_common(1)[0][0], strict=True)) for agent in part]
        rows = [row(f"ua-{split}-{n}", agent, gold) for n, (agent, gold) in enumerate(zip(part, golds, strict=True))]
        files[f"{split}.jsonl"] = jsonl(rows)
    files["schema.json"] = object_schema("parsed user agent", _FIELDS)
    about = {
        "question": "the user agent itself",
        "user_agents": len(labels),
        "with_more_than_one_label": sum(len(counts) > 1 for counts in labels.values()),
    }
    return Built(files, about)
