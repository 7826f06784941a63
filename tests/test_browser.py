"""No page gets a signature or reads a key: a real Chromium tries every way that a page has.

Chromium walks once through pages of several origins. Each tries its ways, one after another, and
reports what its script could read; a relay between Chromium and the proxy keeps what went over the
wire. The relay serves the pages too, on the port under which Chromium meets the proxy: a page
of http://evil.example:PORT is then of the same origin as the proxy's answers, as after DNS
rebinding.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socketserver
import subprocess
import sys
import threading
import time
from operator import attrgetter
from pathlib import Path
from typing import Counter, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import pytest
from conftest import (
    PROXY, Agent, Keys, Proxy, clean_env, need, parse_answer, raw, short_folder,
)  # fmt: skip

pytestmark = pytest.mark.alone

# ---------------------------------------------------------------- the ways that a page has

# Each takes a URL and tells how it ended and what the script could read: an answer's status and
# text, or what else the proxy's bytes have become.
WAYS_JS = r"""
const BODY = 'tree 4b825dc642cb6eb9a060e54bf8d69288fbee4904\n';
const WITH_HEADERS = {headers: {'SSHSIG-Namespace': 'git'}};
const opened = [];

function get(mode, more) {
  return async url => {
    try {
      const answer = await fetch(url, {mode, ...more});
      const text = await answer.text();
      return {how: answer.type, read: answer.status ? answer.status + ' ' + text : text};
    } catch (e) {
      return {how: e.name, read: ''};
    }
  };
}

function post(mode, more) {
  return get(mode, {method: 'POST', body: BODY, ...more});
}

function text(frame) {
  return frame.contentDocument ? frame.contentDocument.documentElement.textContent : '';
}

function element(tag, attribute, more, look) {
  return url => new Promise(done => {
    const e = Object.assign(document.createElement(tag), more);
    const end = how => () => done({how, read: String(look ? look(e) : '')});
    e.onload = end('load');
    e.onerror = end('error');
    e[attribute] = url;
    document.body.append(e);
  });
}

function form(enctype, more) {
  return url => new Promise(done => {
    const frame = document.createElement('iframe');
    frame.name = 'frame' + opened.push(frame);
    document.body.append(frame);  // its first, empty document loads within this line
    frame.onload = () => done({how: 'load', read: text(frame)});
    const form = document.createElement('form');
    Object.assign(form, {method: 'POST', action: url, enctype, target: frame.name, ...more});
    form.append(Object.assign(document.createElement('textarea'), {name: 'tree', value: BODY}));
    document.body.append(form);
    form.submit();
  });
}

function listen(make) {
  return url => new Promise(done => {
    const source = make(url);
    const end = how => e => {
      source.close();
      done({how, read: String(e.data || '')});
    };
    source.onopen = end('open');
    source.onmessage = end('message');
    source.onerror = end('error');
  });
}

async function popup(url) {
  const child = window.open(url);
  opened.push({remove: () => child.close()});
  for (;;) {
    try {  // until it shows the answer; from then on that of another origin can't be looked at
      if (child.location.href !== 'about:blank' && child.document.readyState === 'complete')
        return {how: 'load', read: child.document.documentElement.textContent};
    } catch (e) {
      return {how: e.name, read: ''};
    }
    await new Promise(done => setTimeout(done, 5));
  }
}

function beacon(url) {
  return {how: navigator.sendBeacon(url, BODY) ? 'queued' : 'not queued', read: ''};
}

function ping(url) {
  const link = Object.assign(document.createElement('a'), {href: '#here', ping: url});
  document.body.append(link);
  link.click();
  return {how: 'clicked', read: ''};
}

function breach(url) {
  return element('iframe', 'src')(BASE + '/test/breach?' + url);
}

