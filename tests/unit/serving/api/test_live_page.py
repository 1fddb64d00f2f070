"""The live page in a real Chromium, on a real endpoint with a tiny model: what a person sees and does."""

import functools
import http.server
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest

from graftwork.artifacts import publish as artifact
from graftwork.base import load as base_model
from graftwork.base.source import BaseSpec
from graftwork.serving.api.status import page
from graftwork.serving.spec import ServeSpec
from graftwork.storage.store import Store
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
            "base": str(base),
            "root": store.uri,
            "quant": {"kind": "none", "dtype": "float32"},
            "adapters": ["card@latest"],
            "engine": {"max_seq_len": 512, "num_threads": 1},
            "arms": [{"name": "plain", "max_new_tokens": 40}, {"name": "tuned", "adapter": "card@latest"}],
        }
    )
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
        told = httpx.post(
            f"{url}/v1/chat/completions",
            json={**body, "max_tokens": 96},
            headers={"authorization": f"Bearer {TOKEN}"},
            timeout=60,
        ).json()
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


@pytest.fixture(scope="module")
def open_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An endpoint as a laptop has it: no token, so that the admin's routes are open to whoever reaches them."""
    tmp = tmp_path_factory.mktemp("open")
    spec = {
        "base": str(write_tiny_base(tmp / "base")),
        "root": str(tmp / "root"),
        "quant": {"kind": "none"},
        "engine": {"max_seq_len": 256, "num_threads": 1},
    }
    with local_endpoint(ServeSpec.model_validate(spec)) as running:
        yield running


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page of another site on this machine."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "index.html").write_text("<!doctype html><title>foreign</title>")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}/index.html"
        server.shutdown()


def responses(url: str, route: str) -> dict[str, int]:
    """How often a route has answered with each status."""
    httpx.get(f"{url}/health")
    metrics = httpx.get(f"{url}/metrics").text
    found = re.findall(r'http_responses_total{method="\w+",route="([^"]+)",status="(\d+)"} (\d+)', metrics)
    assert "/health" in {path for path, _, _ in found}
    counts: Counter[str] = Counter()
    for path, status, count in found:
        counts[status] += int(count) if path == route else 0
    return {status: count for status, count in counts.items() if count}


ATTACK = """(async (url) => {
  const tried = {};
  const attempt = async (name, make) => {
    try {
      const answer = await make();
      tried[name] = answer.type + " " + answer.status + " " + (await answer.text()).slice(0, 40);
    } catch (error) { tried[name] = "failed"; }
  };
  const body = JSON.stringify({adapter: "card@latest", version: "latest"});
  for (const type of ["text/plain", "application/x-www-form-urlencoded", "application/json"])
    for (const mode of ["no-cors", "cors"])
      await attempt(`${mode} ${type}`, () => fetch(url + "/v1/admin/adapters/promote",
        {method: "POST", mode, headers: {"content-type": type}, body}));
  const unload = url + "/v1/admin/adapters/unload";
  await attempt("blob", () => fetch(unload, {method: "POST", mode: "no-cors", body: new Blob([body])}));
  await attempt("beacon", async () => new Response(String(navigator.sendBeacon(unload, body))));
  await attempt("models", () => fetch(url + "/v1/models"));
  await attempt("models opaque", () => fetch(url + "/v1/models", {mode: "no-cors"}));
  return tried;
})(%s)"""


def test_a_page_of_another_origin_neither_acts_nor_reads(tab: Page, open_url: str, foreign: str) -> None:
    tab.open(foreign, width=1440)
    tab.until("document.title === 'foreign'")
    tried = tab.run(ATTACK % json.dumps(open_url))
    assert len(tried) == 10
    for name, seen in tried.items():
        assert "base" not in seen, f"{name}: {seen}"
        assert seen == "failed" or seen.startswith("opaque 0") or name == "beacon", f"{name}: {seen}"
    assert responses(open_url, "/v1/admin/adapters/promote") == {}, "no request has come to the route"
    assert responses(open_url, "/v1/admin/adapters/unload") == {}
    assert responses(open_url, "unmatched")["403"] >= 5, "and they did come to the endpoint"
    tab.run(
        f"document.body.innerHTML = '<iframe name=f></iframe><form method=post target=f enctype=text/plain "
        f'action="{open_url}/v1/admin/adapters/unload"><input name=a value=b></form>\''
    )
    before = responses(open_url, "unmatched")["403"]
    tab.run("document.forms[0].submit()")
    deadline = time.monotonic() + 20
    while responses(open_url, "unmatched")["403"] == before:
        assert time.monotonic() < deadline, "the form was never sent"
    assert responses(open_url, "/v1/admin/adapters/unload") == {}
    tab.complaints.clear()


def test_a_name_that_is_bound_to_this_address_reads_nothing(
    open_url: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """DNS rebinding: the name of the page's own site leads to the endpoint, so the browser lets the page read it."""
    rules = f"--host-resolver-rules=MAP evil.example {open_url.removeprefix('http://')}"
    with browser(tmp_path_factory.mktemp("rebound"), rules) as tab:
        tab.open("http://evil.example/", width=1440)
        tab.until("location.host === 'evil.example' && document.readyState === 'complete'")
        assert "host_not_allowed" in tab.run("document.body.textContent")
        seen = tab.run("fetch('/v1/models').then(async (answer) => answer.status + await answer.text())")
        assert seen.startswith("403")
        assert "host_not_allowed" in seen


def test_the_endpoints_own_page_works_without_a_token(tab: Page, open_url: str) -> None:
    tab.open(open_url.replace("127.0.0.1", "localhost"), width=1440)
    tab.until("location.host.startsWith('localhost') && document.querySelectorAll('#model-0 option').length > 0")
    tab.type("#message", "Hello")
    tab.run("document.querySelector('#ask').requestSubmit()")
    tab.until("document.querySelectorAll('.turn .meta').length >= 1")
    assert tab.complaints == []
