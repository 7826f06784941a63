"""Browsers and hosts, namespaces and pinned keys: what is let through, and what is stopped."""

import socket
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
from conftest import Agent, Answer, Keys, Proxy, http, refused
from test_http import Shared, shared_proxy

import ssh_agent_proxy as p

OF_A_KEY = [("POST", "/sign"), ("GET", "/publickey")]
PATHS = [("GET", "/healthz"), ("GET", "/shim"), *OF_A_KEY]

# ---------------------------------------------------------------- which host a request names

AUTHORITIES = [
    ("localhost:", "localhost"),
    ("LocalHost.:65535", "localhost"),
    ("a.b-c.d_e", "a.b-c.d_e"),
    ("[::1]", "::1"),
    ("[FE80::A]:1", "fe80::a"),
    ("[0:0:0:0:0:0:0:1]:", "::1"),
    ("", ""),
    (":80", ""),
]

NO_AUTHORITIES = [
    "a b", " a", "a ", "a/", "user@a", "a#b", "a?b", "a\\b", "a,b", "a%62", "a*b", "a\x00b",
    "a\r\nb", "\u00e9", ".", ".a", "a..b", "a..", "a:b", "a:+1", "a:1:2", "a:123456", "a:\u0661",
    "::1", "[]", "[::1", "::1]", "[[::1]]", "[::1]80", "[::1]:a", "[::1]:123456", "[:::1]",
    "[127.0.0.1]", "[localhost]", "[::1%25lo]", "[v1.a]", "a[::1]", "http://a", "<a>", "a=b",
]  # fmt: skip


@pytest.mark.parametrize(("value", "host"), AUTHORITIES)
def test_an_authority_is_its_host_in_lower_case(value: str, host: str) -> None:
    assert p.parse_authority(value) == host


@pytest.mark.parametrize("value", NO_AUTHORITIES)
def test_a_malformed_authority_is_refused(value: str) -> None:
    with pytest.raises(p.RequestError) as e:
        p.parse_authority(value)
    assert e.value.status == 400
    assert str(e.value).isprintable()


# ---------------------------------------------------------------- whether that host is ours

OURS = [
    "localhost", "LOCALHOST.:1", "a.b.localhost", "host.docker.internal", "a.INTERNAL.",
    "127.0.0.1:99", "127.1.2.3", "0.0.0.0", "192.0.2.1", "255.255.255.255", "[::1]", "[::]",
    "[2001:db8::1]:80", "[::ffff:127.0.0.1]",
]  # fmt: skip

# Spellings that some resolver or other takes for 127.0.0.1 are names to us, and not ours.
ODD_ADDRESSES = [
    "127.1", "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1", "127.0.0.01", "127.0.0.1.2",
    "127.0.0.256", "0", "127.0.0.1.nip.io", "a.127.0.0.1", "1e3.0.0.1", "127.0.0.-1",
]  # fmt: skip

NOT_OURS = [
    "", ":80", "evil.example:7221", "evil", "internal", "localhost.evil.example", "xlocalhost",
    "internal.evil.example", "xinternal", "local", "evil.local", "localhost.local", "localhosts",
    "localhost.localdomain", "a.internals", "a-internal", "wpad", "ip6-localhost",
]  # fmt: skip


