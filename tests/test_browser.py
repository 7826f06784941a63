"""No page gets a signature or reads a key: a real Chromium tries every way that a page has.

Chromium walks once through pages of several origins. Each makes its attempts, one after another,
and reports what its script could read; a relay between Chromium and the proxy keeps what went over
the wire. The relay serves the pages too, on the port under which Chromium meets the proxy: a page
of http://evil.example:PORT is then of the same origin as the proxy's answers, as after DNS
rebinding.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Sequence, Tuple

import pytest
from conftest import (
    PROXY,
    Agent,
    Keys,
    Proxy,
    clean_env,
    need,
    parse_answer,
    raw,
    wait_for,
)

# ---------------------------------------------------------------- the ways that a page has

# Each takes an URL and tells how it ended and what the script could read: an answer's status and
# text, or what else the proxy's bytes have become.
WAYS_JS = r"""
const BODY = 'tree 4b825dc642cb6eb9a060e54bf8d69288fbee4904\n';
const HEADERS = {'SSHSIG-Namespace': 'git'};
const WITH_HEADERS = {headers: HEADERS};
const SILENT = {referrerPolicy: 'no-referrer'};
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

function xhr(method, headers) {
  return url => new Promise(done => {
    const x = new XMLHttpRequest();
    x.open(method, url);
    for (const name in headers) x.setRequestHeader(name, headers[name]);
    x.onloadend = () => done({
      how: x.status ? 'load' : 'error',
      read: x.status ? x.status + ' ' + x.responseText : '',
    });
    x.send(method === 'POST' ? BODY : null);
  });
}

function text(frame) {
  return frame.contentDocument ? frame.contentDocument.documentElement.textContent : '';
}

function rules(link) {
  try {
    return link.sheet ? link.sheet.cssRules.length || '' : '';
  } catch (e) {
    return '';
  }
}