async function outcome(way, url) {
  const late = new Promise(done => setTimeout(done, 10000, {how: 'no end', read: ''}));
  try {
    return await Promise.race([WAYS[way](url), late]);
  } catch (e) {
    return {how: e.name, read: ''};
  }
}
"""

PAGE_JS = r"""
(async () => {
  const outcomes = [];
  for (const [way, url] of ATTEMPTS) {
    outcomes.push(await outcome(way, url));
    opened.splice(0).forEach(thing => thing.remove());
  }
  const body = JSON.stringify(outcomes);
  await fetch(BASE + '/test/end', {mode: 'no-cors', method: 'POST', body});
  location.replace(NEXT);
})();
"""

SOME = ("/sign", "/publickey")
ALL = ("/sign", "/publickey", "/healthz", "/shim")


class Way(NamedTuple):
    name: str
    cross: str  # the method that Chromium sends to another origin
    same: str  # and to the page's own
    js: str
    paths: Sequence[str] = SOME


WAYS = [
    Way("fetch cors POST", "POST", "POST", "post('cors')"),
    Way("fetch cors POST with a header", "OPTIONS", "POST", "post('cors', WITH_HEADERS)"),
    Way("fetch no-cors POST", "POST", "POST", "post('no-cors')"),
    Way("beacon", "POST", "POST", "beacon"),
    Way("ping", "POST", "POST", "ping"),
    Way("policy report", "POST", "POST", "breach"),
    Way("urlencoded form", "POST", "POST", "form('application/x-www-form-urlencoded')"),
    Way("text form without referrer", "POST", "POST", "form('text/plain', {rel: 'noreferrer'})"),
    Way("fetch cors GET", "GET", "GET", "get('cors')", ALL),
    Way("fetch cors GET with a header", "OPTIONS", "GET", "get('cors', WITH_HEADERS)"),
    Way("fetch no-cors GET", "GET", "GET", "get('no-cors')", ALL),
    Way("fetch no-cors HEAD", "HEAD", "HEAD", "get('no-cors', {method: 'HEAD'})"),
    Way("img", "GET", "GET", "element('img', 'src', {}, e => e.naturalWidth || '')"),
    Way("script", "GET", "GET", "element('script', 'src')"),
    Way("stylesheet", "GET", "GET", "element('link', 'href', {rel: 'stylesheet'})"),
    Way("iframe", "GET", "GET", "element('iframe', 'src', {}, text)", ALL),
    Way("window", "GET", "GET", "popup"),
    Way("EventSource", "GET", "GET", "listen(url => new EventSource(url))"),
    Way("WebSocket", "GET", "GET", "listen(url => new WebSocket(url.replace('http', 'ws')))"),
]
ATTEMPTS = [(way, path) for way in WAYS for path in way.paths]


class Page(NamedTuple):
    name: str
    origin: Tuple[str, str]  # host and relay
    target: Tuple[str, str] = ("127.0.0.1", "plain")
    refusal: int = 403

    @property
    def same(self) -> bool:
        return self.origin == self.target

    @property
    def lines(self) -> Counter[str]:
        """What goes over the wire, and how often."""
        return Counter(f"{w.same if self.same else w.cross} {path}" for w, path in ATTEMPTS)


PAGES = [
    # What it loads and reports goes to another port; its origin is null.
    Page("a file", ("127.0.0.1", "elsewhere")),
    Page("another port", ("127.0.0.1", "elsewhere")),
    Page("another name", ("page.example", "elsewhere")),
    # Left behind in the browser by another program that once had the port, say.
    Page("the same origin", ("127.0.0.1", "plain")),
    Page("a rebound name", ("evil.example", "plain"), ("evil.example", "plain"), 421),
]
# Under names that are let in, over plain http, a GET has no mark of a browser.
LET_IN = [
    Page("an allowed name", ("proxy.example", "allowing"), ("proxy.example", "allowing")),
    Page("elsewhere", ("page.example", "elsewhere"), ("proxy.example", "allowing")),
]
COURSE = [*PAGES, *LET_IN]

# ---------------------------------------------------------------- what stands around Chromium


class Wire(NamedTuple):
    """One request, as it went to the proxy, and what came back."""

    line: str
    request: bytes
    answer: bytes


class Course:
    """The pages, and what becomes of their attempts."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.current = 0
        self.wires: List[List[Wire]] = [[] for _ in COURSE]
        self.outcomes: List[List[Dict[str, str]]] = [[] for _ in COURSE]
        self.over = threading.Event()
        self.ports: Dict[str, int] = {}

    def record(self, wire: Wire) -> None:
        with self.changed:
            self.wires[self.current].append(wire)
            self.changed.notify_all()

    def lacking(self) -> Counter[str]:
        """What the page of now has still to send; more may come: what is 421 is tried again."""
        return COURSE[self.current].lines - Counter(w.line for w in self.wires[self.current])

    def end(self, outcomes: List[Dict[str, str]]) -> None:
        with self.changed:  # nothing tells a page when its beacon has gone out
            self.changed.wait_for(lambda: not self.lacking(), 10)
            self.outcomes[self.current] = outcomes

    def url(self, origin: Tuple[str, str]) -> str:
        host, relay = origin
        return f"http://{host}:{self.ports[relay]}"

    def page(self, number: int) -> str:
        page = COURSE[number]
        base = self.url(page.origin)
        following = f"{base}/test/over"
        if number + 1 < len(COURSE):
            following = f"{self.url(COURSE[number + 1].origin)}/test/page/{number + 1}"
        target = self.url(page.target)
        values = {
            "BASE": base,
            "NEXT": following,
            "ATTEMPTS": [(way.name, target + path) for way, path in ATTEMPTS],
        }
        script = "".join(f"const {name} = {json.dumps(v)};\n" for name, v in values.items())
        ways = ",\n".join(f"{json.dumps(way.name)}: {way.js}" for way in WAYS)
        script += f"{WAYS_JS}const WAYS = {{{ways}}};{PAGE_JS}"
        return f"<!DOCTYPE html><link rel=icon href=data:,><body><script>{script}</script>"

    def serve(self, path: str, body: bytes) -> Tuple[str, str]:
        """The relay's own answers: header fields, and text."""
        what, _, rest = path[len("/test/") :].partition("?" if "?" in path else "/")
        fields = "Content-Type: text/html\r\n"
        text = ""
        if what == "page":
            self.current = int(rest)
            text = self.page(self.current)
        elif what == "end":
            self.end(json.loads(body))
        elif what == "over":
            self.over.set()
        elif what == "breach":
            fields += f"Content-Security-Policy: img-src 'none'; report-uri {rest}\r\n"
            text = "<img src=/test/none>"
        return fields, text


