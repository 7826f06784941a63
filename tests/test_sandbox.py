"""Getting through: what the shim does where nothing listens on its own loopback."""

import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest
import test_shim as t
from conftest import SHIM, Keys, Repository, cannot_run, need, rows, run, short_folder, wait_for
from test_shim import TOKENS, URL, Done, Liar, Served, Shim, answer, fine, said, sent

guarded, served, shim, one_shim = t.guarded, t.served, t.shim, t.one_shim
signed, well_asked = t.signed, t.well_asked
pytestmark = t.on_linux

# What keeps curl from the proxy of an agent's sandbox, as those set it.
NO_PROXY = "localhost,127.0.0.1,::1,169.254.0.0/16,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16"

ERRORS = ["500", "502", "503", "504"]  # of a proxy behind which nothing listens
# What may be answered instead, by the names that the tables have for it.
ANSWERS = {
    "ours": answer(b"ok\n"),
    "401": answer(b"wants a token\n", "401 Unauthorized"),
    "moved": answer(b"", "302 Found", "nginx", Location="http://127.0.0.1:3128/"),
    "page": answer(b"<html>", server="nginx"),
    "blocked": answer(b"", "403 X", None, **{"X-Proxy-Error": "blocked-by-allowlist"}),
    "sbx": answer(b"Blocked by network policy: domain localhost:7221", "403 Forbidden", None),
    "407": answer(b"", "407 X", None, **{"Proxy-Authenticate": "Basic"}),
    "silence": b"",
    **{status: answer(b"X", f"{status} X", None) for status in ERRORS},
}


class Forward(Liar):
    """A forward proxy, which gets what it is asked for from PORT here, or has its own ANSWERS."""

    def __init__(self, port: int, *answers: str, sock: Any = None) -> None:
        self.target = port
        super().__init__(*(answers or [""]), sock=sock)

    def answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            self.requests.append(t.read_request(connection))
            what = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            connection.sendall(ANSWERS[what] if what else self.forward(self.requests[-1]))

    def forward(self, request: bytes) -> bytes:
        request = re.sub(rb"^(\w+) http://[^/]+", rb"\1 ", request)
        request = request.replace(b"\r\nProxy-Connection: Keep-Alive", b"\r\nConnection: close")
        with socket.create_connection(("127.0.0.1", self.target), 10) as s:
            s.sendall(request)
            return s.makefile("rb").read()


# ---------------------------------------------------------------- a network and names of their own

# Listens where it is told to, and sends the socket out to who told it.
LISTEN = """
import fcntl, socket, struct
any = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
fcntl.ioctl(any, 0x8914, struct.pack("16sH14x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP
ours = struct.pack("16sHH4s8x", b"lo:1", socket.AF_INET, 0, socket.inet_aton("10.7.0.1"))
fcntl.ioctl(any, 0x8916, ours)  # SIOCSIFADDR: all of 10.0.0.0/8
with socket.socket(fileno=0) as outside:
    outside.sendall(b"ready")
    while where := outside.recv(100).decode():
        host, _, port = where.partition(":")
        with socket.create_server((host, int(port))) as listens:
            socket.send_fds(outside, [b"x"], [listens.fileno()])
"""
# Who may be there, by the letters that the tables have for them.
PLACES = {
    "L": "localhost:3128",  # a sandbox's way out
    "G": "gateway.docker.internal:3128",
    "C": "proxy.example:3128",  # a company's
    "H": "localhost:7221",
    "D": "host.docker.internal:7221",
    "P": "host.containers.internal:7221",
}
HOSTS = "127.0.0.1 localhost\n10.7.0.2 here.localhost\n" + "".join(
    f"10.7.0.{number} {PLACES[who].partition(':')[0]}\n" for number, who in enumerate("DPGC", 2)
)
PROXIES = {**{who: f"http://{PLACES[who]}" for who in "GC"}, "L": "http://u:pa55@localhost:3128"}


