"""The recipes of docs/containers.md, where namespaces stand in for the places."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any, Callable, Dict

import pytest
import yaml
from conftest import SHIM, Agent, Proxy, cannot_run, clean_env, need, private_file, run
from test_readme import ALL, CONTAINERS, blocks, section

TOKEN = "A" * 43
FIRST = "rm -rf made; git init -q made; cd made; git commit -q --allow-empty -m first"
FIRST += "; git cat-file commit HEAD"


PLAIN = "Where .gitconfig can't be written"


def variables_of(place: str) -> Dict[str, Any]:
    """Git's settings, as its section has them."""
    text = section(f"## {place}", CONTAINERS)
    if place == "Claude Code":
        settings = json.loads(blocks(text, "json")[0])
        assert settings["sandbox"]["network"]["allowedDomains"] == ["127.0.0.1"]
        return dict(settings["env"])
    if place == PLAIN:
        script = blocks(text, "sh")[0].replace("/usr/local/bin/ssh-agent-proxy-sign", str(SHIM))
        said = run(["sh", "-euc", script + "env | grep ^GIT_CONFIG_"]).stdout
        return dict(line.split("=", 1) for line in said.decode().splitlines())
    if sys.version_info < (3, 11):
        cannot_run("this Python reads no TOML: make test PYTHON=python3.11")
    import tomllib

    profile, variables = map(tomllib.loads, blocks(text, "toml"))
    chosen = profile["permissions"][profile["default_permissions"]]
    assert chosen["network"]["domains"] == {"127.0.0.1": "allow"}
    return dict(variables["shell_environment_policy"]["set"])


def signs(short: Path, url: str, *command: Any, place: str = PLAIN) -> bool:
    """Is the commit signed that COMMAND makes and prints in there, with the variables of PLACE?"""
    env = {"SSH_AGENT_PROXY_URL": url, "SSH_AGENT_PROXY_TOKEN": TOKEN, **variables_of(place)}
    (short / "bin").mkdir(exist_ok=True)
    shutil.copy(SHIM, short / "bin/ssh-agent-proxy-sign")
    env["PATH"] = f"{short}/bin:{os.environ['PATH']}"
    done = run(command, clean_env(short, **{**env, "TMPDIR": "/tmp"}), short)
    return b"\ngpgsig -----BEGIN SSH SIGNATURE-----\n" in done.stdout


def test_the_yaml_has_what_compose_and_kubernetes_read() -> None:
    *composed, pod = [yaml.safe_load(block) for block in blocks(ALL, "yaml")]
    for document in composed:
        assert {"image", "volumes", "environment"} <= set(document["services"]["dev"])
    assert [container["name"] for container in pod["spec"]["containers"]][1] == "ssh-agent-proxy"


@pytest.mark.parametrize(("place", "before"), [
    ("Claude Code", ":"), ("Codex", ":"), (PLAIN, "export HOME=/proc"), (PLAIN, "unset HOME"),
])  # fmt: skip
def test_variables_sign(place: str, before: str, short: Path, proxy: Proxy) -> None:
    """Also without a home, or with one where nothing can be written."""
    assert signs(short, f"{proxy.url}/sign", "sh", "-euc", f"{before}; {FIRST}", place=place)


# ---------------------------------------------------------------- with networks and mounts


def need_root_and(program: str, package: str) -> None:
    if os.geteuid():
        cannot_run("only root can make networks and mounts: run the tests as root")
    need(program, package)


SOCKET = """
mount -t tmpfs tmpfs /run
mkdir /run/ssh-agent-proxy
mount --bind socket /run/ssh-agent-proxy
mount -o remount,bind,ro /run/ssh-agent-proxy
exec setpriv --reuid 65534 --clear-groups sh -euc "$1"
"""
# docker0 is there after the proxy.
BRIDGE = """
unshare --net --mount sh -euc '
    until ip addr add 172.17.0.2/16 dev eth0; do sleep 0.01; done 2>/dev/null
    ip link set eth0 up
    mount --bind hosts /etc/hosts
    eval "$1"' - "$1" &
until [ "$(readlink /proc/$!/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do sleep 0.01; done
ip link add docker0 type veth peer name eth0 netns $!
ip addr add 172.17.0.1/16 dev docker0
ip link set docker0 up
wait $!
"""


@pytest.mark.parametrize(("heading", "script"), [
    ("### A mounted socket", SOCKET), ("### Host-gateway", BRIDGE),
])  # fmt: skip
def test_a_container_with_a_token_signs(
    heading: str, script: str, short: Path, agent_with_key: Agent, start_proxy: Callable[..., Proxy]
) -> None:
    """As another user by a read-only mount, or through an address that came later."""
    need_root_and("ip", "iproute2")
    (short / "hosts").write_text("172.17.0.1 host.docker.internal\n")
    (short / "socket").mkdir()
    short.chmod(0o777)
    tokens = private_file(short / "tokens", f"{TOKEN} dev\n")
    recipe = section(heading, CONTAINERS)
    addr = re.findall(r"--addr (\S+)`", recipe) or [f"unix:{short}/socket/socket?mode=0666"]
    apart = ["unshare", "--net", "sh", "-euc", 'ip link set lo up; exec "$0" "$@"', sys.executable]
    proxy = start_proxy("--token-file", tokens, upstream=agent_with_key.sock, python=apart,
                        addr=addr[0], wait=False)  # fmt: skip
    proxy.wait_log("listening on .*(socket|172.17.0.1)")
    url = re.findall(r"-e SSH_AGENT_PROXY_URL=(\S+)", recipe)[0]
    inside = ["nsenter", "--target", proxy.pid, "--net", "unshare", "--mount", "sh", "-euc", script]
    assert signs(short, url, *inside, "-", FIRST)


SSHD = "HostKey {0}/key\nAuthorizedKeysFile {0}/key.pub\nStrictModes no\nAcceptEnv *\n"
MACHINE = "ip link set lo up; mount -t tmpfs run /run; mkdir /run/sshd; exec /usr/sbin/sshd -i -f"


@pytest.mark.parametrize("way", [0, 1])
def test_ssh_brings_the_port_along(way: int, short: Path, proxy: Proxy) -> None:
    need_root_and("/usr/sbin/sshd", "openssh-server")
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", short / "key"])
    (short / "sshd").write_text(SSHD.format(short) + "StreamLocalBindUnlink yes\n")
    recipe = blocks(section("## Another machine", CONTAINERS), "sh")[way]
    recipe = re.sub("/home/you", str(short), recipe).replace("'", "")
    ssh, option, there, machine = recipe.replace(":127.0.0.1:7221", "").split()
    sshd = f"unshare --net --mount --pid --fork sh -c '{MACHINE} {short}/sshd'"
    options = [f"ProxyCommand={sshd}", "StrictHostKeyChecking=no", "SendEnv=*"]
    options += [f"UserKnownHostsFile={short}/known", "ExitOnForwardFailure=yes"]
    login = [ssh, "-F", "none", "-i", short / "key", *(f"-o{o}" for o in options)]
    login += [option, f"{there}:127.0.0.1:{proxy.port}", machine, f"cd {short}; {FIRST}"]
    for _ in range(2):  # the second finds the first one's socket in its place
        assert signs(short, f"unix:{there}" if way else "http://127.0.0.1:7221/sign", *login)
