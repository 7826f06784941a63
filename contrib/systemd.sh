#!/bin/sh
# The user service of systemd, for make: sh contrib/systemd.sh ready|install|uninstall|status|logs
#
# `ready` says what stands in the way of `install`, before anything has been changed. All of them
# want BINDIR, CONFIG_DIR, SYSTEMD_USER_DIR and DESTDIR in the environment; with DESTDIR, for
# packagers, files are written below it and nothing else is done.
set -eu

NAME=ssh-agent-proxy
UNIT=$NAME.service
TRIAL=$NAME-trial.service

main() {
    sources=$(dirname "$0")/systemd
    program=$BINDIR/$NAME
    unit=${DESTDIR:-}$SYSTEMD_USER_DIR/$UNIT
    sandbox=$unit.d/sandbox.conf
    wanted=${DESTDIR:-}$SYSTEMD_USER_DIR/default.target.wants/$UNIT
    env=${DESTDIR:-}$CONFIG_DIR/env
    config=$CONFIG_DIR
    if [ -n "${DESTDIR:-}" ]; then
        # A package is not for the home of the one who makes it.
        case $CONFIG_DIR in "${HOME:-}"/*) config=%h${CONFIG_DIR#"${HOME:-}"} ;; esac
    fi
    action=$1
    shift
    "$action" "$@"
}

fail() {
    printf '%s\n' "$@" >&2
    exit 1
}

user() {
    systemctl --user "$@"
}

# ---- what has to be there

ready() {
    # (A package's settings are in the home of whoever uses it.)
    [ -n "${HOME:-}" ] || case $SYSTEMD_USER_DIR:${DESTDIR:+package}$CONFIG_DIR in
    /.config/* | *:/.config/*) fail 'HOME is not set: set it, or CONFIG_DIR and SYSTEMD_USER_DIR' ;;
    esac
    for path in "$BINDIR" "$CONFIG_DIR" "$SYSTEMD_USER_DIR"; do
        case $path in
        *[[:cntrl:]]*) fail "a path with a control character can't stand in a unit: $path" ;;
        /*) ;;
        *) fail "not an absolute path, as a unit needs: $path" ;;
        esac
    done
    [ -z "${DESTDIR:-}" ] || return 0
    need_manager
    [ -n "${XDG_RUNTIME_DIR:-}" ] ||
        fail "XDG_RUNTIME_DIR is not set here, where the service's sockets would be"
    # One with a blank or a quote is told in double quotes.
    quoted=\"$(printf '%s\n' "$SYSTEMD_USER_DIR" | sed 's/[\\"$`]/\\&/g')\"
    case " $units " in
    *" $SYSTEMD_USER_DIR "* | *" $quoted "*) ;;
    *)
        fail "your systemd does not look for units in $SYSTEMD_USER_DIR; where it does:" \
            "  $units" "Choose one of yours: make install-systemd SYSTEMD_USER_DIR=…"
        ;;
    esac
    check_settings
    for file in "$unit" "$sandbox"; do
        ! is_foreign "$file" || [ ! -e "$file.old" ] ||
            fail "$file was not written by make, and is to become $file.old, which is there" \
                "already: move one of them away, then run this again (nothing was changed)"
    done
}

# What systemd passes over with a warning (`export NAME=…`, say), or unread, would be no setting: a
# token file, a payload policy, that is not in force.
check_settings() {
    [ -e "$env" ] || return 0
    if [ ! -f "$env" ] || [ ! -r "$env" ]; then
        fail "$env is no file that you can read (nothing was changed)"
    fi
    wrong=$(tr '\r' '\n' <"$env" | awk '
        going_on { going_on = /\\$/; next }
        /^[ \t]*([#;]|$)/ { going_on = /\\$/; next }
        !/^[ \t]*[A-Za-z_][A-Za-z0-9_]*[ \t]*=/ {
            sub(/=.*/, "=…")
            print
            exit
        }
        {
            # Where a quote is open, what follows is no line of its own.
            value = $0
            sub(/^[^=]*=[ \t]*/, "", value)
            quote = substr(value, 1, 1)
            if ((quote == "\"" || quote == "\047") && index(substr(value, 2), quote) == 0)
                exit
            going_on = /\\$/
        }' | LC_ALL=C tr -d '\000-\010\013-\037\177')
    [ -z "$wrong" ] || fail "$env: systemd would pass over this line: $wrong" \
        "It takes NAME=VALUE alone, without export: mend that, then run this again (nothing was" \
        "changed)."
}