class Relay(socketserver.ThreadingTCPServer):
    """Serves the pages, and hands every other request on to the proxy, byte for byte."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, course: Course, proxy_port: int) -> None:
        super().__init__(("127.0.0.1", 0), RelayHandler)
        self.course = course
        self.proxy_port = proxy_port
        self.port = self.server_address[1]
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


class RelayHandler(socketserver.StreamRequestHandler):
    server: Relay

    def handle(self) -> None:
        request = b""
        while not request.endswith(b"\r\n\r\n"):
            line = self.rfile.readline()
            if not line:  # a browser opens connections that it may never use
                return
            request += line
        length = re.search(rb"^content-length: *(\d+)", request, re.M | re.I)
        body = self.rfile.read(int(length.group(1))) if length else b""
        path = request.split(b" ", 2)[1].decode()
        if path == "/favicon.ico":  # of the windows: the pages say that they have none
            self.wfile.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        elif path.startswith("/test/"):
            fields, text = self.server.course.serve(path, body)
            fields += f"Connection: close\r\nContent-Length: {len(text.encode())}\r\n"
            self.wfile.write(f"HTTP/1.1 200 OK\r\n{fields}\r\n{text}".encode())
        else:
            line = request.partition(b" HTTP/")[0].decode()
            wire = Wire(line, request + body, raw(self.server.proxy_port, request + body))
            self.server.course.record(wire)
            self.wfile.write(wire.answer)


def chromium() -> str:
    names = "chromium-browser", "google-chrome", "google-chrome-stable"
    return next(filter(None, map(shutil.which, names)), "") or need("chromium", "chromium")


NAMES = {page.origin[0] for page in COURSE} - {"127.0.0.1", "localhost"}
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update",
    # A page in the background goes on as fast, and may open windows.
    "--disable-background-timer-throttling",
    "--disable-popup-blocking",
    # Not every browser keeps pages off the local network: the proxy must do without that.
    "--disable-features=LocalNetworkAccessChecks",
    # The pages' names lead to this machine, as rebound ones do.
    "--host-resolver-rules=" + ",".join(f"MAP {name} 127.0.0.1" for name in sorted(NAMES)),
]  # fmt: skip


class World:
    """Two proxies, of which one lets a further name in, with all that stands before them."""

    def __init__(self, home: Path, agent: Agent, key: str, stack: contextlib.ExitStack) -> None:
        self.browser = chromium()
        self.home = home
        self.agent = agent
        self.key = key
        self.stack = stack
        self.course = Course()
        self.proxies = {
            "plain": self.start_proxy(),
            "allowing": self.start_proxy("--allowed-hosts", "proxy.example"),
        }
        for name, proxy in [*self.proxies.items(), ("elsewhere", self.proxies["plain"])]:
            relay = Relay(self.course, proxy.port)
            stack.callback(relay.server_close)
            stack.callback(relay.shutdown)
            self.course.ports[name] = relay.port
        self.log = home / "chromium.log"

    def start_proxy(self, *options: str) -> Proxy:
        argv = [sys.executable, str(PROXY), "--addr", "127.0.0.1:0"]
        proxy = Proxy([*argv, "--upstream", str(self.agent.sock), *options], clean_env(self.home))
        self.stack.callback(proxy.stop)
        return proxy

    def walk(self) -> None:
        """Has Chromium make all the attempts; what is missing is for the tests to tell."""
        start = self.home / "page.html"
        start.write_text(self.course.page(0))
        with self.log.open("ab") as log:
            browser = subprocess.Popen(
                [self.browser, *FLAGS, f"--user-data-dir={self.home}/profile", start.as_uri()],
                env=clean_env(self.home), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=log, start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + 120
        try:
            while browser.poll() is None and time.monotonic() < end:
                if self.course.over.wait(0.1):
                    break
        finally:  # with all of its processes: the group is its own
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(browser.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    browser.wait(10)

    def seen(self, page: Page) -> Tuple[List[Dict[str, str]], List[Wire]]:
        """The page's outcomes, and what it sent: all that is expected of it, and nothing else."""
        number = COURSE.index(page)
        outcomes, wires = self.course.outcomes[number], self.course.wires[number]
        if len(outcomes) != len(ATTEMPTS):
            log = self.log.read_text("utf-8", "replace")[-2000:]
            pytest.fail(f"{page.name}: no report; Chromium says:\n{log}")
        assert "no end" not in [outcome["how"] for outcome in outcomes]
        sent = Counter(wire.line for wire in wires)
        assert page.lines - sent == Counter(), "these ways do not lead to the proxy"
        assert set(sent) == set(page.lines)
        return outcomes, wires


