"""Keys for servers and clients on loopback, by openssl, in a folder of the test's own."""

import subprocess
from pathlib import Path

CA_SUBJECT = "/CN=graftwork-tests"
CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
OLD = ("-not_before", "20200101000000Z", "-not_after", "20210101000000Z")


def authority(folder: Path) -> None:
    """ca.crt and ca.key."""
    _openssl(folder, "req", "-x509", *CURVE, "-keyout", "ca.key", "-out", "ca.crt", "-days", "2", "-subj", CA_SUBJECT)


def certificate(folder: Path, name: str, subject: str, *, expired: bool = False) -> None:
    """NAME.crt and NAME.key, signed by the folder's authority, for 127.0.0.1."""
    _openssl(folder, "req", *CURVE, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", subject)
    (folder / "loopback.ext").write_text("subjectAltName=IP:127.0.0.1\n")
    _openssl(
        folder,
        "x509",
        "-req",
        "-in",
        f"{name}.csr",
        "-CA",
        "ca.crt",
        "-CAkey",
        "ca.key",
        "-CAcreateserial",
        "-out",
        f"{name}.crt",
        "-extfile",
        "loopback.ext",
        *(OLD if expired else ("-days", "2")),
    )


def _openssl(folder: Path, *words: str) -> None:
    done = subprocess.run(["openssl", *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
