"""What the README says, held against the program."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Dict, Iterator, List

import pytest
from conftest import PROXY, ROOT, SHIM, Agent, Keys, Proxy, clean_env, run, wait_for

import ssh_agent_proxy

README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
PROXY_SOURCE = (ROOT / "ssh_agent_proxy.py").read_text()
SHIM_SOURCE = SHIM.read_text().replace("\\\n", "")


def section(heading: str) -> str:
    """The text below HEADING, up to the next heading of its level or a higher one."""
    level = heading.split()[0]
    start = README.index(f"\n{heading}\n") + len(heading) + 2
    rest = README[start:]
    end = re.search(rf"^#{{1,{len(level)}}} ", rest, re.M)
    return rest[: end.start()] if end else rest


def blocks(text: str, language: str) -> List[str]:
    """The fenced blocks of LANGUAGE in TEXT; every other piece between fences is a block."""
    fenced = re.split(r"^```", text, flags=re.M)[1::2]
    return [b.split("\n", 1)[1] for b in fenced if b.split("\n", 1)[0] == language]


def first_cells(text: str) -> List[str]:
    rows = re.findall(r"^\| (.*?) \|", text, re.M)
    return [cell for cell in rows[1:] if cell.strip()]


def test_every_make_target_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.M))
    named = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"demo", "test", "install", "bench"} <= named
    assert named <= targets


def test_the_two_commands_come_first() -> None:
    first = blocks(README, "sh")[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make demo", "make test"]


def test_every_setting_is_in_the_table_with_its_default() -> None:
    table = section("## Settings of the proxy")
    for option in ssh_agent_proxy.OPTIONS:
        row = next(line for line in table.splitlines() if line.startswith(f"| `{option.flag}` |"))
        assert f"`SSH_AGENT_PROXY_{option.variable}`" in row
        if option.default:
            assert f"| `{option.default}` |" in row


def test_every_variable_named_is_known() -> None:
    known = {f"SSH_AGENT_PROXY_{o.variable}" for o in ssh_agent_proxy.OPTIONS}
    known |= set(re.findall(r"SSH_AGENT_PROXY_[A-Z_]+", SHIM_SOURCE))
    assert set(re.findall(r"SSH_AGENT_PROXY_[A-Z_]+", README)) <= known


def test_every_endpoint_is_in_the_table() -> None:
    cells = first_cells(section("## Endpoints"))
    assert [cell.strip("`").split()[1] for cell in cells] == list(ssh_agent_proxy.Handler.ROUTES)


def test_every_message_explained_is_one_that_is_said() -> None:
    said = re.sub(r'"\s*\n\s*f?"', "", PROXY_SOURCE) + SHIM_SOURCE
    said = re.sub(r"\{(self|exchange)\.upstream\}", "agent at ", said)
    said = said.replace("{self.what}", "the agent at ")
    messages = first_cells(section("## When something fails"))
    assert len(messages) > 10
    for message in messages:
        for fragment in re.split("…|`, `", message.strip("`")):
            assert fragment.strip() in said, f"nobody says {fragment!r}"


def test_every_path_of_the_layout_exists() -> None:
    for path in re.findall(r"^\| `(.+?)` \|", section("## Layout"), re.M):
        assert (ROOT / path).exists(), path


def test_every_link_within_the_page_leads_somewhere() -> None:
    headings = {
        re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-")
        for h in re.findall(r"^#+ (.+)$", README, re.M)
    }
    links = re.findall(r"\]\(#(.+?)\)", README)
    assert links
    assert set(links) <= headings


def test_the_json_is_json() -> None:
    (devcontainer,) = blocks(README, "json")
    assert "SSH_AGENT_PROXY_URL" in json.loads(devcontainer)["containerEnv"]


def test_the_container_set_up_makes_commits_that_git_calls_good(
    home: Path, keys: Keys, proxy: Proxy
) -> None:
    setup, trust = blocks(section("## In the container"), "sh")
    script = (setup + trust).replace("127.0.0.1:7221", f"127.0.0.1:{proxy.port}")
    script = script.replace("/usr/local/bin/", f"{home}/bin/")
    (home / "bin").mkdir()
    url = f"{proxy.url}/sign"
    env = clean_env(home, SSH_AGENT_PROXY_URL=url)
    env["PATH"] = f"{home}/bin:{env['PATH']}"
    run(["git", "config", "--global", "user.email", "author@example.com"], env=env)
    run(["sh", "-eu"], env=env, cwd=home, input=script.encode())
    repository = home / "repository"
    run(["git", "init", "-q", repository], env=env)
    run(["git", "commit", "-q", "--allow-empty", "-m", "first"], env=env, cwd=repository)
    shown = run(["git", "log", "--show-signature", "-1"], env=env, cwd=repository).stdout
    assert b'Good "git" signature for author@example.com' in shown


def test_the_example_of_a_signature_by_hand_gives_one(home: Path, proxy: Proxy) -> None:
    (example,) = blocks(section("## Endpoints"), "sh")
    example = example.replace("127.0.0.1:7221", f"127.0.0.1:{proxy.port}")
    done = run(["sh", "-eu"], env=clean_env(home), input=example.encode())
    (home / "signature").write_bytes(done.stdout)
    checked = run(
        ["ssh-keygen", "-Y", "check-novalidate", "-n", "git", "-s", home / "signature"],
        env=clean_env(home),
        input=b"hello",
    )
    assert b'Good "git" signature' in checked.stdout


def test_the_log_lines_shown_are_those_of_a_start(proxy: Proxy) -> None:
    shown = next(b for b in blocks(section("## On the host"), "") if "listening on" in b)
    proxy.wait_log("signing with")
    log = proxy.log()
    for line in shown.splitlines():
        pattern = re.escape(line.lstrip("… "))
        pattern = pattern.replace("7221", r"\d+").replace("…", ".+").replace(
            re.escape("/run/user/1000/ssh-agent.socket"), ".+"
        )
        assert re.search(pattern, log), line


def test_the_report_of_check_is_one_that_check_gives(home: Path, agent: Agent, keys: Keys) -> None:
    (shown,) = [b for b in blocks(section("## On the host"), "") if b.startswith("ok ")]
    agent.add(keys["ed25519"])
    argv = [sys.executable, PROXY, "check", "--upstream", agent.sock]
    given = run(argv, env=clean_env(home)).stdout.decode()

    def alike(report: str) -> List[str]:
        """Without what differs from one machine to the next."""
        report = re.sub(r"'\S+'", "'agent'", report)
        report = re.sub(r"SHA256:\S+( \S+@\S+)?", "key", report)
        report = re.sub(r"ABI \d.*\)", "ABI)", report)
        return re.sub(r".{5}memory (.*?:).*", r"memory \1", report).splitlines()

    assert alike(shown) == alike(given)


def test_the_address_shown_is_the_default() -> None:
    (address,) = ssh_agent_proxy.Config.from_env({}, [], ssh_agent_proxy.COMMANDS).addr
    assert str(address) == "127.0.0.1:7221"
    assert socket.inet_aton(address.host)


# ---------------------------------------------------------------- leashes


@pytest.fixture
def host(home: Path, agent: Agent, keys: Keys) -> Dict[str, str]:
    """A person's environment on the host, with the program installed and an agent at hand."""
    agent.add(keys["ed25519"])
    bin_folder, runtime = home / "bin", home / "run"
    bin_folder.mkdir()
    runtime.mkdir()
    program = bin_folder / "ssh-agent-proxy"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{PROXY}" "$@"\n')
    program.chmod(0o755)
    env = clean_env(home, SSH_AUTH_SOCK=agent.sock, XDG_RUNTIME_DIR=runtime,
                    SSH_AGENT_PROXY_ADDR="127.0.0.1:0")  # fmt: skip
    env["PATH"] = f"{bin_folder}:{env['PATH']}"
    return env