class Apart:
    """The network of a container, or of a sandbox, and its names, answered to from outside."""

    def __init__(self, folder: Path) -> None:
        (folder / "hosts").write_text(HOSTS)
        new = ["--user", "--map-root-user"] if os.geteuid() else []
        old = ["--user", "--preserve-credentials"] if os.geteuid() else []
        argv = [need("unshare", "util-linux"), *new, "--net", "--mount", "sh", "-c",
                'mount --bind hosts /etc/hosts && exec "$@"', "sh", sys.executable, "-c", LISTEN]
        self.socket, inner = socket.socketpair()
        with inner:
            self.process = subprocess.Popen(argv, stdin=inner, cwd=folder)
        self.socket.settimeout(10)
        if self.socket.recv(5) != b"ready":
            cannot_run("no network namespace can be made here: run the tests as root")
        self.enter = [need("nsenter", "util-linux"), f"--target={self.process.pid}", *old,
                      "--net", "--mount", "env", "--chdir"]  # fmt: skip
        self.there: Dict[str, Forward] = {}

    def place(self, who: str, port: int, *answers: str) -> None:
        """Has that one be there, until the test ends."""
        self.socket.sendall(PLACES[who].encode())
        _, [fd], *_ = socket.recv_fds(self.socket, 1, 1)
        self.there[who] = Forward(port, *answers, sock=socket.socket(fileno=fd))

    def asked(self) -> List[str]:
        """Who was asked for what: for nothing twice, and for /healthz without a token."""
        found = []
        for who, forward in self.there.items():
            for request in forward.requests:
                found.append(f"{who}:{request.split()[1].decode().replace('http://', '')}")
                assert not found[-1].endswith("/healthz") or sent(request, "Authorization") is None
        assert len(set(found)) == len(found), found
        return found


@pytest.fixture(scope="module")
def the_place() -> Iterator[Apart]:
    with short_folder() as folder:
        apart = Apart(folder)
        yield apart
        apart.socket.close()
        apart.process.wait(10)


@pytest.fixture
def apart(the_place: Apart) -> Iterator[Apart]:
    yield the_place
    while the_place.there:
        the_place.there.popitem()[1].close()


def variables(words: str) -> Dict[str, str]:
    """Of the shim's own the names are short, and those who may be there stand for their URLs."""
    env = {"NO_PROXY": NO_PROXY, "no_proxy": NO_PROXY}
    for word in words.split():
        name, _, value = word.partition("=")
        own = name in ("URL", "PUBKEY_URL", "TOKEN", "TOKEN_FILE")
        env[f"SSH_AGENT_PROXY_{name}" if own else name] = PROXIES.get(value, value)
    return env


@pytest.fixture
def ask_in(apart: Apart, guarded: Served, served: Served) -> Callable[..., Done[bytes]]:
    """Runs the shim where those are that THERE names: L, which leads to ours; D=page, another;
    L=ours,502, ours at first; docker or podman, where this is a container; and empty, where the
    token file is."""

    def ask(shim: Shim, words: str, there: str, way: str = "file") -> Done[bytes]:
        if "empty" in there:
            t.home_token(shim, "")
        text = SHIM.read_text()
        for name, marker in (("docker", "/.dockerenv"), ("podman", "/run/.containerenv")):
            assert text.count(f" {marker} ") == 1
            text = text.replace(marker, "/dev/null" if name in there else "/nowhere")
        shim.argv[-1] = str(shim.file("shim", text.encode()))
        shim.argv = [*apart.enter, str(shim.folder), *shim.argv]
        for who, _, answers in (one.partition("=") for one in there.split() if one[0].isupper()):
            ours = guarded if TOKEN in words else served
            apart.place(who, ours.proxy.port, *answers.split(","))
        return t.ask(shim, way, variables(words))

    return ask


# ---------------------------------------------------------------- which way is taken

TOKEN = f"TOKEN={TOKENS['variable']} "
HERE, NAME = "http://127.0.0.1:7221/sign", "host.docker.internal:7221"
NOTHING = f"nothing listens at {HERE}"
TRIED = f"{HERE}, http://{NAME}/sign"
BOTH = f"{TRIED}, http://host.containers.internal:7221/sign"
OTHER = f"URL=http://{NAME}/sign"
CODES = {"K": "L:127.0.0.1:7221/healthz", "S": "L:127.0.0.1:7221/sign", "D": "D:/sign",
         "P": "P:/sign", "G": f"G:{NAME}/sign", "C": f"C:{NAME}/sign"}  # fmt: skip
CLAUDE = '{"sandbox":{"network":{"allowedDomains":["127.0.0.1"]}}} in Claude Code\'s settings.json'
SBX = "`sbx policy allow network localhost:7221 --method POST --path /sign`"