# By its first line, which no version changes: others have a `make install-systemd` too.
is_ours() {
    case $1 in
    *.conf) source=$sources/sandbox.conf ;;
    *) source=$sources/$UNIT ;;
    esac
    [ "$(sed 1q "$1")" = "$(sed 1q "$source")" ]
}

is_foreign() {
    [ -e "$1" ] && ! is_ours "$1"
}

# A unit of the same name that somebody else wrote (another program of this name, say) is kept.
put_aside() {
    is_foreign "$1" || return 0
    mv "$1" "$1.old"
    printf 'Kept: %s, as %s.old\n' "$1" "$1"
}

# Leaves in $units the folders that the manager reads.
need_manager() {
    if ! command -v systemctl >/dev/null 2>&1; then
        why='there is no systemd here (no systemctl)'
        units=''
    else
        why=$(user show --property=UnitPath --value 2>&1) && units=$why || units=''
        # In a chroot it says that it does nothing, and is content.
        case $units in *"ignoring command"* | *"ignoring request"*) units='' ;; esac
    fi
    [ -z "$units" ] || return 0
    printf 'no systemd runs for you here, so there is nothing to do with a service: %s\n' \
        "${why:-systemctl gives no answer}" >&2
    if on_wsl; then
        fail 'WSL: put systemd=true under [boot] in /etc/wsl.conf, then wsl.exe --shutdown'
    fi
    if [ -n "${SUDO_USER:-}" ]; then
        fail "Run make without sudo, as the user whose agent it is."
    fi
    runtime=/run/user/$(id -u)
    if [ -z "${XDG_RUNTIME_DIR:-}" ] && [ -e "$runtime/systemd/private" ]; then
        fail "XDG_RUNTIME_DIR is not set, as after su: XDG_RUNTIME_DIR=$runtime make …"
    fi
    fail "Log in as this user by ssh or at a screen, or have a manager started without a login:" \
        "  sudo loginctl enable-linger $(id -un)" \
        "Where systemd can't run (a container), \`make install\` will do: start $NAME as other" \
        "programs are started there."
}

on_wsl() {
    case ${WSL_DISTRO_NAME:+Microsoft}$(uname -r) in *[Mm]icrosoft*) ;; *) return 1 ;; esac
}

# ---- install

install() {
    tmp=$(mktemp -d)
    trap 'rm -rf "$tmp"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    if [ -n "${DESTDIR:-}" ]; then
        render >"$tmp/unit"
        place 755 644 "$tmp/unit" "$unit"
        printf 'Written: %s\n' "$unit"
        if [ "$config" = "$CONFIG_DIR" ]; then
            place 755 644 "$sources/env" "$env"
            printf 'Written: %s\n' "$env"
        else
            printf 'Not written: %s (it is each user'"'"'s own)\n' "$config/env"
        fi
        printf 'Not written: %s (whether it starts, only a try shows)\n' "$sandbox"
        return
    fi
    # One at a time: two would share the trial.
    exec 9<"$XDG_RUNTIME_DIR"
    ! command -v flock >/dev/null 2>&1 || flock 9
    "$program" --version >"$tmp/version" ||
        fail "$program does not run: no service was installed"
    if [ ! -e "$env" ] && [ ! -L "$env" ]; then
        place 700 600 "$sources/env" "$env"
        printf 'Written: %s\n' "$env"
    fi
    render >"$tmp/unit"
    try_sandbox
    update
    user --quiet enable "$UNIT"
    is_program
    start
    report
}