@contextlib.contextmanager
def serving(script: str, home: Path, env: Dict[str, str]) -> Iterator[str]:
    """What the proxy, which SCRIPT starts at its end, says that it listens on."""
    log = home / "log"
    with open(log, "wb") as stderr:
        shell = subprocess.Popen(
            ["sh", "-eu", "-c", script], env=env, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True,
        )  # fmt: skip
    try:
        pattern = r"listening on (\S+) "
        yield wait_for(lambda: re.search(pattern, log.read_text()), message=pattern).group(1)
    finally:
        os.killpg(shell.pid, signal.SIGTERM)
        shell.wait(20)


def sign(address: str, home: Path, *options: str) -> bytes:
    """The answer's status and body."""
    where = ["--unix-socket", address[len("unix:") :]] if address.startswith("unix:") else []
    url = "http://localhost/sign" if where else f"http://{address}/sign"
    return run(
        ["curl", "-sS", "-w", "%{http_code}", "--data-binary", "x", *where, *options, url],
        env=clean_env(home),
    ).stdout


def test_the_socket_shown_signs_for_its_owner(home: Path, host: Dict[str, str]) -> None:
    (script,) = blocks(section("### A socket instead of a port"), "sh")
    with serving(script, home, host) as address:
        folder = home / "run/ssh-agent-proxy"
        assert address == f"unix:{folder}/socket"
        assert folder.stat().st_mode & 0o777 == 0o700
        assert sign(address, home).endswith(b"200")


