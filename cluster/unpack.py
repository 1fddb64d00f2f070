"""`python -m graftwork.cluster.unpack WHEEL_URI FOLDER`: lay this code out in a pod, before Ray starts there.

The wheel's name says its content (cluster/wheel.py): what was fetched is held against it. No pip, no index, no network
beyond the store.
"""

import io
import re
import sys
import zipfile
from pathlib import Path

from graftwork.cluster.wheel import content_digest
from graftwork.errors import StorageError
from graftwork.storage import Store

PATIENCE_S = 120.0
_DIGEST = re.compile(r"\+([0-9a-f]{12})-py3-none-any\.whl$")


def unpack(uri: str, folder: Path) -> None:
    """Fetch the wheel and lay its files out in `folder`. Raises StorageError for bytes that its name does not tell."""
    root, _, name = uri.rpartition("/")
    data = Store(root, PATIENCE_S).read_bytes(name)
    with zipfile.ZipFile(io.BytesIO(data)) as wheel:
        files = {entry: wheel.read(entry) for entry in wheel.namelist() if ".dist-info/" not in entry}
        found, told = content_digest(files), _DIGEST.search(name)
        if told is None or told[1] != found:
            raise StorageError(
                f"wheel {uri}", f"its content is {found}", "a wheel's name ends with the hash of its content",
                "submit the job again: the right one is written then",
            )  # fmt: skip
        wheel.extractall(folder)


if __name__ == "__main__":
    unpack(sys.argv[1], Path(sys.argv[2]))
