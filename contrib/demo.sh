#!/bin/sh
# The whole way of a signature, with nothing set up: a throwaway agent and key, the proxy in front
# of it, and git, which signs a commit, a tag and a merge through the shim and verifies them.
# Nothing of the user's is read or changed, nothing is left behind, interrupted too.
#
#     [PYTHON=python3.12] sh contrib/demo.sh
set -eu

who=demo@example.com

main() {
    # Without a trap a signal would end the shell alone, and what it waits for would run on.
    on_signal='exit'
    trap '$on_signal 129' HUP
    trap '$on_signal 130' INT
    trap '$on_signal 131' QUIT
    trap '$on_signal 141' PIPE
    trap '$on_signal 143' TERM
    unset CDPATH
    root=$(cd -- "$(dirname -- "$0")/.." && pwd)
    if [ "${1:-}" != isolated ]; then
        PYTHON=${PYTHON:-python3} sh "$root/contrib/need.sh" \
            python git curl ssh-agent ssh-add ssh-keygen
        isolate
    fi
    make_room
    start_agent
    start_proxy
    set_git_up
    sign
}

# Starts this script anew, without the user's settings of git, ssh, curl, Python and the proxy.
isolate() {
    # The interpreter itself: a version manager's wrapper looks at variables that are about to go.
    python=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)')
    # The path of a socket holds some 100 bytes.
    tmp=${TMPDIR:-/tmp}
    case $tmp in
    /*) [ ${#tmp} -le 60 ] || tmp=/tmp ;;
    *) tmp=/tmp ;;
    esac
    exec env -i PATH="$PATH" LC_ALL=C TMPDIR="$tmp" PYTHON="$python" \
        ${LD_LIBRARY_PATH:+"LD_LIBRARY_PATH=$LD_LIBRARY_PATH"} \
        sh "$root/contrib/demo.sh" isolated
}

# ---- leaving nothing behind

# A temporary directory, which is home, TMPDIR and all that git sees from here on.
make_room() {
    dir='' agent='' proxy='' caught=''
    umask 077
    # From the moment that the directory exists its name must be known: mktemp itself can't be
    # interrupted, and a signal that comes meanwhile is kept until then.
    on_signal=keep
    dir=$(trap '' HUP INT QUIT PIPE TERM && mktemp -d "$TMPDIR/ssh-agent-proxy-demo.XXXXXX")
    on_signal=finish
    trap 'finish "$?"' EXIT
    [ -z "$caught" ] || finish "$caught"
    mkdir "$dir/home" "$dir/tmp" "$dir/bin"
    HOME=$dir/home TMPDIR=$dir/tmp PATH=$dir/bin:$PATH
    export HOME TMPDIR PATH
}

keep() {
    caught=$1
}

finish() {
    # A second Ctrl-C must not end the cleaning.
    trap '' HUP INT QUIT PIPE TERM
    trap - EXIT
    case $1 in
    0 | 129 | 130 | 131 | 141 | 143) ;;
    *) show_log ;;
    esac
    # $! is a process that was started, but whose number is not noted yet; none is 0 in yash.
    for process in "$proxy" "$agent" "${!:-0}"; do
        case $process in
        '' | 0) ;;
        *) stop "$process" ;;
        esac
    done
    cd /
    # Git's helpers were interrupted with it and may still be taking their files away.
    rm -rf "$dir" 2>/dev/null || { nap && rm -rf "$dir"; }
    exit "$1"
}

# What the agent and the proxy had to say about a failure.
show_log() {
    sed 's/^/    /' "$dir"/*.log >&2 2>/dev/null || :
}

# Ends one of our processes and waits until it is gone.
stop() {
    kill "$1" 2>/dev/null || return 0
    tries=0
    while kill -0 "$1" 2>/dev/null; do
        tries=$((tries + 1))
        if [ "$tries" -gt 120 ]; then
            kill -KILL "$1" 2>/dev/null || :
            break
        fi
        nap
    done
    wait "$1" 2>/dev/null || :
}

# POSIX knows whole seconds only.
nap() {
    sleep 0.1 2>/dev/null || sleep 1
}

give_up() {
    printf 'demo: %s\n' "$1" >&2
    exit 1
}

# ---- the host: an agent, and the proxy in front of it

start_agent() {
    ssh-keygen -q -t ed25519 -N '' -C "$who" -f "$dir/key" </dev/null
    : >"$dir/agent.log"
    # exec: some shells' $! would be a shell in between.
    exec ssh-agent -D -a "$dir/agent" >"$dir/agent.log" 2>&1 </dev/null &
    agent=$!
    wait_until agent_answers "$agent" ssh-agent
    on_host ssh-add -q "$dir/key" </dev/null
    rm "$dir/key"
    printf 'A throwaway agent holds a throwaway key, which is in no file:\n    '
    on_host ssh-add -l
}

agent_answers() {
    # 1 is its answer that it holds no key yet, 2 is silence.
    status=0
    on_host ssh-add -l >/dev/null 2>&1 || status=$?
    [ "$status" -lt 2 ]
}

on_host() {
    SSH_AUTH_SOCK=$dir/agent "$@"
}

start_proxy() {
    : >"$dir/proxy.log"
    exec env SSH_AUTH_SOCK="$dir/agent" \
        "$PYTHON" "$root/ssh_agent_proxy.py" --addr 127.0.0.1:0 \
        >"$dir/proxy.log" 2>&1 </dev/null &
    proxy=$!
    wait_until proxy_listens "$proxy" 'the proxy'
    SSH_AGENT_PROXY_URL=http://127.0.0.1:$port/sign
    export SSH_AGENT_PROXY_URL
    printf 'The proxy stands in front of it: %s\n' "$SSH_AGENT_PROXY_URL"
}

proxy_listens() {
    port=$(sed -n 's/.*listening on 127\.0\.0\.1:\([0-9]*\) .*/\1/p' "$dir/proxy.log")
    [ -n "$port" ]
}

