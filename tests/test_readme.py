"""What the README and the pages in docs/ say, held against the program."""

import contextlib
import json
import os
import re
import shutil
import sys
from http.client import parse_headers
from io import BytesIO
from pathlib import Path
from typing import Dict, Iterator, List, Set

import pytest
from conftest import (
    PROXY, ROOT, SHIM, Agent, Keys, Proxy, Repository, ask, clean_env, commit, post, run,
)  # fmt: skip

import ssh_agent_proxy

README = "README.md"
CONTAINERS = "docs/containers.md"
SECURITY = "docs/security.md"
WINDOWS = "docs/windows.md"
NOWHERE = "http://127.0.0.1:1/sign"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [ROOT / README, *sorted((ROOT / "docs").glob("*.md"))]
}
ALL = "".join(PAGES.values())
PROXY_SOURCE = PROXY.read_text()
TRAY_SOURCE = (ROOT / "contrib/windows/tray.pyw").read_text()
SHIM_SOURCE = SHIM.read_text().replace("\\\n", "")


def section(heading: str, page: str = README) -> str:
    """The text below HEADING, up to the next heading of its level or a higher one."""
    level = heading.split()[0]
    start = PAGES[page].index(f"\n{heading}\n") + len(heading) + 2
    rest = PAGES[page][start:]
    end = re.search(rf"^#{{2,{len(level)}}} ", rest, re.M)
    return rest[: end.start()] if end else rest


def blocks(text: str, language: str) -> List[str]:
    """The fenced blocks of LANGUAGE in TEXT, without what they are indented by."""
    fenced = re.findall(r"^( *)```(\w*)\n(.*?)^ *```$", text, re.M | re.S)
    plain = [(of, re.sub(f"^{indent}", "", body, flags=re.M)) for indent, of, body in fenced]
    return [body for of, body in plain if of == language]


def first_cells(text: str) -> List[str]:
    rows = re.findall(r"^\| (.*?) \|", text, re.M)
    return [cell for cell in rows[1:] if cell.strip()]


# ---------------------------------------------------------------- the pages themselves


def test_the_readme_is_read_in_three_minutes() -> None:
    assert PAGES[README].count("\n") <= 350


def test_nothing_stands_in_two_pages() -> None:
    """What is said twice is changed once, and then a reader is told two things."""
    seen: Dict[str, str] = {}
    for page, text in PAGES.items():
        for line in set(text.splitlines()):
            if len(line) > 45 and "SSH_AGENT_PROXY_URL" not in line:
                assert seen.setdefault(line, page) == page, line


def anchors(text: str) -> Set[str]:
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for link in re.findall(r"\]\((.*?)\)", PAGES[page]):
        path, _, anchor = link.partition("#")
        target = os.path.normpath(Path(page).parent / path) if path else page
        assert (ROOT / target).exists(), link
        assert not anchor or anchor in anchors(PAGES[target]), link


@pytest.mark.parametrize("page", [page for page in PAGES if PAGES[page].count("\n") > 100])
def test_a_long_page_begins_with_its_contents(page: str) -> None:
    start, *_ = PAGES[page].partition("\n## ")
    linked = set(re.findall(r"\]\(#(.*?)\)", start))
    level_two = re.findall(r"(?m)^## .*", PAGES[page])
    assert anchors("\n".join(level_two)) <= linked


# ---------------------------------------------------------------- what is named is there


def test_every_make_target_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", ALL, re.M))
    assert {"demo", "test", "install", "bench"} <= named
    assert named <= targets