# place FOLDER_MODE MODE SOURCE TARGET: whole or not at all; a folder that is there stays as it is.
place() {
    folder=$(dirname "$4")
    mkdir -p "$(dirname "$folder")"
    [ -d "$folder" ] || mkdir -m "$1" "$folder"
    temporary=$folder/.$(basename "$4").new
    if ! { command install -m "$2" "$3" "$temporary" && mv -f "$temporary" "$4"; }; then
        rm -f "$temporary"
        exit 1
    fi
}

# The unit. What it was made of shows when a service that runs has to be started anew.
render() {
    made_of=$(cat "$program" "$env" 2>/dev/null | cksum)
    vsock=''
    if [ -n "${DESTDIR:-}" ]; then
        made_of='files for a package'
        vsock=' AF_VSOCK'
    elif on_wsl; then
        vsock=' AF_VSOCK'
    fi
    # In double quotes, after a : that keeps $ as it is; % is systemd's own. It takes no program
    # with a quote or a backslash in its name, but an argument.
    exec_start=\"$(printf '%s\n' "$program" | sed 's/[\\"]/\\&/g; s/%/%%/g')\"
    case $program in
    *[\'\"\\]*) exec_start="/bin/sh -c 'exec \"\$0\" \"\$@\"' $exec_start" ;;
    esac
    # It is looked for as a pattern.
    env_file=$(printf '%s\n' "${config#%h}/env" | sed 's/[][\\*?]/\\&/g; s/%/%%/g')
    [ "$config" = "$CONFIG_DIR" ] || env_file=%h$env_file
    [ -z "${DESTDIR:-}" ] || env_file=-$env_file
    MADE_OF=$made_of PROGRAM=$exec_start ENV_FILE=$env_file VSOCK=$vsock awk '
        function fill(name,   mark, at) {
            mark = "@" name "@"
            at = index($0, mark)
            if (at)
                $0 = substr($0, 1, at - 1) ENVIRON[name] substr($0, at + length(mark))
        }
        { fill("MADE_OF"); fill("PROGRAM"); fill("ENV_FILE"); fill("VSOCK"); print }
    ' "$sources/$UNIT"
}

# A unit with the same settings, started once and removed. Leaves in $refused why it did not start.
try_sandbox() {
    folder=$XDG_RUNTIME_DIR/systemd/user
    trap 'end_trial; rm -rf "$tmp"' EXIT
    mkdir -p "$folder"
    {
        cat "$tmp/unit" "$sources/sandbox.conf"
        printf '%s\n' '[Service]' Type=oneshot Restart=no RestartForceExitStatus= \
            EnvironmentFile= ExecStart= \
            "$(sed -n 's/^ExecStart=.*/& --version/p' "$tmp/unit")" RuntimeDirectory= \
            "RuntimeDirectory=$NAME-trial" RuntimeDirectoryPreserve=no StandardOutput=null
    } >"$folder/$TRIAL"
    user daemon-reload
    refused=''
    if ! user start "$TRIAL" >"$tmp/trial" 2>&1; then
        refused=$(user --no-pager --lines=0 status "$TRIAL" 2>&1 |
            sed -n 's/.*status=\([0-9]*\/[A-Z_]*\).*/\1/p' | sed 1q) || :
        case $refused in
        */USER) refused="it allows no user namespaces, $refused" ;;
        */NAMESPACE) refused="it lets no user mount anything, $refused" ;;
        *) refused=${refused:-$(cat "$tmp/trial")} ;;
        esac
    fi
    end_trial
    trap 'rm -rf "$tmp"' EXIT
}

end_trial() {
    rm -f "$XDG_RUNTIME_DIR/systemd/user/$TRIAL"
    {
        user stop "$TRIAL"
        user daemon-reload
        user reset-failed "$TRIAL"
        rmdir "$XDG_RUNTIME_DIR/systemd/user"
    } >/dev/null 2>&1 || :
}