# wait_until TEST PROCESS NAME: 10 seconds at most, and no longer than the process lives.
wait_until() {
    tries=0
    until "$1"; do
        tries=$((tries + 1))
        if [ "$tries" -gt 100 ] || ! kill -0 "$2" 2>/dev/null; then
            give_up "$3 did not start"
        fi
        nap
    done
}

# ---- the container: git, the shim, and the address of the proxy; no agent, no key

set_git_up() {
    [ -x "$root/shim.sh" ] || give_up "$root/shim.sh can't be run: chmod +x it"
    ln -s "$root/shim.sh" "$dir/bin/ssh-agent-proxy-sign"
    GIT_CONFIG_NOSYSTEM=1
    export GIT_CONFIG_NOSYSTEM
    cat >"$HOME/.gitconfig" <<EOF
[user]
    name = Demo
    email = $who
[gpg]
    format = ssh
[gpg "ssh"]
    program = ssh-agent-proxy-sign
    defaultKeyCommand = ssh-agent-proxy-sign key
    allowedSignersFile = ~/allowed_signers
[commit]
    gpgSign = true
[gc]
    auto = 0
EOF
    key=$(ssh-agent-proxy-sign pubkey)
    printf '%s namespaces="git" %s\n' "$who" "$key" >"$HOME/allowed_signers"
    git init -q --template= -b main "$dir/repository"
    cd "$dir/repository"
    printf 'Git, as in a container, has neither: it signs through the shim.\n'
}

sign() {
    show git commit -q --allow-empty -m 'a commit'
    show git verify-commit HEAD
    show git tag -s -m 'a tag' v1
    show git verify-tag v1
    git checkout -q -b topic
    git commit -q --allow-empty -m 'a commit on a branch'
    git checkout -q main
    show git merge -q --no-ff -S -m 'a merge' topic
    show git verify-commit HEAD
    printf 'Commit, tag and merge: signed by the agent, verified by git. Nothing of it stays.\n'
}

# Prints a command as it would be typed, and runs it.
show() {
    printf '\n$'
    for word; do
        case $word in
        *' '*) printf " '%s'" "$word" ;;
        *) printf ' %s' "$word" ;;
        esac
    done
    printf '\n'
    "$@" 2>&1 </dev/null
}

main "$@"