# Variables, who is there; who is asked, and what is said (nothing: it is signed).
WITH_A_TOKEN = [
    # 1: a URL of this machine, as is the one that counts where none is set
    ("directly", "http_proxy=L", "L H", "H:/sign", ""),
    *((host, f"URL=http://{host}:7221/sign http_proxy=C NO_PROXY= no_proxy=", "C H", "H:/sign", "")
      for host in ("127.1", "LOCALHOST", "x.localhost")),
    ("http_proxy", "http_proxy=L", "L", "K S", ""),
    ("HTTP_PROXY", "HTTP_PROXY=L", "L", "K S", ""),
    ("http_proxy of a CGI", "http_proxy=L REQUEST_METHOD=GET", "L", "K S", ""),
    ("no_proxy of all", "http_proxy=L no_proxy=*", "L", "K S", ""),
    ("a proxy's user", f"http_proxy={PROXIES['L'][7:]}", "L", "K S", ""),
    ("[::1]", "http_proxy=L URL=http://[::1]:1/sign", "L", "L:[::1]:1/healthz L:[::1]:1/sign", ""),
    ("http_proxy set but empty", "http_proxy= HTTP_PROXY=L", "L", "", NOTHING),
    ("HTTP_PROXY of a CGI", "HTTP_PROXY=L REQUEST_METHOD=GET", "L", "", NOTHING),
    ("http_proxy of a company", "http_proxy=C HTTP_PROXY=L", "L C", "", NOTHING),
    ("HTTP_PROXY of a company", "HTTP_PROXY=C", "C", "", NOTHING),
    ("ALL_PROXY", "ALL_PROXY=L all_proxy=L", "L", "", NOTHING),
    ("https", "http_proxy=L https_proxy=L URL=https://127.0.0.1:1/sign", "L", "", "127.0.0.1:1/"),
    ("a name like loopback", "http_proxy=http://127.0.0.1.example:3128", "L", "", NOTHING),
    ("a user like loopback", "http_proxy=http://localhost@proxy.example:3128", "L C", "", NOTHING),
    *((f"loopback behind {mark}", f"http_proxy=http://proxy.example:3128{mark}@localhost", "L C",
       "", NOTHING) for mark in "/?#"),
    ("a scheme in a path", "http_proxy=proxy.example:3128/x://localhost:3128", "L C", "", NOTHING),
    ("Claude's no", "http_proxy=L SANDBOX_RUNTIME=1", "L=blocked", "K", CLAUDE),
    ("Codex's no", "http_proxy=L CODEX_NETWORK_PROXY_ACTIVE=1", "L=blocked", "K", '.1" = "allow"'),
    ("another's no", "http_proxy=L", "L=blocked", "K", "allow the host 127.0.0.1 in it"),
    ("no network", "CODEX_SANDBOX_NETWORK_DISABLED=1", "", "", f"{HERE} cannot be reached"),
    ("no password", "http_proxy=L", "L=407", "K", "wants a user and a password"),
    *((no, "http_proxy=L", f"L={no}", "K", f"{NOTHING} on the host's side") for no in ERRORS),
    ("broken off", "http_proxy=L", "L=ours,502", "K S", "through http_proxy broke off"),
    ("refused later", "http_proxy=L", "L=ours,blocked", "K S", "a network policy refuses"),
    ("a page", "http_proxy=L", "L=page", "K", "ssh-agent-proxy (status 200, Server: nginx)"),
    ("a redirect", "http_proxy=L", "L=moved", "K", "is not ssh-agent-proxy (status 302"),
    ("our own no", "http_proxy=L", "L=ours,401", "K S", f"{HERE} answered 401: wants a"),
    ("silence", "http_proxy=L", "L=silence", "K", "closed the connection without an answer"),
    ("no way out", "http_proxy=L", "", "", f"{NOTHING} here, and what http_proxy names"),
    ("two users", "http_proxy=http://u@x@localhost:3128", "", "", f"{NOTHING} here, and what"),
    # 2: another URL
    ("another URL", OTHER, "D", "D", ""),
    ("by a company's proxy", f"{OTHER} http_proxy=C", "C D", "C", ""),
    *((host, f"URL=http://{host}/sign http_proxy=C NO_PROXY= no_proxy=", "C=blocked",
       f"C:{host}/sign", f"allow the host {host} in it")
      for host in ("127.0.0.1.example", "localhost.example", "10.0.0.1", "host.internal")),
    ("by a sandbox's proxy", f"{OTHER} HTTP_PROXY=L", "L D", f"L:{NAME}/sign", ""),
    ("no sandbox's proxy", f"{OTHER} HTTP_PROXY=L", "D", "", f"{NAME}/sign (connection refused)"),
    ("by Docker's gateway", f"{OTHER} HTTP_PROXY=G", "G D", "G", ""),
    ("a company's HTTP_PROXY", f"{OTHER} HTTP_PROXY=C", "C D", "D", ""),
    ("no_proxy", f"{OTHER} http_proxy=C no_proxy=.internal", "C D", "D", ""),
    ("a company's no", f"{OTHER} http_proxy=C", "C=blocked", "C", "allow the host host.docker"),
    ("Docker's no", f"{OTHER.replace(':7221', '')} HTTP_PROXY=G", "G=sbx",
     CODES["G"].replace(":7221", ""), SBX.replace("7221", "80")),
    # 3: no URL, but a token
    ("no guess with a token", "", "D", "", NOTHING),
]  # fmt: skip
WITHOUT = [
    ("in Docker", "", "D P docker", "D", ""),
    ("by Podman's name", "", "P podman", "P", ""),
    ("a page first", "", "D=page P docker", "D P", ""),
    ("past a company's proxy", "http_proxy=C no_proxy=", "C D docker", "D", ""),
    ("nowhere", "", "docker", "", f"was not found at {BOTH}: is it running"),
    ("others only", "", "D=page P=page docker", "D P", f"at {BOTH} is not"),
    ("ours wants a token", "", "D=401 P docker", "D", f"{NAME}/sign answered 401"),
    ("no container", "", "D", "", f"{NOTHING} (connection refused)"),
    ("a URL", f"URL={HERE}", "D docker", "", NOTHING),
    ("another on loopback", "", "H=blocked D docker", "H:/sign", "is not ssh-agent-proxy"),
    ("in a sandbox", "http_proxy=L", "L D docker", "K S", ""),
    ("at Docker's gateway", "HTTP_PROXY=G no_proxy=*", "G D", "G", ""),
    ("in small letters", "http_proxy=G", "G D docker", "G", ""),
    ("the gateway's no", "HTTP_PROXY=G", "G=sbx D P", "G", SBX),
    ("another there", "HTTP_PROXY=G", "G=page D P", "G", f"at {TRIED} is not"),
    ("no gateway", f"HTTP_PROXY={PROXIES['G'][:-5]}", "D", "", f"was not found at {TRIED}:"),
    ("an empty token file", "", "D docker empty", "", NOTHING),
]
TAKEN = [(name, TOKEN + words, *more) for name, words, *more in WITH_A_TOKEN] + WITHOUT