@pytest.fixture(scope="module")
def world(agent_with_key: Agent, keys: Keys) -> Iterator[World]:
    with short_folder() as home, contextlib.ExitStack() as stack:
        world = World(home, agent_with_key, keys.line("ed25519"), stack)
        world.walk()
        yield world
    for proxy in world.proxies.values():
        assert "Traceback" not in proxy.log(), proxy.log()


# ---------------------------------------------------------------- what comes of it


by_name = attrgetter("name")


def gives_nothing(answer: bytes, world: World) -> bool:
    return b"SSH SIGNATURE" not in answer and world.key.split()[1].encode() not in answer


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_a_page_gets_nothing(page: Page, world: World) -> None:
    outcomes, wires = world.seen(page)
    readable = {""}
    for wire in wires:
        answer = parse_answer(wire.answer)
        assert answer.status == page.refusal, wire
        assert gives_nothing(wire.answer, world)
        if page.same:  # it may read what it is told, and that is this
            readable |= {answer.text, f"{answer.status} {answer.text}"}
    assert {outcome["read"] for outcome in outcomes} - readable == set()


# They do find what there is to read.
READERS = {"fetch cors GET", "fetch no-cors GET", "iframe", "window"}


@pytest.mark.parametrize("page", LET_IN, ids=by_name)
def test_no_page_signs_by_a_name_that_is_let_in_and_one_under_it_reads_the_key(
        page: Page, world: World) -> None:  # fmt: skip
    outcomes, wires = world.seen(page)
    for wire in wires:
        method, path = wire.line.split()
        answer = parse_answer(wire.answer)
        if b"\r\nOrigin: " in wire.request:
            assert answer.status == 403
            assert gives_nothing(wire.answer, world)
        else:
            assert method in ("GET", "HEAD"), wire
            assert answer.status == (405 if path == "/sign" else 200)
    read = [outcome["read"] for outcome in outcomes]
    if page.same:
        found = {way.name for (way, _), text in zip(ATTEMPTS, read) if world.key in text}
        assert found >= READERS
    else:
        assert set(read) == {""}


def test_nothing_was_signed_for_any_page(world: World) -> None:
    world.seen(COURSE[-1])
    for proxy in (world.proxies["plain"], world.proxies["allowing"]):
        proxy.stop()  # from here on its log is whole
        assert "outcome=refused" in proxy.log()
        assert "outcome=signed" not in proxy.log()
