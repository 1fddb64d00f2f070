"""The token of an own cluster: a file that its owner alone can read. Ray is told its path, never its value."""

import os
import secrets
from pathlib import Path

from graftwork.errors import ConfigError

RULE = "who has the token can run any program on the cluster, so the file is its owner's alone"


def default_file() -> Path:
    """`$XDG_CONFIG_HOME/graftwork/cluster-token`, usually under ~/.config."""
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "graftwork" / "cluster-token"


def made(file: Path) -> bool:
    """Make a token where there is none; whether one was made. Raises ConfigError for a file that cannot be kept."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    except OSError as error:
        raise ConfigError(f"--token-file {file}", f"it cannot be written ({error.strerror})", RULE,
                          "name a file in a folder of yours") from None  # fmt: skip
    with os.fdopen(handle, "w") as out:
        out.write(secrets.token_hex(32))
    return True


def checked(file: Path) -> Path:
    """The absolute path of a token file that can be used. Raises ConfigError for one that is not safe or empty."""
    try:
        mode, token = file.stat().st_mode & 0o777, file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {file}", f"it cannot be read ({error})", RULE,
                          "copy the head's token file here, with mode 0600") from None  # fmt: skip
    if mode & 0o077:
        raise ConfigError(f"--token-file {file}", f"others can read it (mode {mode:04o})", RULE, f"chmod 600 {file}")
    if len(token) < 16 or not token.isascii() or len(token.split()) != 1:
        raise ConfigError(
            f"--token-file {file}", f"it holds no token ({len(token)} characters)",
            "a token is one word of at least 16 ASCII characters", "remove it: `cluster start` makes a new one",
        )  # fmt: skip
    return file.absolute()