@pytest.fixture
def named_box(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def name(own: str) -> None:
        monkeypatch.setattr(socket, "gethostname", lambda: own)

    name("box")
    return name


def host_status(host: str, allowed: Tuple[str, ...] = ()) -> int:
    """421 where HOST is not ours, else 200."""
    try:
        p.check_host(p.parse_authority(host), allowed)
    except p.RequestError as e:
        assert "SSH_AGENT_PROXY_ALLOWED_HOSTS" in str(e)
        return e.status
    return 200


@pytest.mark.parametrize("value", OURS)
def test_a_host_of_ours_is_let_through(value: str, named_box: Any) -> None:
    assert host_status(value) == 200


@pytest.mark.parametrize("value", [*ODD_ADDRESSES, *NOT_OURS])
def test_a_host_that_is_not_ours_is_misdirected(value: str, named_box: Any) -> None:
    assert host_status(value) == 421


@pytest.mark.parametrize(("own", "ours", "others"), [
    ("box", ["box", "BOX", "box.", "box:80", "box.local", "BOX.Local."],
     ["other", "other.local", "box.evil.example", "a.box", "a.box.local", "box.local.evil.example",
      "xbox", "boxx"]),
    ("Box", ["box", "box.local"], []),
    ("box.local", ["box", "box.local"], []),
    ("box.lan", ["box", "box.local", "box.lan"], ["other.lan", "lan"]),
    ("", [], ["", "local"]),
    (".", [], [""]),
    (".lan", [], [""]),
    ("localhost", ["localhost"], []),
])  # fmt: skip
def test_this_machines_own_name_is_ours_bare_or_with_local(
    own: str, ours: List[str], others: List[str], named_box: Callable[[str], None]
) -> None:
    named_box(own)
    assert [host for host in ours if host_status(host) != 200] == []
    assert [host for host in others if host_status(host) != 421] == []


@pytest.mark.parametrize(("allowed", "ours", "others"), [
    ("proxy.test", ["proxy.test", "PROXY.Test", "proxy.test.", "proxy.test:7221"],
     ["a.proxy.test", "xproxy.test", "proxy.testx", "test", ""]),
    ("Proxy.Test.", ["proxy.test"], []),
    (".corp.test", ["a.corp.test", "a.b.corp.test", "A.Corp.Test."],
     ["corp.test", "xcorp.test", "corp.test.evil.example", "a.corp.testx", ""]),
    (".Corp.Test.", ["a.corp.test"], []),
    ("a.test,.corp.test", ["b.corp.test"], []),
])  # fmt: skip
def test_allowed_hosts_are_names_or_all_below_a_suffix(
        allowed: str, ours: List[str], others: List[str], named_box: Any) -> None:  # fmt: skip
    names = p.Config.from_env({"SSH_AGENT_PROXY_ALLOWED_HOSTS": allowed}, [], {}).allowed_hosts
    assert [host for host in ours if host_status(host, names) != 200] == []
    assert [host for host in others if host_status(host, names) != 421] == []


# ---------------------------------------------------------------- browsers


PAGES: List[Dict[str, str]] = [
    {"origin": "http://localhost:7221"},
    {"origin": ""},
    {"origin": "http://evil.example", "sec-fetch-site": "none"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-origin"},
    {"sec-fetch-site": ""},
    {"sec-fetch-site": "none, none"},
]


@pytest.mark.parametrize("fields", PAGES, ids=str)
def test_what_only_pages_send_is_refused(fields: Dict[str, str]) -> None:
    with pytest.raises(p.RequestError) as e:
        p.check_browser(fields)
    assert e.value.status == 403
    others = {"sec-fetch-mode": "cors", "referer": "http://a/", "cookie": "a=b"}
    for let_through in ({}, {"sec-fetch-site": "none"}, others):
        p.check_browser(let_through)


# ---------------------------------------------------------------- namespaces and keys


@pytest.mark.parametrize(("expected", "named"), [
    (400, ["git,file", "", "git file", " git", "git\t", "git\x00", "git\n", "git\x1b", "g\u00eft",
           "git\x7f", "a" * 256]),
    (403, ["Git", "git2", "gi", "a" * 255]),
])  # fmt: skip
def test_another_namespace_than_those_allowed_is_refused(expected: int, named: List[str]) -> None:
    for namespace in named:
        with pytest.raises(p.RequestError) as e:
            p.choose_namespace(namespace, ("git", "file"))
        assert e.value.status == expected
        assert str(e.value).isprintable()
        assert ("SSH_AGENT_PROXY_NAMESPACE" in str(e.value)) == (expected == 403)


def test_a_namespace_is_one_of_those_allowed_the_first_by_default() -> None:
    allowed = ("file", "git", "a@example.com")
    assert [p.choose_namespace(named, allowed) for named in allowed] == [*allowed]
    assert p.choose_namespace(None, allowed) == "file"


def key_of(line: str) -> p.PublicKey:
    return p.parse_key_line(line)[0]


@pytest.mark.parametrize("named", [
    "", "SHA256:", "SHA256:" + "A" * 42, "SHA256:" + "A" * 43 + "=", "SHA256:" + "A" * 43 + "\n",
    "SHA256:" + "-" * 43, "sha256:" + "A" * 43, "ssh-ed25519 AAAA", "ssh-ed25519 \u00e9",
    "ssh-dss AAAAB3NzaC1kc3M=",
    "AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
    "key::ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
])  # fmt: skip
def test_a_malformed_key_is_a_bad_request(named: str, keys: Keys) -> None:
    for pin in (p.Wanted(), p.Wanted(key_of(keys.line("ed25519")), pinned="x")):
        with pytest.raises(p.RequestError) as e:
            p.choose_key(named, pin)
        assert e.value.status == 400
        assert "SSHSIG-Key" in str(e.value)
        assert str(e.value).isprintable()


def ways_to_name(line: str) -> List[str]:
    return [line, " ".join(line.split()[:2]), key_of(line).fingerprint]


# ---------------------------------------------------------------- over HTTP


@pytest.fixture(scope="module")
def shared(keys: Keys) -> Iterator[Shared]:
    with shared_proxy(keys, "--allowed-hosts", "Proxy.Test,.corp.test") as shared:
        yield shared


def request(port: int, method: str, path: str, headers: Dict[str, str]) -> Answer:
    return http(port, method, path, b"x" if method == "POST" else None, headers)


def of_both(port: int, headers: Dict[str, str]) -> List[Answer]:
    """The signature, and the key that makes it."""
    return [request(port, method, path, headers) for method, path in OF_A_KEY]


def test_every_path_is_open_under_a_host_of_ours(shared: Shared) -> None:
    own = socket.gethostname()
    for host in ("127.0.0.1", "[::1]:1", "a.localhost", "host.docker.internal", "PROXY.TEST:80",
                 "a.corp.test", own, own.partition(".")[0] + ".local"):  # fmt: skip
        for method, path in PATHS:
            assert request(shared.port, method, path, {"Host": host}).status == 200, (host, path)


@pytest.mark.parametrize(("status", "many"), [
    (421, [{"Host": host} for host in ("evil.example", "evil.local", "corp.test", "127.1", "")]),
    (403, [PAGES[0], PAGES[-1], {"oRIGIN": "a"}, {"sec-fetch-SITE": "x"}]),
], ids=["another host", "a page"])  # fmt: skip
def test_every_path_is_closed_under_another_host_and_to_pages(
        status: int, many: List[Dict[str, str]], shared: Shared) -> None:  # fmt: skip
    shared.agent.asked.clear()
    for method, path in [*PATHS, ("GET", "/nope"), ("PUT", "/sign"), ("OPTIONS", "/sign")]:
        for headers in many:
            answer = refused(request(shared.port, method, path, headers), status)
            assert ("SSH_AGENT_PROXY_ALLOWED_HOSTS" in answer.text) == (status == 421)
    assert shared.agent.asked == []


@pytest.mark.parametrize(("target", "host", "status"), [
    ("HTTP://[::1]:1/healthz", "127.0.0.1", 200),
    ("http://proxy.test/healthz", "a.corp.test", 200),
    ("http://evil.example/healthz", "127.0.0.1", 421),
    ("http://127.0.0.1/healthz", "evil.example", 421),
    ("http://127.0.0.1", "127.0.0.1", 404),
    ("http://127.0.0.1@evil.example/healthz", "127.0.0.1", 400),
    ("http://127.0.0.1?/healthz", "127.0.0.1", 400),
])  # fmt: skip
def test_the_authority_of_an_absolute_target_counts_like_a_host(
        target: str, host: str, status: int, shared: Shared) -> None:  # fmt: skip
    assert request(shared.port, "GET", target, {"Host": host}).status == status


# ---------------------------------------------------------------- namespaces, with a real agent


def test_the_namespaces_that_are_set_are_signed_and_the_first_is_the_default(
    agent_with_key: Agent, ssh_keygen: Callable[..., bytes], start_proxy: Callable[..., Proxy]
) -> None:
    proxy = start_proxy("--namespace", "file, git", upstream=agent_with_key.sock)
    said = rf'127\.0\.0\.1:{proxy.port} \(namespace "file", "git"\)'
    proxy.wait_log(rf"^\S+ INFO listening on {said}$")
    for named, signed in (None, "file"), ("git", "git"):
        headers = {"SSHSIG-Namespace": named} if named else {}
        answer = http(proxy.port, "POST", "/sign", b"payload", headers)
        assert answer.body == ssh_keygen(b"payload", namespace=signed)
    for named, status in ("GIT", 403), ("file,git", 400):
        for answer in of_both(proxy.port, {"SSHSIG-Namespace": named}):
            refused(answer, status)


# ---------------------------------------------------------------- keys, with a real agent


@pytest.mark.parametrize("pinned", [False, True])
def test_the_pinned_key_signs_else_the_one_that_the_request_names_else_the_first(
        pinned: bool, agent: Agent, keys: Keys, ssh_keygen: Callable[..., bytes],
        start_proxy: Callable[..., Proxy]) -> None:  # fmt: skip
    for name in ("other", "ed25519"):
        agent.add(keys[name])
    pin = ["--pubkey", keys.line("ed25519")] if pinned else []
    proxy = start_proxy(*pin, upstream=agent.sock)
    asked: List[Tuple[str, Dict[str, str]]] = [("ed25519" if pinned else "other", {})]
    for name in ("ed25519", "other"):
        asked += [(name, {"SSHSIG-Key": way}) for way in ways_to_name(keys.line(name))]
    for name, headers in asked:
        answers = of_both(proxy.port, headers)
        if pinned and name == "other":
            for answer in answers:
                assert "change SSH_AGENT_PROXY_PUBKEY" in refused(answer, 403).text
        else:
            expected = [ssh_keygen(b"x", key=name), f"{keys.line(name)}\n".encode()]
            assert [answer.body for answer in answers] == expected, headers


def test_a_key_that_the_agent_lacks_is_not_found_and_a_pinned_one_is_no_usable_key(
        agent_with_key: Agent, keys: Keys, start_proxy: Callable[..., Proxy]) -> None:  # fmt: skip
    line = keys.line("other")
    pinned = start_proxy("--pubkey", line, upstream=agent_with_key.sock)
    proxy = start_proxy(upstream=agent_with_key.sock)
    for port, way, status in [
        (pinned.port, line, 503), *((proxy.port, way, 404) for way in ways_to_name(line)),
    ]:  # fmt: skip
        for answer in of_both(port, {"SSHSIG-Key": way}):
            assert key_of(line).fingerprint in refused(answer, status).text