# The files, where they differ from what is there. A service that runs is stopped before: when this
# is interrupted, the next run finds it so, and starts it.
update() {
    changed=''
    cmp -s "$tmp/unit" "$unit" || changed=yes
    if [ -n "$refused" ]; then
        [ ! -e "$sandbox" ] || changed=yes
    else
        cmp -s "$sources/sandbox.conf" "$sandbox" || changed=yes
    fi
    [ -n "$changed" ] || return 0
    user stop "$UNIT" 2>/dev/null || : # where it was not there
    put_aside "$unit"
    put_aside "$sandbox"
    place 755 644 "$tmp/unit" "$unit"
    printf 'Written: %s\n' "$unit"
    if [ -z "$refused" ]; then
        place 755 644 "$sources/sandbox.conf" "$sandbox"
        printf 'Written: %s\n' "$sandbox"
    elif [ -e "$sandbox" ]; then
        rm -f "$sandbox"
        rmdir "$unit.d" 2>/dev/null || : # others are there
        printf 'Removed: %s\n' "$sandbox"
    fi
    user daemon-reload
}

# Other files than ours that have a say, of the user's or of the program that was here before.
others() {
    # (DropInPaths= is one line, in which some paths are quoted.)
    user cat "$UNIT" 2>/dev/null | sed -n 's/^# \(\/.*\.conf\)$/\1/p' | grep -vxF "$sandbox" || :
}

# An `ExecStart=` in a file that another program of this name left would go on running that one.
is_program() {
    case $(user show --property=ExecStart --value "$UNIT") in
    *"$BINDIR/$NAME"*) ;;
    *)
        user stop "$UNIT" 2>/dev/null || :
        fail "$UNIT would not run $program: one of these has another ExecStart=, or it is" \
            "another unit: move it away, then run this again" \
            "$(user show --property=FragmentPath --value "$UNIT")" "$(others)"
        ;;
    esac
}

start() {
    user is-active --quiet "$UNIT" && return
    user reset-failed "$UNIT" 2>/dev/null || : # what has been given up is tried again
    user start "$UNIT" 2>"$tmp/start" && return
    cat "$tmp/start" >&2
    explain >&2
    printf '%s\n' '' "Mend that (the settings are in $env), then run this again." >&2
    exit 1
}

# Why the service did not start: its own last words, where a journal has them.
explain() {
    invocation=$(user show --property=InvocationID --value "$UNIT")
    said='' try=0
    while [ -z "$said" ] && [ "$try" -lt 10 ] && command -v journalctl >/dev/null 2>&1; do
        said=$(journalctl --quiet --no-pager --output=cat --lines=5 \
            "_SYSTEMD_INVOCATION_ID=$invocation" 2>/dev/null) || break
        try=$((try + 1))
        sleep 0.1 # the journal is behind
    done
    printf '\n%s did not start:\n' "$UNIT"
    if [ -n "$said" ]; then
        printf '%s\n' "$said"
        case $said in *"Read-only file system"*) printf '%s\n' \
            "The service can write in $XDG_RUNTIME_DIR/$NAME alone: see $sandbox" ;;
        esac
    else
        systemd-analyze --user --man=no verify "$unit" || : # a file of the user's may be wrong
        user --no-pager --full --lines=0 status "$UNIT" || :
        printf '%s\n' 'What it said itself, whoever may read the journal can see:' \
            "  sudo journalctl --lines=20 _SYSTEMD_USER_UNIT=$UNIT"
    fi
    others=$(others)
    [ -z "$others" ] || printf '%s\n' 'These have a say too:' "$others"
}

