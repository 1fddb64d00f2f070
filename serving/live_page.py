"""The page at GET /: one file, nothing fetched from elsewhere, its own script and style and nothing else may run."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.responses import HTMLResponse

_FILE = Path(__file__).parent / "page" / "index.html"


def page() -> HTMLResponse:
    """The page with its security headers. It holds no data: all of that comes by /v1, with the token."""
    html, headers = _loaded()
    return HTMLResponse(html, headers=headers)


@cache
def _loaded() -> tuple[str, dict[str, str]]:
    html = _FILE.read_text(encoding="utf-8")
    policy = [
        "default-src 'none'",
        f"script-src {_hashes(html, 'script')}",
        f"style-src {_hashes(html, 'style')}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    headers = {
        "content-security-policy": "; ".join(policy),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return html, headers


def _hashes(html: str, tag: str) -> str:
    """The sha256 sources of the inline elements, as a Content-Security-Policy names them."""
    bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
    assert bodies, f"the page has a <{tag}>"
    digests = [base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies]
    return " ".join(f"'sha256-{digest}'" for digest in digests)
