"""The live page in a real Chromium, on a real endpoint with a tiny model: what a person sees and does."""

import json
import re
from collections.abc import Iterator

import httpx
import pytest

from graftwork import artifact, base_model
from graftwork.base_model import BaseSpec
from graftwork.serving.live_page import page
from graftwork.serving.spec import ServeSpec
from graftwork.storage import Store
from tests.adapters import facts
from tests.browser import Page, browser
from tests.engines import write_lora
from tests.local_endpoint import local_endpoint
from tests.tiny import write_tiny_base

TOKEN = "correct horse battery staple"
SIZES = (375, 1440)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    tmp = tmp_path_factory.mktemp("page")
    base = write_tiny_base(tmp / "base")
    store, digest = Store(str(tmp / "root")), base_model.resolve(BaseSpec(uri=str(base))).digest
    folder = write_lora(base, tmp / "lora", 1, r=4, target_modules=["q_proj", "v_proj"])
    known = facts(base_digest=digest, prompt={"system": None})
    artifact.publish(store, "card", folder, **known, alias="latest")
    spec = ServeSpec.model_validate(
        {
            "base": str(base), "root": store.uri, "quant": {"kind": "none", "dtype": "float32"},
            "adapters": ["card@latest"], "engine": {"max_seq_len": 512, "num_threads": 1},
            "arms": [{"name": "plain", "max_new_tokens": 40}, {"name": "tuned", "adapter": "card@latest"}],
        }
    )  # fmt: skip
    with local_endpoint(spec, TOKEN) as running:
        yield running


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def enter(tab: Page, url: str, width: int, *, dark: bool = False) -> None:
    """Open the page, give the token, wait for its first figures."""
    tab.open(url, width=width, dark=dark)
    tab.until(
        "location.href.startsWith('http') && document.querySelector('#gate') && !document.querySelector('#gate').hidden"
    )
    tab.type("#token", TOKEN)
    tab.run("document.querySelector('#gate-form').requestSubmit()")
    tab.until("!document.querySelector('#board').hidden && document.querySelectorAll('#model-0 option').length > 3")
    tab.complaints = [text for text in tab.complaints if "401" not in text]  # the page's first look, without the token


def test_two_arms_answer_side_by_side_while_the_page_looks_on(tab: Page, url: str) -> None:
    enter(tab, url, 1440)
    tab.run("document.querySelector('#model-0').value = 'arm/plain'")
    tab.run("document.querySelector('#model-1').value = 'arm/tuned'")
    tab.run(
        """window.seen = [[], []];
        [0, 1].forEach((side) => new MutationObserver(() => {
          const said = document.querySelector(`#log-${side} .turn:last-child .text`);
          if (said) window.seen[side].push(said.textContent);
        }).observe(document.querySelector('#log-' + side), {childList: true, subtree: true, characterData: true}));"""
    )
    tab.type("#message", "Which airport has the ICAO code ZPPP?")
    tab.run("document.querySelector('#ask').requestSubmit()")
    tab.until("document.querySelectorAll('.turn .meta').length === 2")
    texts = tab.run("[0, 1].map((side) => document.querySelector(`#log-${side} .turn:last-child .text`).textContent)")
    for side, (model, text) in enumerate(zip(("arm/plain", "arm/tuned"), texts, strict=True)):
        body = {"model": model, "messages": [{"role": "user", "content": "Which airport has the ICAO code ZPPP?"}]}
        told = httpx.post(f"{url}/v1/chat/completions", json={**body, "max_tokens": 96},
                          headers={"authorization": f"Bearer {TOKEN}"}, timeout=60).json()  # fmt: skip
        assert text == told["choices"][0]["message"]["content"]
        pieces = list(dict.fromkeys(tab.run(f"window.seen[{side}]")))
        assert len(pieces) > 2, "it came in one piece"
        assert all(
            text.startswith(piece) for piece in pieces if piece not in ("Which airport has the ICAO code ZPPP?",)
        )
    tab.until("[...document.querySelectorAll('#traffic tr')].some((row) => row.textContent.startsWith('plain'))")
    assert "card@latest" in tab.run("document.querySelector('#adapters').textContent")
    assert tab.complaints == []


@pytest.mark.parametrize("width", SIZES)
def test_nothing_runs_over_the_edge(tab: Page, url: str, width: int) -> None:
    enter(tab, url, width)
    assert tab.run("document.documentElement.scrollWidth") <= width
    wide = tab.run(
        """[...document.querySelectorAll('body *')].filter((node) => !node.closest('.scroll')
        && node.getClientRects().length && node.getBoundingClientRect().right > innerWidth + 0.5)
        .map((node) => node.id || node.className)"""
    )
    assert wide == []


def test_what_an_endpoint_says_is_text_and_never_markup(tab: Page, url: str) -> None:
    """Names and answers that try to be HTML; the policy refuses a script that got in all the same."""
    evil = "<img src=x onerror='document.title=\"owned\"'><script>document.title='owned'</script>"
    enter(tab, url, 1440)
    engine = dict.fromkeys(
        ("running", "waiting", "kv_tokens_used", "kv_tokens_limit", "prompt_tokens", "prompt_tokens_from_cache"), 0
    )
    named = {"arm": evil, "adapter": evil, "version": evil}
    traffic = [{**named, "requests": 1, "tokens": 1, "ttft_p50_ms": None, "ttft_p95_ms": None}]
    adapters = [{"refs": [evil], "version": evil, "state": evil, "replica": evil, "size_bytes": 1}]
    now = {"clock_s": 1, "engine": engine, "replicas": [], "traffic": traffic, "adapters": adapters}
    tab.run(f"show({json.dumps(now)}, {{clock_s: 0, traffic: []}})")
    tab.run(f"turn(0, 'asked', {json.dumps(evil)}, {json.dumps(evil)})")
    assert tab.run("document.querySelectorAll('#traffic img, #adapters img, #log-0 img, td script').length") == 0
    assert evil in tab.run("document.querySelector('#traffic').textContent")
    tab.run("document.body.append(Object.assign(document.createElement('script'), {textContent: 'document.title=1'}))")
    tab.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=2\">')")
    assert tab.run("new Promise((done) => setTimeout(() => done(document.title), 300))") == "Graftwork"
    assert any("Content Security Policy" in text for text in tab.complaints)
    tab.complaints.clear()


def test_a_wrong_token_is_said_and_none_is_kept(tab: Page, url: str) -> None:
    tab.open(url, width=1440)
    tab.until("document.querySelector('#gate') && !document.querySelector('#gate').hidden")
    tab.type("#token", "wrong")
    tab.run("document.querySelector('#gate-form').requestSubmit()")
    tab.until("document.querySelector('#gate-why').className.includes('refused')")
    enter(tab, url, 1440)
    assert tab.run("JSON.stringify([localStorage.length, sessionStorage.length, document.cookie])") == '[0,0,""]'
    tab.open(url, width=1440)
    tab.until("document.querySelector('#gate') && !document.querySelector('#gate').hidden")
    tab.complaints.clear()


def test_the_page_asks_nobody_else_and_allows_only_itself() -> None:
    response = page()
    html = bytes(response.body).decode()
    assert re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:)[\w/.]""", html) == []
    assert "innerHTML" not in html
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert "unsafe" not in response.headers["content-security-policy"]