def test_the_token_shown_is_needed_and_enough(home: Path, host: Dict[str, str]) -> None:
    (script,) = blocks(section("### A token for each container"), "sh")
    adding, serve = script.splitlines()
    run(["sh", "-eu", "-c", adding], env=host, cwd=home)
    token = (home / "dev.token").read_text().strip()
    with serving(serve, home, host) as address:
        assert sign(address, home).endswith(b"401")
        assert sign(address, home, "-H", f"Authorization: Bearer {token}").endswith(b"200")


def test_the_token_file_shown_is_one() -> None:
    (text,) = blocks(section("### A token for each container"), "")
    first, second = ssh_agent_proxy.parse_tokens(
        text.replace("Wk8u…", 43 * "A").replace("…", "")
    )
    assert (first.name, first.key, first.payloads) == ("dev", "", ())
    assert (second.name, second.payloads) == ("agent", ("commit",))
    assert second.key == "SHA256:" + 43 * "A"


def test_the_askpass_shown_is_asked(home: Path, host: Dict[str, str]) -> None:
    script, own = blocks(section("### Your own yes"), "sh")
    run(["sh", "-n"], input=own.encode())
    askpass = home / "askpass"
    askpass.write_text(f'#!/bin/sh\nprintf "%s\\n" "$1" >"{home}/prompt"\n')
    askpass.chmod(0o755)
    assert "/usr/bin/ssh-askpass " in script
    with serving(script.replace("/usr/bin/ssh-askpass", str(askpass)), home, host) as address:
        assert sign(address, home).endswith(b"200")
    assert (home / "prompt").read_text().startswith("Sign something that is no git commit")


def test_the_prompt_shown_is_such_a_prompt() -> None:
    (shown,) = blocks(section("### Your own yes"), "")
    tree = re.search("tree: ([0-9a-f]{40})", shown)
    assert tree
    payload = ssh_agent_proxy.parse_payload(
        f"tree {tree[1]}\nparent {tree[1]}\n"
        "author A U Thor <author@example.com> 1 +0000\n"
        "committer C O Mitter <committer@example.com> 1 +0000\n\nAdd a leash\n".encode()
    )
    facts = re.findall("^• (asked by|key|namespace|a yes holds): (.+)$", shown, re.M)
    assert ssh_agent_proxy.consent_prompt(payload, dict(facts)) + "\n" == shown