@pytest.mark.parametrize(("words", "there", "asked", "told"), rows(TAKEN))
def test_the_way_that_is_taken(
        one_shim: Shim, apart: Apart, ask_in: Any, signed: bytes, words: str, there: str,
        asked: str, told: str) -> None:  # fmt: skip
    Path(one_shim.env["HOME"], ".curlrc").write_text("proxy = http://127.0.0.1:9\nlocation\nhead\n")
    done = ask_in(one_shim, words, there)
    assert apart.asked() == [CODES.get(word, word) for word in asked.split()]
    if told:
        assert told in said(done)
        assert "pa55" not in said(done)
    else:
        fine(done)
        assert one_shim.signature() == signed


ASKED = {
    "sandbox": (f"{TOKEN} http_proxy=L HTTP_PROXY=L", "L", "K L:127.0.0.1:7221/publickey", "K S"),
    "container": ("", "D=page P docker", "D:/publickey P:/publickey", "D P"),
}
# A pipe can be opened once; and what was streamed to a stranger is not signed in part.
GONE = {"sandbox pipe": "", "container pipe": "", "container streamed": "D"}


@pytest.mark.parametrize("place", ASKED)
@pytest.mark.parametrize("way", t.WAYS)
def test_nothing_is_asked_twice_and_no_argument_holds_a_secret(
    shim: Shim, apart: Apart, ask_in: Any, well_asked: Any, way: str, place: str
) -> None:
    words, there, key, signature = ASKED[place]
    trace = t.traced(shim, "execve")
    done = ask_in(shim, words, there, way)
    asked = key if way in ("pubkey", "key", "fetched") else signature
    asked += f" {signature[-1]}" if way == "fetched" else ""
    if f"{place} {way}" in GONE:
        assert (done.returncode, HERE in done.stderr.decode()) == (1, True)
        asked = GONE[f"{place} {way}"]
    else:
        well_asked(shim, way, done)
    assert apart.asked() == [CODES.get(word, word) for word in asked.split()]
    programs = re.findall(r" execve\((\S+ \[.*?\]), \[", trace.read_text())
    assert "7221" in str(programs)
    assert not re.search("pa55|s3cr3t", str(programs))


