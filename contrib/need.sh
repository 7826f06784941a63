#!/bin/sh
# Which of the TOOLs named are missing or too old, and how to get them: exit 1 and a few lines on
# stderr if any is. Nothing is started or changed.
#
#     PYTHON=python3.12 sh contrib/need.sh git curl ssh-agent python venv
#
# `python` is $PYTHON (python3 when unset), `venv` is what it needs to make a virtual environment.
set -eu

main() {
    PYTHON=${PYTHON:-python3}
    missing='' debian='' fedora='' alpine='' macos=''
    for tool; do
        problem=$(problem_with "$tool")
        [ -z "$problem" ] || name "$tool" "$problem"
    done
    [ -n "$missing" ] || return 0
    {
        printf 'missing: %s\n' "${missing#, }"
        printf '  Debian, Ubuntu:  apt-get install%s\n' "$debian"
        printf '  Fedora:          dnf install%s\n' "$fedora"
        printf '  Alpine:          apk add%s\n' "$alpine"
        printf '  macOS:           brew install%s\n' "$macos"
    } >&2
    return 1
}

# Prints what is wrong with TOOL, nothing when all is well.
problem_with() {
    case $1 in
    python) python_problem ;;
    venv)
        # Debian takes ensurepip out of its python3. Without a Python, that is what is named.
        if [ -z "$(python_problem)" ] && ! "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; then
            printf 'the venv module of %s' "$PYTHON"
        fi
        ;;
    *)
        if ! command -v "$1" >/dev/null 2>&1; then
            printf '%s' "$1"
            return
        fi
        case $1 in
        # The first versions that sign with SSH keys, and that the shim can use.
        git) older git "$(git --version 2>/dev/null)" 'git version ' 2 34 ;;
        curl) older curl "$(curl --version 2>/dev/null)" 'curl ' 7 68 ;;
        # It does not tell its own version; ssh comes with it.
        ssh-keygen) older OpenSSH "$(ssh -V 2>&1)" OpenSSH_ 8 2 ;;
        esac
        ;;
    esac
}

python_problem() {
    # A stand-in that only says where Python can be had (macOS, version managers) does not run.
    if ! version=$("$PYTHON" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)
    then
        printf '%s' "$PYTHON"
    else
        older "$PYTHON" "$version" '' 3 9
    fi
}

# older NAME TEXT PREFIX MAJOR MINOR: a problem if TEXT tells a version before MAJOR.MINOR.
# A version that can't be read counts as new enough: the program itself will say.
older() {
    version=${2#"$3"}
    version=${version%%[!0-9.]*}
    case $version in
    [0-9]*.[0-9]*) ;;
    *) return 0 ;;
    esac
    major=${version%%.*}
    minor=${version#*.}
    minor=${minor%%.*}
    if [ "$major" -lt "$4" ] || { [ "$major" -eq "$4" ] && [ "$minor" -lt "$5" ]; }; then
        printf '%s %s.%s or newer (here: %s)' "$1" "$4" "$5" "$version"
    fi
}

# name TOOL PROBLEM: adds the problem, and the packages that solve it on each system.
name() {
    missing="$missing, $2"
    case $1 in
    python) packages python3 python3 python3 python ;;
    venv)
        version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        packages "python$version-venv" python3 python3 python
        ;;
    ssh-*) packages openssh-client openssh-clients openssh-client openssh ;;
    wixl) packages wixl msitools msitools msitools ;;
    x86_64-w64-mingw32-gcc)
        packages gcc-mingw-w64-x86-64-win32 mingw64-gcc mingw-w64-gcc mingw-w64
        ;;
    shellcheck) packages shellcheck ShellCheck shellcheck shellcheck ;;
    *) packages "$1" "$1" "$1" "$1" ;;
    esac
}

packages() {
    debian=$(with "$debian" "$1")
    fedora=$(with "$fedora" "$2")
    alpine=$(with "$alpine" "$3")
    macos=$(with "$macos" "$4")
}

# with LIST PACKAGE: the list, with the package in it once.
with() {
    case "$1 " in
    *" $2 "*) printf '%s' "$1" ;;
    *) printf '%s %s' "$1" "$2" ;;
    esac
}

main "$@"
