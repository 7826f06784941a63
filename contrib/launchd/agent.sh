#!/bin/sh
# What launchd does with the LaunchAgent, for make: agent.sh check | load PLIST | unload PLIST
set -eu

LABEL=ssh-agent-proxy

main() {
    # The session of the user on the screen: that is where a prompt can be shown.
    domain=gui/$(id -u)
    job=$domain/$LABEL
    case $1 in
    check) check ;;
    load)
        unload "$2"
        load "$2"
        ;;
    unload) unload "$2" ;;
    *) fail "agent.sh: not $1" ;;
    esac
}

fail() {
    printf '%s\n' "$1" >&2
    exit 1
}

check() {
    command -v launchctl >/dev/null 2>&1 ||
        fail 'there is no launchctl here: launchd is macOS'\''s (on Linux: make install-systemd)'
    # The agent would be root's, in a folder of the user's.
    [ -z "${SUDO_UID:-}" ] || fail 'without sudo, please: a LaunchAgent is the user'\''s own'
}

load() {
    # It may have been disabled, which outlives its removal.
    launchctl enable "$job" 2>/dev/null || :
    # Before OS X 10.10 there is neither enable nor bootstrap.
    why=$(launchctl bootstrap "$domain" "$1" 2>&1) || launchctl load -w "$1" 2>/dev/null || :
    # load exits 0 whatever happened.
    loaded || fail "launchd did not take $1: ${why:-it does not say why}"
}

unload() {
    loaded || return 0
    launchctl bootout "$job" 2>/dev/null || launchctl unload "$1" 2>/dev/null || :
    # It is gone once the proxy has finished what was in flight, and can't be loaded before that.
    seconds=0
    while loaded; do
        [ "$seconds" -lt 20 ] || fail "launchd still has $job: launchctl bootout $job"
        sleep 1
        seconds=$((seconds + 1))
    done
}

loaded() {
    launchctl print "$job" >/dev/null 2>&1 || launchctl list "$LABEL" >/dev/null 2>&1
}

main "$@"