report() {
    text='' try=0
    while [ "$try" -lt 10 ]; do
        text=$(user show --property=StatusText --value "$UNIT")
        case $text in *agent*) break ;; esac
        try=$((try + 1))
        sleep 0.1
    done
    printf '%s runs%s%s\n' "$UNIT" "${text:+: }" "$text"
    if [ -z "$refused" ]; then
        others=$(others)
        if [ -z "$others" ]; then
            printf 'The whole sandbox is in force.\n'
        else
            printf '%s\n' 'The sandbox is in force, but for what these change:' "$others"
        fi
    else
        printf 'sandbox.conf does not start on this system: %s. It was left out.\n' "$refused"
    fi
    other_agent
    printf '%s\n' '' \
        'make status   make logs   make pubkey' \
        "Settings: $env, then: systemctl --user restart $NAME"
    if [ ! -e "/var/lib/systemd/linger/$(id -un)" ]; then
        printf 'It runs while you are logged in. To have it always: loginctl enable-linger\n'
    fi
}

# This shell's agent is not the service's: it knows the manager's variables only.
other_agent() {
    [ -n "${SSH_AUTH_SOCK:-}" ] || return 0
    ! grep -q '^SSH_AGENT_PROXY_UPSTREAM=.' "$env" 2>/dev/null || return 0
    ! user show-environment | grep -qxF "SSH_AUTH_SOCK=$SSH_AUTH_SOCK" || return 0
    case $text in *"'$SSH_AUTH_SOCK'"*) return 0 ;; esac
    printf '%s\n' "This shell's agent is at $SSH_AUTH_SOCK, which the service doesn't know." \
        "If it is the one that signs, say so: SSH_AGENT_PROXY_UPSTREAM in $env"
}

# ---- uninstall, status, logs

uninstall() {
    if [ -n "${DESTDIR:-}" ]; then
        rm -f "$unit" "$env"
        return
    fi
    if [ ! -e "$unit" ] && [ ! -e "$sandbox" ] && ! is_left_over; then
        printf 'No service is installed: there is no %s\n' "$unit"
        kept
        return
    fi
    need_manager
    for file in "$unit" "$sandbox"; do
        [ ! -e "$file" ] || is_ours "$file" ||
            fail "$file was not written by make: it stays, and so does the service"
    done
    user stop "$UNIT" 2>/dev/null || :
    [ ! -e "$unit" ] || user --quiet disable "$UNIT"
    for file in "$sandbox" "$unit" "$wanted"; do
        # (A link that leads somewhere enables another's: a package's.)
        case $file in
        "$wanted") is_dangling "$file" || continue ;;
        *) [ -e "$file" ] || continue ;;
        esac
        rm -f "$file"
        printf 'Removed: %s\n' "$file"
    done
    rmdir "$unit.d" 2>/dev/null || : # files of the user's, which are named below
    user daemon-reload
    user reset-failed "$UNIT" 2>/dev/null || :
    rmdir "$XDG_RUNTIME_DIR/$NAME" 2>/dev/null || : # where it is empty
    kept
}

# Its files were removed by hand, and it is still enabled, or runs on. (One that somebody else
# installed for all users is none of ours.)
is_left_over() {
    ! is_dangling "$wanted" || return 0
    case $(user show --property=ActiveState --value "$UNIT" 2>/dev/null) in
    active | activating | reloading | deactivating) ;;
    *) return 1 ;;
    esac
    case $(user show --property=FragmentPath --value "$UNIT") in
    '' | "$unit") ;;
    *) return 1 ;;
    esac
}

is_dangling() {
    [ -L "$1" ] && [ ! -e "$1" ]
}

kept() {
    for file in "$env" "$unit.old" "$unit.d"/*; do
        [ ! -e "$file" ] || printf 'Kept: %s\n' "$file"
    done
}

need_service() {
    need_manager
    [ "$(user show --property=LoadState --value "$UNIT")" != not-found ] ||
        fail "no service is installed: make install-systemd"
}

status() {
    need_service
    user --no-pager --full status "$UNIT"
}

logs() {
    need_service
    command -v journalctl >/dev/null 2>&1 || fail 'there is no journalctl here to show the log'
    # Not --user, which sees nothing where the journal is in memory alone, not even for those who
    # may read all of it. (--quiet: nothing about what of others' is not shown.)
    exec journalctl --quiet --user-unit="$UNIT" "$@"
}

main "$@"