def test_the_two_commands_come_first() -> None:
    first = blocks(PAGES[README], "sh")[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make demo", "make test"]


def test_every_setting_is_in_the_table_with_its_default() -> None:
    table = section("## Settings")
    for option in ssh_agent_proxy.OPTIONS:
        row = next(line for line in table.splitlines() if line.startswith(f"| `{option.flag}` |"))
        assert f"`SSH_AGENT_PROXY_{option.variable}`" in row
        assert not option.default or f"| `{option.default}` |" in row


def test_every_variable_named_is_known_and_the_shims_are_told() -> None:
    of_shim = set(re.findall(r"^# (SSH_AGENT_PROXY_[A-Z_]+)", SHIM_SOURCE, re.M))
    known = of_shim | {f"SSH_AGENT_PROXY_{o.variable}" for o in ssh_agent_proxy.OPTIONS}
    assert set(re.findall(r"SSH_AGENT_PROXY_[A-Z_]+", ALL)) <= known
    told = first_cells(section("## Variables of the shim", CONTAINERS))
    assert {cell.strip("`") for cell in told} == of_shim


def test_every_endpoint_is_in_the_table() -> None:
    cells = first_cells(section("## Endpoints"))
    assert [cell.strip("`").split()[1] for cell in cells] == list(ssh_agent_proxy.Handler.ROUTES)


@pytest.mark.parametrize(("page", "heading"), [
    (README, "## When something fails"),
    (CONTAINERS, "## When something fails"),
    (SECURITY, "## Hardening"),
    (WINDOWS, "## When something fails"),
])  # fmt: skip
def test_every_message_explained_is_one_that_is_said(page: str, heading: str) -> None:
    said = re.sub(r'"\s*\n\s*f?"', "", PROXY_SOURCE + TRAY_SOURCE) + SHIM_SOURCE
    said = said.replace("{PIPES}", ssh_agent_proxy.PIPES)
    said = re.sub(r"\{(self|exchange)\.upstream\}", "agent at ", said)
    said = said.replace("{self.what}", "the agent at ")
    messages = first_cells(section(heading, page))
    assert len(messages) > 4
    for message in messages:
        for fragment in re.split("…|`, `", message.strip("`")):
            assert fragment.strip() in said, f"nobody says {fragment!r}"


def test_every_message_of_the_shim_is_explained() -> None:
    """With its cause and its cure: an AI agent that reads it finds what to ask its person for."""
    called, kept = "die|fail|say|halt|tell|refuse", "problem|permission|advice|UNTIL|tags"
    says = re.compile(rf"\b({called})\b|\b({kept})=")
    lines = filter(says.search, SHIM_SOURCE.replace("\\\n", "").splitlines())
    said = [one for line in lines for one in re.findall(r'"((?:[^"\\]|\\.)*)"', line)]
    told = [re.sub(r"\$\{[^}]*\}|\$\w+", "…", one).replace("\\", "") for one in said]
    told = [one for one in told if re.search("[a-z] [a-z`]+ ", one)]
    pages = [(README, "## When something fails"), (CONTAINERS, "## When something fails")]
    rows = [cell for page, heading in pages for cell in first_cells(section(heading, page))]
    rows = [cell for cell in rows if cell.startswith("`")]
    patterns = [p for row in rows for p in row.strip("`").split("`, `")]
    known = re.compile("|".join(".*".join(map(re.escape, p.split("…"))) for p in patterns))
    assert len(told) > 60
    assert [one for one in told if not known.search(one)] == []


def test_what_landlock_is_said_to_stop_is_what_it_says() -> None:
    """The kernel decides how much of it there is, so the line itself differs."""
    (shown,) = re.findall(r"Landlock: in force \(ABI \d: (.*)\)$", PAGES[README], re.M)
    for stopped in shown.split(", "):
        assert re.search(rf'[" ]{stopped}[",]', PROXY_SOURCE), stopped


def test_every_path_of_the_layout_exists() -> None:
    for path in re.findall(r"^\| `(.+?)` \|", section("## Layout"), re.M):
        assert (ROOT / path).exists(), path


def test_the_json_is_json() -> None:
    cells = re.findall(r'`("\w+": [\[{].*?)` \|', PAGES[README])
    documents = [f"{{{cell}}}" for cell in cells] + blocks(ALL, "json")
    assert list(json.loads(documents[0])) == ["runArgs"]
    assert all(json.loads(document) for document in documents)
    assert len(documents) == 4


def test_the_figures_are_those_of_the_whole_table() -> None:
    (table,) = blocks(PAGES["docs/performance.md"], "")
    measured = [float(number) for number in re.findall(r"\d+\.?\d*", table)]
    rows = re.findall(r"^\| .*? \| (.*?) \|", section("## How it works"), re.M)[1:]
    for cell in rows:
        for number in re.findall(r"\d+\.?\d*", cell):
            digits = len(number.partition(".")[2])
            assert float(number) in [round(value, digits) for value in measured], cell


def test_http_server_takes_what_is_said_of_it() -> None:
    """If it has become strict, the reason to read requests ourselves is gone."""
    read = parse_headers(BytesIO(b"Host: a\nHost: b\r\nX: 1\r\n 2\r\nY : 3\r\nOrigin: c\r\n\r\n"))
    assert read.items() == [("Host", "a"), ("Host", "b"), ("X", "1\r\n 2")]


# ---------------------------------------------------------------- what is to be run, run


@pytest.fixture
def host(home: Path, agent: Agent, keys: Keys) -> Dict[str, str]:
    """A person's environment on the host, with an agent at hand."""
    agent.add(keys["ed25519"])
    given = {"SSH_AUTH_SOCK": agent.sock, "SSH_AGENT_PROXY_ADDR": "127.0.0.1:0"}
    return clean_env(home, XDG_RUNTIME_DIR=home / "run", **given)


@contextlib.contextmanager
def serving(script: str, folder: Path, env: Dict[str, str]) -> Iterator[Proxy]:
    """The proxy that SCRIPT, run in FOLDER, starts at its end; the log has all that it says."""
    script = re.sub("(?m)(^|[(; ])ssh-agent-proxy ", rf"\1{sys.executable} {PROXY} ", script)
    before, _, last = script.rstrip().rpartition("\n")
    script = f'exec 1>&2; cd "{folder}"\n{before}\nexec {last}'
    proxy = Proxy(["sh", "-euc", script], env, wait=False)
    try:
        proxy.port = int(proxy.wait_log(r"listening on \S+?:(\d*)", 30)[1] or 0)  # 0: a socket
        yield proxy
    finally:
        proxy.stop()


def alike(said: str) -> Set[str]:
    """Its lines, without what differs from one machine to the next."""
    said = re.sub(r"'\S+'", "'agent'", said)
    said = re.sub(r"SHA256:\S+( \S+@\S+)?", "key", said)
    said = re.sub(r"127.0.0.1:\d+", "127.0.0.1:7221", said)
    said = re.sub(r"ABI \d.*\)", "ABI)", said)
    said = re.sub(r"^.{5}memory (.*?:).*", r"memory \1", said, flags=re.M)
    return set(re.sub(r"^.* INFO", "INFO", said, flags=re.M).splitlines())


def test_the_readme_alone_leads_from_nothing_to_a_signed_commit(
        short: Path, host: Dict[str, str]) -> None:  # fmt: skip
    source = short / "source"
    shutil.copytree(ROOT / "contrib", source / "contrib")
    for file in (PROXY, SHIM, ROOT / "Makefile"):
        shutil.copy(file, source)
    on_the_host = section("## On the host")
    with serving(blocks(on_the_host, "sh")[0], source, host) as proxy:
        proxy.wait_log("INFO using the agent at")
        proxy.wait_log("INFO signing with")
        assert alike("".join(blocks(on_the_host, ""))) <= alike(proxy.log())
        env = clean_env(short / "in", SSH_AGENT_PROXY_URL=f"http://127.0.0.1:{proxy.port}/sign")
        run(["git", "config", "--global", "user.email", "author@example.com"], env=env)
        run(["git", "init", "-q", short / "repository"], env=env)
        said = []
        for script in blocks(section("## In the container"), "sh"):
            script = script.replace("127.0.0.1:7221", f"127.0.0.1:{proxy.port}")
            done = run(["sh", "-eu"], env=env, cwd=short / "repository", input=script.encode())
            said.append((done.stdout + done.stderr).decode())
        log = run(["git", "log", "--show-signature"], env=env, cwd=short / "repository").stdout
    set_up, first = said
    (report,) = blocks(section("## In the container"), "")
    begins = re.compile(r"(?m)^(?:ok  |warn|todo) (\w+)")
    assert begins.findall(set_up) == begins.findall(report)
    good = 'Good "git" signature for committer@example.com with ED25519 key SHA256:'
    assert good in first
    assert good in log.decode()


@pytest.mark.parametrize("scope", ["--system", "--local"])
def test_an_image_or_one_repository_alone_signs(scope: str, short: Path, proxy: Proxy) -> None:
    (recipe,) = blocks(section("## An image", CONTAINERS), "dockerfile")
    script = recipe[recipe.index("RUN ") + len("RUN ") :].replace("--system", scope)
    script = script.replace("/usr/local/bin/ssh-agent-proxy-sign", str(SHIM))
    env = clean_env(short, SSH_AGENT_PROXY_URL=f"{proxy.url}/sign", GIT_CONFIG_SYSTEM=short / "etc")
    del env["GIT_CONFIG_NOSYSTEM"]
    repository = short / "repository"
    run(["git", "init", "-q", repository], env=env)
    script += "git commit -q --allow-empty -m first; git cat-file commit HEAD"
    done = run(["sh", "-eu"], env=env, cwd=repository, input=script.encode())
    assert b"-----BEGIN SSH SIGNATURE-----" in done.stdout


def test_a_rebase_that_could_not_sign_goes_on_as_shown(
        home: Path, proxy: Proxy, keys: Keys) -> None:  # fmt: skip
    repository = Repository(home, f"{proxy.url}/sign", keys["ed25519"].with_suffix(".pub"))
    base = repository.commit("base")
    repository.commit("theirs", "--author", "Somebody Else <else@example.com>")
    repository.git("checkout", "-q", "-b", "topic", base)
    repository.commit("ours")
    stopped = repository.run("rebase", "topic", "main", check=False, SSH_AGENT_PROXY_URL=NOWHERE)
    assert stopped.returncode
    (way,) = blocks(section("### In the middle of a rebase", CONTAINERS), "sh")
    nobody_types = {**repository.env, "GIT_EDITOR": "false"}
    run(["sh", "-eu"], env=nobody_types, cwd=repository.path, input=way.encode())
    history = repository.git("log", "--format=%G? %an %s")
    assert history.splitlines() == ["G Somebody Else theirs", "G A U Thor ours", "G A U Thor base"]


def test_the_example_of_a_signature_by_hand_gives_one(home: Path, proxy: Proxy) -> None:
    (example,) = blocks(section("## Endpoints"), "sh")
    example = example.replace("127.0.0.1:7221", f"127.0.0.1:{proxy.port}")
    (home / "signature").write_bytes(run(["sh", "-eu"], input=example.encode()).stdout)
    check = ["ssh-keygen", "-Y", "check-novalidate", "-n", "git", "-s", home / "signature"]
    assert b'Good "git" signature' in run(check, input=b"hello").stdout


# ---------------------------------------------------------------- leashes


def test_the_socket_shown_signs_for_its_owner(home: Path, host: Dict[str, str]) -> None:
    (script,) = blocks(section("## A socket instead of a port", SECURITY), "sh")
    path = home / "run/ssh-agent-proxy/socket"
    with serving(script, home, host) as proxy:
        assert f"listening on unix:{path} " in proxy.log()
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert ask(path, post(b"x")).status == 200
        _, fetch = blocks(section("### A mounted socket", CONTAINERS), "sh")
        fetch = fetch.replace("/run/ssh-agent-proxy/socket", str(path))
        run(["sh", "-eu"], env=host, input=fetch.encode())
    assert (home / ".local/bin/ssh-agent-proxy-sign").read_bytes() == SHIM.read_bytes()


def test_the_token_shown_is_needed_and_signs_by_its_leash(home: Path, host: Dict[str, str]) -> None:
    (script,) = blocks(section("## A token for each container", SECURITY), "sh")
    with serving(script, home, host) as proxy:
        token = (home / "dev.token").read_text().strip()
        assert ask(proxy.port, post(commit())).status == 401
        assert ask(proxy.port, post(b"x", f"Authorization: Bearer {token}")).status == 403
        assert ask(proxy.port, post(commit(), f"Authorization: Bearer {token}")).status == 200


def test_the_token_file_shown_is_one() -> None:
    (text,) = blocks(section("## A token for each container", SECURITY), "")
    text = text.replace("Wk8u…", 43 * "A").replace("…", "")
    first, second = ssh_agent_proxy.parse_tokens(text)
    assert (first.name, first.key, first.payloads) == ("dev", "", ("commit", "tag"))
    assert (second.name, second.payloads) == ("agent", ("commit",))
    assert second.key == "SHA256:" + 43 * "A"


def test_the_prompt_shown_is_such_a_prompt() -> None:
    (shown,) = blocks(section("## Your own yes", SECURITY), "")
    tree = re.search("tree: ([0-9a-f]{40})", shown)
    assert tree
    head = f"{tree[1]}\nparent {tree[1]}".encode()
    payload = ssh_agent_proxy.parse_payload(commit(b"Add a leash", id=head))
    facts = re.findall("^• (asked by|key|namespace|a yes holds): (.+)$", shown, re.M)
    assert ssh_agent_proxy.consent_prompt(payload, dict(facts)) + "\n" == shown