KEYS_URL = "PUBKEY_URL=http://127.0.0.1:1/publickey"


def test_a_key_with_a_url_of_its_own_is_not_guessed(one_shim: Shim, ask_in: Any) -> None:
    done = ask_in(one_shim, KEYS_URL, "D docker", "pubkey")
    assert "nothing listens at http://127.0.0.1:1/publickey (connection" in said(done)


def test_each_url_of_this_machine_is_tried_directly_first(
        one_shim: Shim, apart: Apart, ask_in: Any, well_asked: Any) -> None:  # fmt: skip
    """Though that of the key was found through http_proxy."""
    words = f"{KEYS_URL} http_proxy=L"
    well_asked(one_shim, "fetched", ask_in(one_shim, words, "L H", "fetched"))
    assert apart.asked() == ["L:127.0.0.1:1/healthz", "L:127.0.0.1:1/publickey", "H:/sign"]


@pytest.mark.long
def test_a_connection_that_hangs_is_given_five_seconds(one_shim: Shim, served: Served) -> None:
    way, full = Forward(served.proxy.port).sock, socket.create_server(("127.0.0.1", 0), backlog=0)
    leads, hangs = ("http://{}:{}".format(*s.getsockname()) for s in (way, full))

    def ask(proxy: str) -> Any:
        start = time.monotonic()
        done = t.ask(one_shim, "stdin", {URL: f"{hangs}/sign", "http_proxy": proxy})
        return done, round(time.monotonic() - start)

    with way, full, socket.create_connection(full.getsockname()), ThreadPoolExecutor() as pool:
        led, alone, both = pool.map(ask, (leads, "", hangs))
    assert (led[0].returncode, led[1]) == (0, 5)
    assert (f"no connection to {hangs}/sign in time (5 s)" in said(alone[0]), alone[1]) == (True, 5)
    assert ("what http_proxy names" in said(both[0]), both[1]) == (True, 10)


# ---------------------------------------------------------------- the real ones

COMMIT = "date >one; git add one; git commit -q -m one"
SIGNED_THERE = """
true 2>/dev/null >"$HOME/x" && exit 8
python3 -c 'import socket; socket.socket(socket.AF_UNIX)' 2>/dev/null && exit 9
commit() { for each; do date >"$each"; git add "$each"; git commit -q -m "$each"; done; }
commit a b c
git tag -s -m v1 v1
git switch -q -c side main~2
commit d e f
git rebase -q main
git switch -q main && git merge -q --no-ff -m merge side
git verify-tag v1 2>/dev/null
[ "$(git log --format=%G? | tr -d '\\n')" = GGGGGGG ]
"""


@pytest.fixture
def sandboxed(apart: Apart, short: Path, home: Path, keys: Keys) -> Callable[..., Done[bytes]]:
    """Runs a script in the sandbox of npm's package, in a repository whose git signs."""
    for program, package in (("bwrap", "bubblewrap"), ("socat", "socat"), ("rg", "ripgrep")):
        need(program, package)
    srt = Path(sys.prefix, "npm", "node_modules", ".bin", "srt")
    if not srt.exists():
        cannot_run("the sandbox of coding agents is missing: make venv-npm")
    repository = Repository(home, "", keys["ed25519"].with_suffix(".pub"))
    repository.git("config", "--global", "--unset", "user.signingkey")
    repository.git("config", "--global", "gpg.ssh.defaultKeyCommand", f"{SHIM} key")
    del repository.env[URL]
    files = {"denyRead": [], "allowWrite": [str(home / "repository"), str(short / "t")]}
    (short / "t").mkdir()

    def run_(script: str, *allowed: str, **env: Any) -> Done[bytes]:
        network = {"allowedDomains": allowed, "deniedDomains": []}
        rules = {"network": network, "filesystem": {**files, "denyWrite": []}}
        (short / "settings").write_text(json.dumps(rules))
        argv = [*apart.enter, home / "repository", Path(sys.prefix, "bin", "node"), srt,
                "--settings", short / "settings", "-c", f"set -e\n{script}"]  # fmt: skip
        env = {**repository.env, "CLAUDE_CODE_TMPDIR": str(short / "t"), **env}
        return run(argv, env=env, check=False)

    return run_


