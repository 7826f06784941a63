#!/bin/sh
# The dev container feature's part at build time: run as root, in a folder with shim.sh beside it.
# Whose .gitconfig there will be is not known yet, and one that is written now would keep the
# host's out: so git's settings go into the system's, and `setup` is run when the container starts.
set -eu
umask 022

SIGNER=/usr/local/bin/ssh-agent-proxy-sign
SHARE=/usr/local/share/ssh-agent-proxy

main() {
    cd "$(dirname "$0")"
    [ -f shim.sh ] || die "there is no shim.sh beside install.sh: make devcontainer-feature puts it there"
    install_missing
    check_git
    put_programs
    configure_git
}

say() {
    printf 'ssh-agent-proxy feature: %s\n' "$1"
}

die() {
    say "$1" >&2
    exit 1
}

# --- What is needed: git, curl, and to verify what was signed ssh-keygen ------------------------

install_missing() {
    missing=$(list_missing)
    [ -n "$missing" ] || return 0
    say "installing what is missing:$missing"
    if has apt-get; then
        export DEBIAN_FRONTEND=noninteractive
        try apt-get -qq update
        try apt-get -qq install -y --no-install-recommends ca-certificates git curl openssh-client
        rm -rf /var/lib/apt/lists/*
    elif has apk; then
        try apk add --no-cache git curl openssh-keygen
    elif has dnf; then
        try dnf install -y git curl openssh
    elif has microdnf; then
        try microdnf install -y git curl openssh
    elif has yum; then
        try yum install -y git curl openssh
    fi
    missing=$(list_missing)
    case $missing in
    '') ;;
    ' ssh-keygen') say "there is no ssh-keygen: it signs, but git cannot verify a signature" ;;
    *)
        die "missing:$missing. Put them into the image (packages git, curl, and for ssh-keygen \
openssh-client, openssh-keygen or openssh), or build where its packages can be fetched"
        ;;
    esac
}

list_missing() {
    for program in git curl ssh-keygen; do
        has "$program" || printf ' %s' "$program"
    done
}

has() {
    command -v "$1" >/dev/null 2>&1
}

# What is still missing afterwards is told once, by name.
try() {
    "$@" >&2 || say "failed: $*" >&2
}

check_git() {
    oldest=34
    why="SSH signatures need"
    if is_remote_only; then
        oldest=36
        why="remoteOnly needs"
    fi
    version=$(git version)
    version=${version#git version }
    minor=${version#*.}
    minor=${minor%%[!0-9]*}
    case ${version%%.*} in
    2) [ "$minor" -ge "$oldest" ] ;;
    *) true ;;
    esac || die "git is $version, and $why 2.$oldest or newer: the feature \
ghcr.io/devcontainers/features/git brings one"
}

is_remote_only() {
    [ "${REMOTEONLY:-false}" = true ]
}

# --- What is installed --------------------------------------------------------------------------

put_programs() {
    mkdir -p "${SIGNER%/*}" "$SHARE"
    cp shim.sh "$SIGNER"
    option=''
    ! is_remote_only || option=' --remote-only'
    cat >"$SHARE/post-start" <<END
#!/bin/sh
# At each start, as the container's user, once an editor has copied the host's .gitconfig in. What
# it says is for a person: a proxy that does not run yet must not stop the start.
$SIGNER setup$option || :
END
    chmod 755 "$SIGNER" "$SHARE/post-start"
}

# For every user, until a .gitconfig says otherwise.
configure_git() {
    git config --system gpg.format ssh
    git config --system gpg.ssh.program "$SIGNER"
    git config --system gpg.ssh.defaultKeyCommand "$SIGNER key"
    if is_remote_only; then
        git config --file "$SHARE/gitconfig" commit.gpgsign true
        git config --file "$SHARE/gitconfig" tag.forceSignAnnotated true
        git config --system 'includeIf.hasconfig:remote.*.url:**.path' "$SHARE/gitconfig"
    else
        git config --system commit.gpgsign true
        git config --system tag.forceSignAnnotated true
    fi
}

# In braces, without the last of which nothing is run.
{ main "$@"; }