function element(tag, attribute, more, look) {
  return url => new Promise(done => {
    const e = Object.assign(document.createElement(tag), more);
    const end = how => () => done({how, read: String(look ? look(e) : '')});
    e.onload = end('load');
    e.onerror = end('error');
    e[attribute] = url;
    document.body.append(e);
    e.offsetWidth;  // an object begins to load once it is laid out
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

function worker(url) {
  return new Promise(done => {
    const child = new Worker(url);
    child.onmessage = e => done({how: 'message', read: String(e.data)});
    child.onerror = e => done({how: 'error', read: e.message || ''});
  });
}

async function module(url) {
  return {how: 'load', read: Object.keys(await import(url)).join()};
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

function serviceWorker(way) {
  return async url => {
    await navigator.serviceWorker.register('/test/worker.js');
    const registration = await navigator.serviceWorker.ready;
    return new Promise(done => {
      const channel = new MessageChannel();
      channel.port1.onmessage = e => done(e.data);
      registration.active.postMessage([way, url], [channel.port2]);
    });
  };
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

WORKER_JS = r"""
importScripts('/test/ways.js');
onmessage = async e => e.ports[0].postMessage(await outcome(...e.data));
"""

PAGE_JS = r"""
function tell(path, body) {
  return fetch(BASE + path, {mode: 'no-cors', method: 'POST', body});
}

(async () => {
  for (const [number, way, url] of ATTEMPTS) {
    await tell('/test/begin/' + number);
    await tell('/test/end/' + number, JSON.stringify(await outcome(way, url)));
    opened.splice(0).forEach(thing => thing.remove());
  }
  if (window === top) location.replace(NEXT);
  else parent.postMessage('', '*');
})();
"""

SOME = ("/sign", "/publickey")
ALL = ("/sign", "/publickey", "/healthz", "/shim")


class Way(NamedTuple):
    name: str
    cross: str  # the method that Chromium sends to another origin, "" where it sends nothing
    same: str  # and to the page's own
    js: str
    paths: Sequence[str] = SOME


WAYS = [
    Way("fetch cors POST", "POST", "POST", "post('cors')"),
    Way("fetch cors POST with a header", "OPTIONS", "POST", "post('cors', WITH_HEADERS)"),
    Way("fetch no-cors POST", "POST", "POST", "post('no-cors')"),
    Way("fetch no-cors POST without referrer", "POST", "POST", "post('no-cors', SILENT)"),
    Way("fetch no-cors POST kept alive", "POST", "POST", "post('no-cors', {keepalive: true})"),
    Way("fetch same-origin POST", "", "POST", "post('same-origin')"),
    Way("fetch navigate POST", "", "", "post('navigate')"),
    Way("fetch cors PUT", "OPTIONS", "PUT", "post('cors', {method: 'PUT'})"),
    Way("XMLHttpRequest POST", "POST", "POST", "xhr('POST', {})"),
    Way("XMLHttpRequest POST with a header", "OPTIONS", "POST", "xhr('POST', HEADERS)"),
    Way("beacon", "POST", "POST", "beacon"),
    Way("ping", "POST", "POST", "ping"),
    Way("policy report", "POST", "POST", "breach"),
    Way("urlencoded form", "POST", "POST", "form('application/x-www-form-urlencoded')"),
    Way("multipart form", "POST", "POST", "form('multipart/form-data')"),
    Way("text form", "POST", "POST", "form('text/plain')"),
    Way("text form without referrer", "POST", "POST", "form('text/plain', {rel: 'noreferrer'})"),
    Way("fetch cors GET", "GET", "GET", "get('cors')", ALL),
    Way("fetch cors GET with a header", "OPTIONS", "GET", "get('cors', WITH_HEADERS)"),
    Way("fetch no-cors GET", "GET", "GET", "get('no-cors')", ALL),
    Way("fetch no-cors GET without referrer", "GET", "GET", "get('no-cors', SILENT)"),
    Way("fetch no-cors HEAD", "HEAD", "HEAD", "get('no-cors', {method: 'HEAD'})"),
    Way("fetch same-origin GET", "", "GET", "get('same-origin')"),
    Way("fetch navigate GET", "", "", "get('navigate')"),
    Way("XMLHttpRequest GET", "GET", "GET", "xhr('GET', {})"),
    Way("img", "GET", "GET", "element('img', 'src', {}, e => e.naturalWidth || '')"),
    Way("script", "GET", "GET", "element('script', 'src')"),
    Way("module script", "GET", "GET", "module"),
    Way("stylesheet", "GET", "GET", "element('link', 'href', {rel: 'stylesheet'}, rules)"),
    Way("prefetch", "GET", "GET", "element('link', 'href', {rel: 'prefetch'})"),
    Way("iframe", "GET", "GET", "element('iframe', 'src', {}, text)", ALL),
    Way("object", "GET", "GET", "element('object', 'data', {}, text)"),
    Way("window", "GET", "GET", "popup"),
    Way("worker", "", "GET", "worker"),
    Way("EventSource", "GET", "GET", "listen(url => new EventSource(url))"),
    Way("WebSocket", "GET", "GET", "listen(url => new WebSocket(url.replace('http', 'ws')))"),
]
SERVICE_WORKER = [
    way._replace(name=f"service worker {way.name}", js=f"serviceWorker({json.dumps(way.name)})")
    for way in WAYS
    if way.name.startswith("fetch")
]


class Page(NamedTuple):
    name: str
    origin: Tuple[str, str]  # host and relay
    target: Tuple[str, str] = ("127.0.0.1", "plain")
    refusal: int = 403
    ways: Sequence[Way] = WAYS

    @property
    def same(self) -> bool:
        return self.origin == self.target


def own_page(name: str, host: str, relay: str, refusal: int, *more: Way) -> Page:
    """One of the same origin as the proxy's answers."""
    return Page(name, (host, relay), (host, relay), refusal, [*WAYS, *more])


# What a file and a sandboxed frame load and report goes to another port; their origin is null.
FILE = Page("a file", ("127.0.0.1", "elsewhere"))
SANDBOXED = Page("a sandboxed frame", ("127.0.0.1", "elsewhere"))
PAGES = [
    FILE,
    SANDBOXED,
    Page("another port", ("127.0.0.1", "elsewhere")),
    Page("another name", ("page.example", "elsewhere")),
    Page("localhost", ("localhost", "elsewhere"), ways=SERVICE_WORKER),
    # Left behind in the browser by another program that once had the port, say.
    own_page("the same origin", "127.0.0.1", "plain", 403, *SERVICE_WORKER),
    own_page("the same origin by name", "localhost", "plain", 403),
    own_page("a rebound name", "evil.example", "plain", 421),
    own_page("a rebound single label", "evil", "plain", 421),
    own_page("a rebound local name", "evil.local", "plain", 421),
]
# Under names that are let in, over plain http, a GET has no mark of a browser.
LET_IN = [
    own_page("an allowed name", "proxy.example", "allowing", 403),
    own_page("an internal name", "evil.internal", "plain", 403),
    Page("elsewhere", ("page.example", "elsewhere"), ("proxy.example", "allowing")),
]


class Attempt(NamedTuple):
    number: int
    page: Page
    way: Way
    path: str

    @property
    def method(self) -> str:
        return self.way.same if self.page.same else self.way.cross

    @property
    def line(self) -> str:
        return f"{self.method} {self.path}"

    def __str__(self) -> str:
        return f"{self.page.name}: {self.way.name} {self.path}"


COURSE = [*PAGES, *LET_IN]
ATTEMPTS = [
    Attempt(number, *attempt)
    for number, attempt in enumerate(
        (page, way, path) for page in COURSE for way in page.ways for path in way.paths
    )
]

# ---------------------------------------------------------------- what stands around Chromium


class Wire(NamedTuple):
    """One request, as it went to the proxy, and what came back."""

    request: bytes
    answer: bytes
    port: int  # from which the relay called the proxy
    earlier: int  # calls from the same port

    @property
    def line(self) -> str:
        return self.request.partition(b" HTTP/")[0].decode()


class Outcome(NamedTuple):
    how: str
    read: str
    wires: List[Wire]  # one, or more where Chromium repeats what is answered with 421


class Course:
    """What becomes of the attempts, and the pages that make them."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.current = -1
        self.wires: Dict[int, List[Wire]] = {}
        self.outcomes: Dict[int, Outcome] = {}
        self.over = threading.Event()
        self.ports: Dict[str, int] = {}
        self.calls: Dict[Tuple[int, int], int] = {}

    def count_call(self, proxy_port: int, port: int) -> int:
        """How often the proxy was called from PORT before: systems use them again."""
        with self.changed:
            before = self.calls.get((proxy_port, port), 0)
            self.calls[proxy_port, port] = before + 1
            return before

    def record(self, number: int, wire: Wire) -> None:
        # The repetition of a beacon may come when the next attempt is on: their paths differ.
        if number > 0 and wire.line == ATTEMPTS[number - 1].line:
            number -= 1
        with self.changed:
            self.wires.setdefault(number, []).append(wire)
            self.changed.notify_all()

    def end(self, number: int, how: str, read: str) -> None:
        with self.changed:
            if ATTEMPTS[number].method:  # nothing tells a page when its beacon has gone out
                self.changed.wait_for(lambda: number in self.wires, 10)
            self.outcomes[number] = Outcome(how, read, self.wires.setdefault(number, []))

    def url(self, origin: Tuple[str, str]) -> str:
        host, relay = origin
        return f"http://{host}:{self.ports[relay]}"

    def page(self, number: int, frame: bool = False) -> str:
        page = COURSE[number]
        base = self.url(page.origin)
        following = f"{base}/test/over"
        if number + 1 < len(COURSE):
            following = f"{self.url(COURSE[number + 1].origin)}/test/page/{number + 1}"
        values = {
            "BASE": base,
            "NEXT": following,
            "ATTEMPTS": [
                (attempt.number, attempt.way.name, self.url(page.target) + attempt.path)
                for attempt in ATTEMPTS
                if attempt.page is page
            ],
        }
        script = "".join(f"const {name} = {json.dumps(v)};\n" for name, v in values.items())
        head = f"<!DOCTYPE html><link rel=icon href=data:,><body><script>{script}</script>"
        if page is SANDBOXED and not frame:
            return (
                f"{head}<script>onmessage = () => location.replace(NEXT);</script>"
                "<iframe sandbox='allow-scripts allow-forms allow-popups' "
                f"src=/test/frame/{number}></iframe>"
            )
        return f"{head}<script src={base}/test/ways.js></script><script>{PAGE_JS}</script>"

    def serve(self, path: str, body: bytes) -> Tuple[str, str]:
        """The relay's own answers: header fields, and text."""
        what, _, rest = path[len("/test/") :].partition("?" if "?" in path else "/")
        fields = "Content-Type: text/html\r\n"
        text = ""
        if what == "page":
            text = self.page(int(rest))
        elif what == "frame":
            text = self.page(int(rest), frame=True)
        elif what == "begin":
            self.current = int(rest)
        elif what == "end":
            self.end(int(rest), **json.loads(body))
        elif what == "over":
            self.over.set()
        elif what == "breach":
            fields += f"Content-Security-Policy: img-src 'none'; report-uri {rest}\r\n"
            text = "<img src=/test/none>"
        elif what.endswith(".js"):
            fields = "Content-Type: text/javascript\r\n"
            ways = ",\n".join(f"{json.dumps(w.name)}: {w.js}" for w in [*WAYS, *SERVICE_WORKER])
            text = WORKER_JS if what == "worker.js" else f"{WAYS_JS}const WAYS = {{{ways}}};"
        return fields, text


class Relay(socketserver.ThreadingTCPServer):
    """Serves the pages, and hands every other request on to the proxy, byte for byte."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, course: Course, proxy_port: int) -> None:
        super().__init__(("127.0.0.1", 0), RelayHandler)
        self.course = course
        self.proxy_port = proxy_port
        self.port = self.server_address[1]
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, address: object) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # Chromium went away: nothing to tell
            super().handle_error(request, address)


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
            self.wfile.write(self.hand_on(request + body))

    def hand_on(self, request: bytes) -> bytes:
        course = self.server.course
        number = course.current
        answer = b""
        with socket.create_connection(("127.0.0.1", self.server.proxy_port), 10) as s:
            port = s.getsockname()[1]
            earlier = course.count_call(self.server.proxy_port, port)
            s.sendall(request)
            while True:
                piece = s.recv(65536)
                if not piece:
                    break
                answer += piece
        course.record(number, Wire(request, answer, port, earlier))
        return answer


def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        path = shutil.which(name)
        if path:
            return path
    return need("chromium", "chromium")


NAMES = {page.origin[0] for page in COURSE} - {"127.0.0.1", "localhost"}
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-breakpad",
    # A page in the background goes on as fast, and may open windows.
    "--disable-background-timer-throttling",
    "--disable-popup-blocking",
    # Not every browser keeps pages off the local network: the proxy must do without that.
    "--disable-features=LocalNetworkAccessChecks",
    # The pages' names lead to this machine, as rebound ones do.
    "--host-resolver-rules=" + ",".join(f"MAP {name} 127.0.0.1" for name in sorted(NAMES)),
]


class World:
    """Two proxies, of which one lets a further name in, with all that stands before them."""

    def __init__(self, home: Path, keys: Keys, stack: contextlib.ExitStack) -> None:
        self.browser = chromium()
        self.home = home
        self.key = keys.line("ed25519")
        self.agent = Agent(home / "agent")
        stack.callback(self.agent.stop)
        self.agent.add(keys["ed25519"])
        self.stack = stack
        self.course = Course()
        self.proxies = {
            "plain": self.start_proxy(),
            "allowing": self.start_proxy("--allowed-hosts", "proxy.example"),
        }
        self.proxies["elsewhere"] = self.proxies["plain"]
        # It gets what pages are refused, without what makes it a page's.
        self.other = self.start_proxy()
        for name, proxy in self.proxies.items():
            relay = Relay(self.course, proxy.port)
            stack.callback(relay.stop)
            self.course.ports[name] = relay.port
        self.log = home / "chromium.log"

    def start_proxy(self, *options: str) -> Proxy:
        argv = [sys.executable, str(PROXY), "--addr", "127.0.0.1:0"]
        proxy = Proxy([*argv, "--upstream", str(self.agent.sock), *options], clean_env(self.home))
        self.stack.callback(proxy.stop)
        return proxy

    def start_browser(
        self, *arguments: str, stdout: int = subprocess.DEVNULL
    ) -> subprocess.Popen[bytes]:
        profile = tempfile.mkdtemp(prefix="profile.", dir=self.home)
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [self.browser, *FLAGS, f"--user-data-dir={profile}", *arguments],
                env=clean_env(self.home),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=log,
                start_new_session=True,
            )

    def walk(self) -> None:
        """Has Chromium make all the attempts; what is missing is for the tests to tell."""
        start = self.home / "page.html"
        start.write_text(self.course.page(0))
        browser = self.start_browser(start.as_uri())
        try:
            end = time.monotonic() + 120
            while browser.poll() is None and time.monotonic() < end:
                if self.course.over.wait(0.1):
                    break
        finally:
            stop_browser(browser)

    def outcome(self, attempt: Attempt) -> Outcome:
        outcome = self.course.outcomes.get(attempt.number)
        if not outcome:
            log = self.log.read_text("utf-8", "replace")[-2000:]
            pytest.fail(f"{attempt}: no report; Chromium says:\n{log}")
        assert outcome.how != "no end"
        sent = {attempt.line} if attempt.method else set()
        assert {wire.line for wire in outcome.wires} == sent, outcome
        return outcome

    def logged(self, attempt: Attempt, wire: Wire) -> str:
        """The outcome and status that the proxy's log tells of."""
        proxy = self.proxies[attempt.page.target[1]]

        def lines() -> List[str]:
            parts = proxy.log().split(f" peer=127.0.0.1:{wire.port} ")
            return parts[wire.earlier : -1]

        line = wait_for(lines, message=f"the log's line of {attempt}")[0]
        return " ".join(re.findall(r"(?:outcome|status)=(\w+)", line.rpartition("\n")[2]))


def stop_browser(browser: subprocess.Popen[bytes]) -> None:
    """Ends it with all of its processes: the group is its own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(browser.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            browser.wait(10)
    if browser.stdout:
        browser.stdout.close()


@pytest.fixture(scope="module")
def world(keys: Keys) -> Iterator[World]:
    home = Path(tempfile.mkdtemp(prefix="sap.", dir="/tmp"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        world = World(home, keys, stack)
        world.walk()
        yield world
    for proxy in world.proxies.values():
        assert "Traceback" not in proxy.log(), proxy.log()


# ---------------------------------------------------------------- what comes of it


def attempts(
    pages: Sequence[Page], lines: Sequence[str] = (), ways: Sequence[str] = ()
) -> List[object]:
    """Those of the PAGES, where LINES or WAYS are given only those of them."""
    return [
        pytest.param(attempt, id=str(attempt))
        for attempt in ATTEMPTS
        if attempt.page in pages
        and (not lines or attempt.line in lines)
        and (not ways or attempt.way.name in ways)
    ]


def gives_nothing(wire: Wire, world: World) -> bool:
    return b"SSH SIGNATURE" not in wire.answer and world.key.split()[1].encode() not in wire.answer


@pytest.mark.parametrize("attempt", attempts(PAGES))
def test_a_page_gets_nothing(attempt: Attempt, world: World) -> None:
    outcome = world.outcome(attempt)
    readable = {""}
    for wire in outcome.wires:
        answer = parse_answer(wire.answer)
        assert answer.status == attempt.page.refusal, wire
        assert gives_nothing(wire, world)
        assert not [name for name in answer.headers if name.startswith("access-control-")]
        assert world.logged(attempt, wire) == f"refused {answer.status}"
        if attempt.page.same:  # it may read what it is told, and that is this
            readable |= {answer.text, f"{answer.status} {answer.text}"}
    assert outcome.read in readable


def mark_free(request: bytes, port: int) -> bytes:
    """REQUEST as it would come from a program."""
    head, _, body = request.partition(b"\r\n\r\n")
    first, *fields = head.split(b"\r\n")
    kept = [f for f in fields if not re.match(rb"(origin|host|sec-fetch-[a-z-]*):", f, re.I)]
    return b"\r\n".join([first, b"Host: 127.0.0.1:%d" % port, *kept, b"", body])


GOODS = {
    "POST /sign": rb"-----BEGIN SSH SIGNATURE-----\n[\s\S]+\n-----END SSH SIGNATURE-----\n",
    "GET /publickey": rb"ssh-ed25519 [A-Za-z0-9+/=]+ ed25519@test\n",
    "GET /healthz": rb"ok\n",
    "GET /shim": rb"#!/bin/sh\n[\s\S]+\n",
}


@pytest.mark.parametrize("attempt", attempts(PAGES, list(GOODS)))
def test_it_is_the_marks_of_a_page_that_are_refused(attempt: Attempt, world: World) -> None:
    for wire in world.outcome(attempt).wires:
        answer = parse_answer(raw(world.other.port, mark_free(wire.request, world.other.port)))
        assert answer.status == 200, answer
        assert re.fullmatch(GOODS[attempt.line], answer.body)


@pytest.mark.parametrize("attempt", attempts(LET_IN))
def test_no_page_signs_by_a_name_that_is_let_in(attempt: Attempt, world: World) -> None:
    outcome = world.outcome(attempt)
    for wire in outcome.wires:
        answer = parse_answer(wire.answer)
        assert not [name for name in answer.headers if name.startswith("access-control-")]
        if b"\r\nOrigin: " in wire.request:
            assert answer.status == 403
            assert gives_nothing(wire, world)
            assert world.logged(attempt, wire) == "refused 403"
        elif attempt.path == "/sign":
            assert attempt.method in ("GET", "HEAD"), wire
            assert answer.status == 405
            assert world.logged(attempt, wire) == "refused 405"
        else:
            assert attempt.method in ("GET", "HEAD"), wire
            assert answer.status == 200
            assert world.logged(attempt, wire) == "served 200"
    if not attempt.page.same:
        assert outcome.read == ""


# It shows as well that these ways do find what there is to read.
READERS = (
    "fetch cors GET",
    "fetch no-cors GET",
    "XMLHttpRequest GET",
    "iframe",
    "object",
    "window",
)


@pytest.mark.parametrize(
    "attempt", attempts([p for p in LET_IN if p.same], ["GET /publickey"], READERS)
)
def test_a_page_under_a_name_that_is_let_in_reads_the_public_key(
    attempt: Attempt, world: World
) -> None:
    assert world.outcome(attempt).read in (f"{world.key}\n", f"200 {world.key}\n")


@pytest.mark.parametrize("relay", ["plain", "allowing"])
def test_nothing_was_signed_for_any_page(relay: str, world: World) -> None:
    reached = [a for a in ATTEMPTS if a.page.target[1] == relay and a.method]
    world.logged(reached[-1], world.outcome(reached[-1]).wires[-1])  # the log is that far
    assert "outcome=signed" not in world.proxies[relay].log()


@pytest.mark.parametrize(("path", "shown"), [("/healthz", "ok"), ("/publickey", "ssh-ed25519 ")])
def test_the_address_bar_is_served(path: str, shown: str, world: World) -> None:
    world.course.current = -1
    world.course.wires.pop(-1, None)
    url = f"http://127.0.0.1:{world.course.ports['plain']}{path}"
    browser = world.start_browser("--dump-dom", url, stdout=subprocess.PIPE)
    try:
        page, _ = browser.communicate(timeout=60)
    finally:
        stop_browser(browser)
    (wire,) = world.course.wires[-1]
    assert wire.line == f"GET {path}"
    assert b"\r\nSec-Fetch-Site: none\r\n" in wire.request
    assert parse_answer(wire.answer).status == 200
    assert shown in page.decode()