@pytest.mark.alone
@pytest.mark.parametrize("token", ["", TOKENS["home"]], ids=["no token", "a token"])
def test_in_the_real_sandbox_git_signs_with_nothing_of_ours_set(
    sandboxed: Any, apart: Apart, served: Served, guarded: Served, home: Path, token: str
) -> None:
    if token:
        (home / ".config/ssh-agent-proxy").mkdir(parents=True)
        (home / ".config/ssh-agent-proxy/token").write_text(token)
    apart.place("H", (guarded if token else served).proxy.port)
    done = sandboxed(SIGNED_THERE, "127.0.0.1")
    assert (done.returncode, done.stdout, done.stderr[-300:]) == (0, b"", b"")


@pytest.mark.alone
def test_what_the_real_sandbox_lacks_is_told_word_for_word_until_it_signs(
        sandboxed: Any, apart: Apart, served: Served) -> None:  # fmt: skip
    told = re.search(rb"set (\{.*\}) in Claude Code's settings", sandboxed(COMMIT).stderr)
    assert told
    allowed = json.loads(told.group(1))["sandbox"]["network"]["allowedDomains"]
    assert f"{NOTHING} on the host's side".encode() in sandboxed(COMMIT, *allowed).stderr
    apart.place("H", served.proxy.port)
    assert sandboxed(COMMIT, *allowed).returncode == 0


@pytest.mark.alone
def test_in_the_real_sandbox_git_alone_needs_the_folder_for_temporary_files(
        sandboxed: Any, apart: Apart, served: Served, signed: bytes) -> None:  # fmt: skip
    apart.place("H", served.proxy.port)
    script = f"printf %s {shlex.quote(t.COMMIT.decode())} | {SHIM} -Y sign; {COMMIT}"
    done = sandboxed(script, "127.0.0.1", CLAUDE_CODE_TMPDIR="/nowhere")
    assert done.stdout == signed
    assert b"could not create temporary file" in done.stderr


SQUID = "http_port 3128\nhttp_access allow all\naccess_log none\ncache_log /dev/null\n"
REAL = {
    "tinyproxy": ("-dc", "Port 3128\nAllow 127.0.0.0/8\nAllow 10.0.0.0/8\n"),
    "squid": ("-Nf", f"{SQUID}pid_filename none\n"),
}


@pytest.fixture(params=REAL)
def real_proxy(request: Any, apart: Apart, short: Path) -> Iterator[None]:
    """It listens on all addresses there."""
    if request.param == "squid" and os.geteuid() != 0:
        cannot_run("squid runs as a user of its own: it takes root to start it")
    options, conf = REAL[request.param]
    (short / "conf").write_text(conf)
    argv = [*apart.enter, "/", need(request.param, request.param), options, short / "conf"]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    probe = [*apart.enter, "/", "curl", "-sx", "http://127.0.0.1:3128", "http://127.0.0.1:1/"]
    try:
        wait_for(lambda: run(probe, check=False, timeout=5).stdout, message=request.param)
        yield
    finally:
        process.kill()
        process.wait()


THROUGH_REAL = [
    ("a company's", f"{OTHER} http_proxy=C", "D:/sign", ""),
    ("no_proxy", f"{OTHER} http_proxy=C no_proxy=.internal", "D:/sign", ""),
    ("a sandbox's", "URL=http://here.localhost:7221/sign http_proxy=L", "D:/healthz D:/sign", ""),
    ("nothing behind it", "http_proxy=L", "", f"{NOTHING} on the host's side"),
]


@pytest.mark.alone
@pytest.mark.parametrize(("words", "asked", "told"), rows(THROUGH_REAL))
def test_a_real_proxy_leads_to_ours(
    real_proxy: None, apart: Apart, one_shim: Shim, ask_in: Any, words: str, asked: str, told: str
) -> None:
    """Beyond it a name under localhost leads elsewhere than here."""
    done = ask_in(one_shim, TOKEN + words, "D")
    assert told in said(done) if told else done.returncode == 0
    assert apart.asked() == asked.split()
    for request in apart.there["D"].requests:
        assert (sent(request, "Via") is None) == ("no_proxy" in words)
