#!/bin/sh
# ssh-agent-proxy-sign: stands in for ssh-keygen, as git's gpg.ssh.program, where no SSH agent is.
trap 'printf "ssh-agent-proxy-sign: this file is cut short: fetch it again\n" >&2; exit 1' EXIT
# (It is taken off when the work is done: half a download must not look like a signature made.)
#
#   -Y sign ...     asks ssh-agent-proxy for the signature, over HTTP or its Unix socket
#   pubkey [PATH]   prints the public key that signs, or writes it to PATH
#   key             prints it for git's gpg.ssh.defaultKeyCommand
#   setup           sets git up, and says whether the next commit will be signed
#   anything else   is handed to the real ssh-keygen
#
# The straight way of -Y sign stands first: once it has signed, the shell reads no further. What
# stood in its way is mended behind it, nothing asked twice. The variables stand above `main`.

set -eu

PROGRAM=ssh-agent-proxy-sign
NEWLINE='
'
BEGIN='-----BEGIN SSH SIGNATURE-----'
END='-----END SSH SIGNATURE-----'
FETCHED='# fetched from ssh-agent-proxy'

# y = 2, which is no point of the curve: no private key belongs to it, and nothing verifies with it.
NOBODY=AAAAC3NzaC1lZDI1NTE5AAAAIAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA
# y = 0 is a point of order 4: signatures by it, which anyone can forge, do verify.
ANYBODY=AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA

# How the base64 of a signature by them begins, and what stands for namespace git in that of
# others: for a key whose own ends without "=", with "==", and with "=".
BY_NOBODY=U1NIU0lHAAAAAQAAADMAAAALc3NoLWVkMjU1MTkAAAAgAgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA
BY_ANYBODY=U1NIU0lHAAAAAQAAADMAAAALc3NoLWVkMjU1MTkAAAAgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA
GIT_0=AAAADZ2l0AAAAAAAAAAZzaG
GIT_1=AAAA2dpdAAAAAAAAAAGc2hh
GIT_2=AAAANnaXQAAAAAAAAABnNoY

# A person's touch gets 120 s at the proxy, unless it is told otherwise, and may wait for others'.
CONNECT_SECONDS=5
ANSWER_SECONDS=600
ANNOUNCE_SECONDS=2

# What is to be removed or ended, whatever happens.
held=''    # the file that an answer is received in
fresh=''   # a public key file on its way
scratch='' # the copy of standard input, or a folder with that and the answer
job=''     # the process waited for
timer=''   # the one that announces the wait
stopped='' # the same, once it has been told to end

next=''      # what stands in the way
checked=''   # not empty: what git does not ask for was looked at
prepared=''  # not empty: what does not depend on the file was looked at
chosen=''    # not empty: the key was looked for
granted=''   # not empty: the proxy has answered 200 after all
subject=''   # what is being signed, with a slash in it
wanted=''    # the key that git named, as "TYPE BASE64", or empty for the proxy's own choice
source=''    # the file it stands in
marked=''    # not empty: we wrote that file, and may replace it
nobody=''    # not empty: git names the key that nobody holds
once=''      # not empty: the data can be read only once
past='*'     # for which hosts on loopback no http_proxy is used
token_from=- # from where curl is told the token,
input=4      # and what is its standard input then: that, or the data

# --- -Y sign ----------------------------------------------------------------------------------

# What stands in the way has a name, which `mend` knows.
leave() {
    next=$1
    return 1
}

# For -Y sign with all the arguments: true once everything is signed, else $next is set.
sign() {
    shift "$consumed"
    [ $# -gt 0 ] && [ "$*" != - ] || leave input || return
    while [ $# -gt 0 ]; do
        is_whole "$1" || whole=./$1 # never an option, never standard input
        file=$1 subject=$whole
        prepare "$@" || return
        sign_file || return
        consumed=$((consumed + 1))
        shift
    done
    remove_gits_key
}

# What is wrong whatever is signed.
prepare() {
    [ -z "$prepared" ] || return 0
    [ -n "$checked" ] || { [ "$namespace:$hash$refused" = git: ] && [ $# -le 1 ]; } ||
        leave request || return # it is more than git asks for
    sign_url=${SSH_AGENT_PROXY_URL:-} named_in=SSH_AGENT_PROXY_URL
    note=${HOME:-}/.config/ssh-agent-proxy/url # which `setup` writes
    if [ -z "$sign_url" ] && [ -e "$note" ]; then
        named_in=$note
        { IFS= read -r sign_url || :; } 2>/dev/null <"$note" || :
        sign_url=${sign_url%[! -~]} # a carriage return
    elif [ -z "$sign_url" ]; then
        named_in='' sign_url=http://127.0.0.1:7221/sign
    fi
    is_url "$sign_url" || leave url || return
    find_token || leave token || return
    [ -z "${HTTP_PROXY:-}" ] || [ -n "${http_proxy+set}" ] || leave proxy || return
    prepared=yes
}

sign_file() {
    if [ -z "$held" ]; then
        [ -f "$subject" ] || once=yes
        [ -r "$subject" ] && [ ! -d "$subject" ] && [ ! -d "$subject.sig" ] || leave file || return
        is_gits_own "$file" .git_signing_buffer_tmp || leave beside || return
        create "$subject.sig" || leave beside || return
    fi
    obtain "$subject" || return
    { printf '%s' "$body" >"$held"; } 2>/dev/null || leave folder || return
    # Where it is that itself, git reads it only once we have succeeded.
    [ "$held" = "$subject.sig" ] || mv -f -- "$held" "$subject.sig" 2>/dev/null ||
        leave folder || return
    held='' once='' granted=''
}

# Is it git's own temporary file at path $1, whose name is $2 and six letters or digits?
is_gits_own() {
    case ${1##*/} in
    "$2"[A-Za-z0-9][A-Za-z0-9][A-Za-z0-9][A-Za-z0-9][A-Za-z0-9][A-Za-z0-9]) ;;
    *) return 1 ;;
    esac
}

# $held: a new file $1, never one that is there. As `set -C` opens a device that a link names all
# the same, what was opened is looked at: a neighbour may have put another thing there meanwhile.
create() {
    [ ! -e "$1" ] && [ ! -L "$1" ] || return 1
    held=$1
    set -C
    { is_file 4>"$held"; } 2>/dev/null || held=''
    set +C
    [ -n "$held" ]
}

is_file() {
    [ -f /dev/fd/4 ] || { [ ! -e /dev/fd/4 ] && [ -f "$held" ] && [ ! -L "$held" ]; }
}

# The signature of file $1 (- is standard input) in $body. Where it is granted, it is there already.
obtain() {
    if [ -z "$granted" ]; then
        choose_key || return
        [ -z "$nobody" ] || ! begins_with 'certificate ' || leave certificate || return
        data=$1
        ask_for_signature
        is_granted || leave refusal || return
    fi
    { is_signature && is_for_git && is_by_key; } || leave answer
}

# --- The command line of ssh-keygen -----------------------------------------------------------

# Reads options as ssh-keygen does, up to the first operand: $consumed arguments. What is $refused
# first is the one to be told, if it comes to -Y sign at all.
read_options() {
    operation='' namespace=git hash='' named='' key='' refused=''
    consumed=$#
    while [ $# -gt 0 ]; do
        rest=${1#-?}
        letter=${1%"$rest"}
        case $1 in
        --) shift && break ;;
        -[CDEFIMNOPRVYZabfmnrstwz]*) # those with a value, glued to them or not
            if [ -z "$rest" ]; then
                [ $# -gt 1 ] || refused="${refused:-$letter lacks its value}"
                [ $# -eq 1 ] || shift
                rest=$1
            fi
            case $letter$rest in
            -Y*) operation=$rest ;;
            -n*) namespace=$rest ;;
            -f*) named=yes key=$rest ;;
            -O[Hh][Aa][Ss][Hh][Aa][Ll][Gg]=*) hash=${rest#*=}: ;; # the colon tells empty from none
            -O*) refused="${refused:-only hashalg=sha256 and =sha512 are known to -O, not $rest}" ;;
            *) refused="${refused:-there is no signing with $letter}" ;;
            esac
            ;;
        -[qvU]) ;; # nothing is said anyway, and it is always an agent that signs
        -? | --* | -?-*) refused="${refused:-there is no signing with $1}" ;;
        -?*) # more of them (by ?, for to mksh [!-] is a byte, and would be met for ever)
            shift
            set -- "$letter" "-$rest" ${1+"$@"}
            continue
            ;;
        *) break ;;
        esac
        shift
    done
    consumed=$((consumed - $#))
}

# A URL stands on curl's command line, where everyone can read it, and in messages.
is_url() {
    case $1 in
    unix:/*) [ -z "${MSYSTEM:-}" ] ;; # no more than a path, which curl takes as it is
    http://*@* | https://*@* | *[!][A-Za-z0-9:/._~%+,=-]*) return 1 ;;
    http://[!/]*/*[!/] | https://[!/]*/*[!/]) ;;
    *) return 1 ;;
    esac
}

# --- The token and the key --------------------------------------------------------------------

# $token, empty where there is none, and for messages $holder, what it was looked for in. The file
# that is looked for unasked need not hold one: only a proxy that wants one makes that a failure.
find_token() {
    set +a           # no program gets it with its environment,
    unset token || : # not even where one of that name came with ours
    token=''
    holder=${SSH_AGENT_PROXY_TOKEN_FILE:-${HOME:-}/.config/ssh-agent-proxy/token}
    # Nor does a trace show it: to some shells what is set in a function counts only there.
    if [ -n "${SSH_AGENT_PROXY_TOKEN:+set}" ]; then
        set +x
        token=$SSH_AGENT_PROXY_TOKEN holder=''
    elif [ -n "${SSH_AGENT_PROXY_TOKEN_FILE:-}" ] || [ -e "$holder" ]; then
        set +x
        read_token "$holder" || [ -z "${SSH_AGENT_PROXY_TOKEN_FILE:-}" ] || return
    fi
    case $token in
    =* | *[!A-Za-z0-9._~+/=-]* | *=[!=]*) return 1 ;;
    esac
}

# The token in file $1: the first word of the first line that is neither empty nor a comment.
read_token() {
    [ -r "$1" ] && [ ! -d "$1" ] && [ ! -c "$1" ] || return 1 # /dev/zero never ends
    more=yes
    while [ -z "$token" ] && [ -n "$more" ]; do
        read -r token rest || more='' # the last line may lack its end
        token=${token%[! -~]}         # a carriage return
        token=${token#"${token%%[#-~]*}"}
        [ "${token#\#}." = "$token." ] || token='' # a comment
    done <"$1"
    [ -n "$token" ]
}

# $wanted, $source and $marked: what git named.
choose_key() {
    [ -n "$named" ] && [ -z "$chosen" ] || return 0
    case $key in
    [~]/*) leave home || return ;; # else a folder of that name would be looked into
    esac
    read_key "$key" || read_key "$key.pub" || leave no_key || return
    case ${wanted#* } in
    "$NOBODY" | "$ANYBODY") leave nobodys_key || return ;;
    esac
    chosen=yes
}

# Is "$1 $2" a public key? Then $wanted is that.
take_key() {
    blob=${2%[! -~]} # a carriage return
    case $1:$blob in
    *[!a-z0-9@.-]*:* | *:*[!A-Za-z0-9+/=]*) return 1 ;;
    ssh-*:AAAA?* | ecdsa-*:AAAA?* | sk-*:AAAA?*) wanted="$1 $blob" ;;
    *) return 1 ;;
    esac
}

# Is there a public key in file $1? Then $wanted is it, and $marked tells whether we wrote it.
read_key() {
    source=$1 marked='' more=yes
    [ -r "$1" ] && [ ! -d "$1" ] && [ ! -c "$1" ] || return 1
    while [ -n "$more" ]; do
        read -r word blob rest || more='' # the last line may lack its end
        word=${word#"${word%%[#-~]*}"}    # what PowerShell's > puts first (bash drops its zeros)
        case "$word $blob $rest" in
        "$FETCHED"*) marked=yes ;;
        -----BEGIN*) return 1 ;; # a private key, whose rest is no business of ours
        *) ! take_key "$word" "$blob" || return 0 ;;
        esac
    done <"$1"
    return 1
}

# A literal key's file, of which git leaves one behind at each signature.
remove_gits_key() {
    is_gits_own "$source" .git_signing_key_tmp || return 0
    [ ! -f "$source" ] || [ -L "$source" ] || rm -f -- "$source" 2>/dev/null || :
}

# --- Git for Windows --------------------------------------------------------------------------

# Is $1 a whole path, not a part of one? $whole: as every program takes it. Where MSYSTEM is set, by
# Git Bash and by git, sh has paths like /c/Users and /tmp, of which git and curl, Windows' own
# programs, know nothing; C:/Users they all take. MSYS2 rewrites their arguments so, by the look of
# them and unless told not to, which is not relied on. Git itself says C:/Users or C:\Users/x.
is_whole() {
    whole=$1
    case ${MSYSTEM:+windows}$1 in
    windows[A-Za-z]:/* | windows[A-Za-z]:\\*/* | /*) ;;
    windows/* | windows[A-Za-z]:\\*) whole=$(cygpath -m -- "$1") || whole=$1 ;;
    *) return 1 ;;
    esac
}

# --- Asking the proxy -------------------------------------------------------------------------

ask_for_signature() {
    set -- -X POST -T "$data" -H "SSHSIG-Namespace: $namespace"
    [ -z "$hash" ] || set -- "$@" -H "SSHSIG-Hash: ${hash%:}"
    [ -z "$wanted" ] || set -- "$@" -H "SSHSIG-Key: $wanted"
    place=$sign_url elsewhere=''
    ask "$sign_url" /sign "$@"
}

# ask URL PATH CURL'S OPTIONS: one request; PATH is for a URL that is a socket. Leaves curl's exit
# status in $ended, and its answer as `read_answer` does.
# -q: no ~/.curlrc; -g: no [1-9] or {a,b} in names; Expect: a 100 would cost a round trip.
ask() {
    url=$1 requested=$2
    shift 2
    case $url in
    unix:*)
        asked_socket=${url#unix:}
        set -- --noproxy '*' --unix-socket "$asked_socket" ${1+"$@"}
        url=http://localhost$requested
        ;;
    *) ! is_loopback "$url" || set -- --noproxy "$past" ${1+"$@"} ;;
    esac
    set -- -q -s -g -i -w '\ntook %{time_total}\n' --suppress-connect-headers -H Expect: \
        --connect-timeout "$CONNECT_SECONDS" --max-time "$ANSWER_SECONDS" ${1+"$@"}
    if [ -n "$held" ]; then
        [ ! -s "$held" ] || true >"$held" # only then, for that makes ext4 write it out
        job=begun # a signal may come before its number is known
        {
            exec </dev/null >>"$held" 2>/dev/null
            run_curl "$@" "$url"
        } &
        job=$!
        start_timer
        shift_key # while curl is at it
        job_ends
        stop_timer
        read_answer <"$held" 2>/dev/null
    else
        stream "$@" "$url"
    fi
}

job_ends() {
    ended=0
    wait "$job" || ended=$?
    job=''
}

# Is it this machine, whatever anyone's name server says?
is_loopback() {
    host=${1#*://}
    case $host in
    '[::1]'[:/]*) return 0 ;;
    esac
    case ${host%%[:/]*} in
    [Ll][Oo][Cc][Aa][Ll][Hh][Oo][Ss][Tt] | *.[Ll][Oo][Cc][Aa][Ll][Hh][Oo][Ss][Tt]) ;;
    *[!0-9.]*) return 1 ;;
    127.*) ;;
    *) return 1 ;;
    esac
}

# Whatever answers is held to 64 KiB: an endless page must not fill the disk.
run_curl() {
    trap '' XFSZ
    ulimit -f 128 2>/dev/null || : # posh has none
    if [ -z "${token:+set}" ] || [ -n "$elsewhere" ]; then
        exec "${SSH_AGENT_PROXY_CURL:-curl}" "$@"
    fi
    # By a here-document, for everyone sees arguments (printf too is a program in mksh and posh).
    # Some shells make a temporary file of it, ksh by the umask; the group is for its failure.
    umask 077
    { exec "${SSH_AGENT_PROXY_CURL:-curl}" "$@" -K "$token_from" <&"$input"; } 4<<END || exit 120
header = "Authorization: Bearer $token"
END
}

read_answer() {
    answered='' server='' retry_after='' head_ends='' body='' joined='' took=''
    while [ -z "$head_ends" ] && IFS=: read -r name rest; do
        rest=${rest# }
        rest=${rest%[! -~]} # the carriage return
        case $name in
        HTTP/[0-9]*)
            answered=${name#* }
            answered=${answered%%[!0-9]*}
            ;;
        [Ss][Ee][Rr][Vv][Ee][Rr]) server=$rest ;;
        [Rr][Ee][Tt][Rr][Yy]-[Aa][Ff][Tt][Ee][Rr]) retry_after=$rest ;;
        took\ *) took=${name#took } ;;
        [!!-~]) # the carriage return of an empty line
            case $answered in
            1??) answered='' server='' retry_after='' ;; # only the one before the answer
            *) head_ends=yes ;;
            esac
            ;;
        esac
    done
    [ -z "$head_ends" ] || read_body
}

# $body, and the same without line ends in $joined.
read_body() {
    while [ ${#body} -lt 65536 ] && { IFS= read -r line || [ -n "$line" ]; }; do
        body=$body$line$NEWLINE
        joined=$joined$line
        line='' # yash leaves it as it is where it can't read on
    done
    # Where nothing holds it to that (in posh), cutting a long one would take minutes.
    [ ${#body} -lt 65536 ] || ended=23 body=''
    case $body in
    *"$NEWLINE"took\ *) # what curl says is the last
        took=${body##*"$NEWLINE"took }
        took=${took%"$NEWLINE"}
        body=${body%"$NEWLINE"took *}
        joined=${joined%"took $took"}
        ;;
    esac
}

is_granted() {
    [ "$answered:$ended:$head_ends" = 200:0:yes ] && [ "${server#ssh-agent-proxy/}." != "$server." ]
}

# --- What is written --------------------------------------------------------------------------

# The armor in $body, whole and nothing beside it? Then $base64 is what is in it.
is_signature() {
    case $body in
    *"$NEWLINE$NEWLINE"*) return 1 ;;
    "$BEGIN$NEWLINE"*"$NEWLINE$END$NEWLINE") ;;
    *) return 1 ;;
    esac
    base64=${joined#"$BEGIN"}
    base64=${base64%"$END"}
    case $base64 in
    '' | *[!A-Za-z0-9+/=]* | *=[!=]*) return 1 ;;
    esac
}

# "SSHSIG", uint32 1, string key, string "git", string "", string "sha...": the key begins in the
# middle of a base64 digit, and where the namespace does depends on its length.
is_for_git() {
    case $namespace:$base64 in
    git:U1NIU0lHAAAAAQ*"$GIT_0"* | git:U1NIU0lHAAAAAQ*"$GIT_1"*) return 0 ;;
    git:U1NIU0lHAAAAAQ*"$GIT_2"*) return 0 ;;
    git:*) return 1 ;;
    esac
}

is_by_key() {
    # shellcheck disable=SC2254 # a pattern
    case $base64 in
    "$BY_NOBODY"* | "$BY_ANYBODY"*) return 1 ;;
    U1NIU0lHAAAAAQ?????$shifted*) return 0 ;;
    esac
    [ -z "$wanted" ]
}

# $shifted, a pattern: how the key that is wanted stands in a signature's base64, with namespace
# git behind it. Four of the six bits of each digit stand in one digit there; of an RSA key and of
# a certificate the first 88 digits are enough to tell it from another.
shift_key() {
    shifted=''
    [ -n "$wanted" ] || return 0
    blob=${wanted#* }
    case $blob in
    *==) follows=$GIT_1 ;;
    *=) follows=$GIT_2 ;;
    *) follows=$GIT_0 ;;
    esac
    [ "$namespace" = git ] || follows=''
    rest=${blob%%=*}
    case $wanted in
    ssh-rsa\ * | *-cert-v01@openssh.com\ *)
        tail=${rest#????????????????????????????????????????????}
        tail=${tail#????????????????????????????????????????????}
        [ "$tail" = "$rest" ] || rest=${rest%"$tail"}
        follows="*$follows"
        ;;
    esac
    while [ -n "$rest" ]; do
        case $rest in
        [AQgw]*) shifted=$shifted'[ABCD]' ;;
        [BRhx]*) shifted=$shifted'[EFGH]' ;;
        [CSiy]*) shifted=$shifted'[IJKL]' ;;
        [DTjz]*) shifted=$shifted'[MNOP]' ;;
        [EUk0]*) shifted=$shifted'[QRST]' ;;
        [FVl1]*) shifted=$shifted'[UVWX]' ;;
        [GWm2]*) shifted=$shifted'[YZab]' ;;
        [HXn3]*) shifted=$shifted'[cdef]' ;;
        [IYo4]*) shifted=$shifted'[ghij]' ;;
        [JZp5]*) shifted=$shifted'[klmn]' ;;
        [Kaq6]*) shifted=$shifted'[opqr]' ;;
        [Lbr7]*) shifted=$shifted'[stuv]' ;;
        [Mcs8]*) shifted=$shifted'[wxyz]' ;;
        [Ndt9]*) shifted=$shifted'[0123]' ;;
        [Oeu+]*) shifted=$shifted'[4567]' ;;
        *) shifted=$shifted'[89+/]' ;;
        esac
        rest=${rest#?}
    done
    shifted=$shifted$follows
}

# --- Waiting, and ending ----------------------------------------------------------------------

set_out() {
    # Lengths and ranges of characters are of bytes; and curl and mv are done sooner.
    export LC_ALL=C
    trap 'end_early 1' EXIT
    trap 'end_early 129' HUP
    trap 'end_early 130' INT
    trap 'end_early 143' TERM
}

finish() {
    clean_up
    trap - EXIT HUP INT TERM
    exit "${1:-0}"
}

# shellcheck disable=SC2317,SC2329 # reached by a trap
end_early() {
    trap - EXIT # mksh would exit with the status of the trap
    trap '' HUP INT TERM
    clean_up
    [ "$1" != 1 ] ||
        printf '%s: ended too early: is this file cut short, or a disk full?\n' "$PROGRAM" >&2 || :
    exit "$1"
}

clean_up() {
    [ "$job" != begun ] || job=${!:-0} && job=${job#0} # 0: to some shells there was none yet
    if [ -n "$job" ]; then
        kill -s KILL "$job" 2>/dev/null || :
        wait "$job" 2>/dev/null || :
        job=''
    fi
    stop_timer
    reap_timer
    [ -z "$held$fresh$scratch" ] ||
        rm -rf -- ${held:+"$held"} ${fresh:+"$fresh"} ${scratch:+"$scratch"} || :
    held='' fresh='' scratch=''
}

# Git shows what a signer says only when it fails, so this goes to the terminal, if there is one.
# The timer holds nothing that git waits for, and is told by USR1 that nobody waits any more.
start_timer() {
    reap_timer
    { true >/dev/tty; } 2>/dev/null || return 0
    [ -n "${KSH_VERSION:-}" ] || trap '' USR1 # until the timer traps it, which ksh could not then
    {
        # By exec, for what redirections of another kind replace is kept open by some shells.
        exec </dev/null >/dev/tty 2>/dev/null
        trap '' HUP INT TERM TTOU # the last, for a background job may write all the same
        ending='' nap='' text=''
        trap 'ending=yes; [ -z "$nap" ] || kill -s KILL "$nap" || :' USR1
        announcement="$PROGRAM: waiting for ssh-agent-proxy: touch your key?"
        # USR1 may not come: the shim was killed, or it is ignored in this place.
        while # a stopped terminal holds up a nap alone (and no printf, which to some is a program)
            { trap '' TTOU; [ -z "$text" ] || echo "$text"; exec sleep "$ANNOUNCE_SECONDS"; } &
            nap=$!
            { [ -z "$ending" ] && kill -s 0 "$job"; } || kill -s KILL "$nap"
            wait "$nap" && kill -s 0 "$$" && kill -s 0 "$job"
        do
            text=$announcement announcement=''
        done
        wait "$nap" || : # the trap may have cut the other short
    } &
    timer=$!
    trap - USR1
}

# The timer is still there to be ended, so that its number is no one else's.
stop_timer() {
    [ -n "$timer" ] || return 0
    kill -s USR1 "$timer" 2>/dev/null || :
    stopped=$timer timer=''
    [ -z "${ZSH_VERSION:-}" ] || reap_timer # its end would come amid zsh's malloc, and break that
}

# Where process 1 waits for nobody it would stay as a zombie.
reap_timer() {
    [ -z "$stopped" ] || wait "$stopped" 2>/dev/null || :
    stopped=''
}

# --- The straight way ends --------------------------------------------------------------------

read_options ${1+"$@"}
if [ "$operation" = sign ]; then
    set_out
    ! sign "$@" || finish
fi

# --- A file that is not git's own -------------------------------------------------------------

# $held: a new file whose name begins with $1. (mktemp would take as long as all the rest of the
# shim, and its mode would not be the umask's.)
hold() {
    for digit in 0 1 2 3 4 5 6 7 8 9; do
        ! create "$1.$digit" || return 0
    done
    return 1
}

# Once for each of them.
while [ "$next" = beside ] && hold "${subject%/*}/.$PROGRAM.$$"; do
    ! sign "$@" || finish
done

# --- Standard input ---------------------------------------------------------------------------

opened='' # not empty: it was,
kept=''   # and a copy of it was made

# Is it signed, and the signature printed?
sign_input() {
    prepare || return
    if [ -z "$opened" ]; then
        { true 3<&0; } 2>/dev/null || leave no_input || return
        exec 3<&0
        umask 077
        opened=yes
        make_scratch || leave no_scratch || return
    fi
    choose_key || return
    if [ -n "$once" ]; then
        data=-
    elif [ -z "$kept" ]; then
        cat <&3 >"$data" 2>/dev/null &
        job=$!
        job_ends
        [ "$ended" = 0 ] || leave no_copy || return
        kept=yes
    fi
    obtain "$data" || return
    remove_gits_key
    put_out "$body" || leave no_output
}

# Prints $1: nothing is left to be left behind then, and this may block.
put_out() {
    clean_up
    trap - EXIT HUP INT TERM
    { printf '%s' "$1" >&1; } 2>/dev/null && return # (by >&1, or zsh would miss that it is shut)
    exec >/dev/null                                 # ksh would write what it has beside a message
    return 1
}

# $held for the answer and $data for what is signed: two files in TMPDIR, where others may write,
# or in $scratch, a folder of our own there, also where descriptors can't be seen (no /proc).
make_scratch() {
    is_whole "${TMPDIR:-/tmp}" || :
    if [ -e /dev/fd/3 ] && hold "$whole/.$PROGRAM.$$"; then
        data=$held scratch=$held
        hold "$whole/.$PROGRAM.$$"
        return
    fi
    scratch=$(make_temporary -d "$whole/$PROGRAM.XXXXXX") || return 1
    held=$scratch/answer data=$scratch/data
}

# Prints the name of a new file, or with -d folder; no signal ends it between making and telling.
make_temporary() {
    trap '' HUP INT TERM
    exec mktemp "$@" 2>/dev/null
}

[ "$next" != input ] || ! sign_input || finish

# What follows is read only where neither way did lead to the end. The variables:
#
# SSH_AGENT_PROXY_URL         the sign endpoint, or unix:/path; else ~/.config/ssh-agent-proxy/url
#                             has it, else it is http://127.0.0.1:7221/sign
# SSH_AGENT_PROXY_PUBKEY_URL  the public key endpoint; else it is derived from that
# SSH_AGENT_PROXY_TOKEN       the bearer token, where the proxy wants one
# SSH_AGENT_PROXY_TOKEN_FILE  a file with it; else ~/.config/ssh-agent-proxy/token
# SSH_AGENT_PROXY_CURL        another curl (7.68 or newer)

main() {
    case ${1-} in
    pubkey) shift && pubkey ${1+"$@"} ;;
    key) shift && key ${1+"$@"} ;;
    setup) shift && setup ${1+"$@"} ;;
    *)
        [ "$operation" = sign ] || hand_over "$@"
        mend "$@"
        until sign "$@"; do
            mend "$@"
        done
        ;;
    esac
    finish
}

# For all the arguments: removes what stands in the way, or says what it is and ends.
mend() {
    case $next in
    request) check_request "$@" ;;
    url | token | proxy) prepare_anyway || die "$problem" ;;
    file)
        ! can_be_read "$file" || refuse_folder
        die "cannot be signed: $problem"
        ;;
    beside) hold "${subject%/*}/.$PROGRAM.$$" || refuse_folder ;;
    folder) refuse_folder ;;
    home)
        key=${HOME:-.}/${key#??}
        [ "${key#/}" != "$key" ] ||
            die "user.signingkey begins with ~/, and HOME is not the whole path of a folder"
        ;;
    no_key) look_for_key ;;
    nobodys_key) accept_key ;;
    # (Git has written the fingerprint of the key that it was told into it.)
    certificate) die "this push certificate names a key that nobody holds, because the proxy could \
not be asked for its own when the push began: look at \`$PROGRAM pubkey\`, then push again" ;;
    input)
        ! sign_input || finish
        mend "$@"
        ;;
    no_scratch) once=yes ;; # it is signed as it comes
    no_input) die "there is no standard input to sign" ;;
    no_copy) die "standard input could not be kept: is the disk full?" ;;
    no_output) die "the signature could not be written" ;;
    refusal) look_at_refusal ;;
    answer) die "$place answered 200 without the signature that was asked for" ;;
    esac
}

# --- Messages ---------------------------------------------------------------------------------

# $shown: foreign text, of which more than 300 bytes ($2) tell nothing, fit for one line. A
# terminal obeys control characters, and not only ASCII ones.
show() {
    shown=$1
    case $1 in
    *[!\ -~]*) ;;
    *) [ ${#1} -gt "${2:-300}" ] || return 0 ;;
    esac
    shown=$(printf "%.${2:-300}s" "$1" | tr -c ' -~' '?')
}

# One line, whatever stands in it. Git takes "usage:" for the word of an OpenSSH that is too old.
say() {
    clean_up # first: the reader of standard error may be gone, and writing to it the end
    show "$1" 9999
    case $shown in
    *usage:*) shown=$(printf '%s\n' "$shown" | sed 's/usage:/usage /g') ;;
    esac
    printf '%s: %s\n' "$PROGRAM" "$shown" >&2 || :
}

# Does what git wants signed begin with $1? (Where it is not git that asks, there may be no line
# end for a gigabyte.)
begins_with() {
    [ "$namespace" = git ] && [ -f "$subject" ] && [ -r "$subject" ] || return 1
    line=''
    IFS= read -r line <"$subject" || :
    rest=${line#"$1"} # (posh would not cut it within other quotes)
    [ "$rest" != "$line" ]
}

die() {
    # Git before 2.43.2 makes a tag whatever the signer says.
    ! begins_with 'object ' || set -- "$1; this tag is NOT signed: git tag -d it"
    say "$1"
    finish 1
}

# Remembers why something failed, for a caller that may yet know better.
fail() {
    problem=$1
    return 1
}

# --- What was refused -------------------------------------------------------------------------

# What goes into a header stays in it.
check_request() {
    [ -z "$refused" ] || die "$refused"
    show "$namespace"
    [ ${#namespace} -le 255 ] || namespace=''
    case $namespace in
    '' | *[!!-~]* | *,*) die "-n '$shown': a namespace has 1 to 255 printable ASCII characters, \
and no blank or comma among them" ;;
    esac
    case $hash in
    '' | sha256: | sha512:) ;;
    *) die "-O hashalg=${hash%:} is unknown: it is sha256 or sha512" ;;
    esac
    shift "$consumed"
    for operand; do
        [ "$operand" != - ] || [ $# -eq 1 ] || die "standard input cannot be signed beside files"
    done
    checked=yes
}

# What nothing but the environment decides, mended or explained in $problem.
prepare_anyway() {
    until prepare; do
        case $next in
        url) explain_url "$named_in" "$sign_url" || return ;;
        token)
            [ -n "$token" ] || explain_holder ||
                fail "SSH_AGENT_PROXY_TOKEN_FILE gives no token: $problem" || return
            fail "what ${holder:-SSH_AGENT_PROXY_TOKEN} holds is no token: \`ssh-agent-proxy \
token NAME\` prints one on the host" || return
            ;;
        proxy) # curl does not look at it: it may be a header that a CGI's client has chosen
            see_where_it_leads "$HTTP_PROXY"
            [ -z "$leads" ] || [ -n "${REQUEST_METHOD:-}" ] || export http_proxy="$HTTP_PROXY"
            unset HTTP_PROXY
            ;;
        esac
    done
}

# URL $2, which stands in $1, is none; a password in it is not repeated.
explain_url() {
    show "$2"
    { [ -n "$2" ] && [ "${2#*@}" = "$2" ]; } || shown='empty, or with a user name'
    fail "$1 is $shown: it must be http://HOST:PORT/sign, https://HOST/sign or \
unix:/PATH${MSYSTEM:+ (not on Windows, where it has no socket)}"
}

explain_holder() {
    can_be_read "$holder" && fail "$holder holds none"
}

# Is what is at path $1 a file that can be read?
can_be_read() {
    if [ ! -e "$1" ]; then
        reason=$(ls -d -L -- "$1" 2>&1 >/dev/null) || : # in the words of the system
        fail "$1: ${reason##*: }: is it mounted?"
    elif [ -d "$1" ]; then
        fail "$1 is a folder (container engines make one where there was nothing to mount)"
    elif [ ! -r "$1" ]; then
        fail "$1 cannot be read: permission denied"
    fi
}

refuse_folder() {
    die "cannot write $file.sig: is it a folder, or its own not writable, or the disk full?"
}

# --- The key that git named, where it is not in a file ----------------------------------------

# The one that nobody holds stands for the proxy's own choice.
accept_key() {
    chosen=yes
    case ${wanted#* } in
    "$NOBODY") wanted='' nobody=yes ;;
    "$ANYBODY") die "the key in ${source:-user.signingkey} is 32 zero bytes, for which anyone can \
forge a signature: take it out of there, and out of every file of allowed signers" ;;
    esac
}

look_for_key() {
    there=''
    for file in "$key" "$key.pub"; do
        [ ! -e "$file" ] || { [ -f "$file" ] && [ ! -s "$file" ]; } || there=$file
    done
    # (Another first commit may have fetched it in this moment.)
    if is_key "$key" || read_key "$key" || read_key "$key.pub"; then
        accept_key
        return
    fi
    show "$key"
    if [ -n "$there" ]; then
        can_be_read "$there" || die "git's user.signingkey: $problem"
        die "no public key in $shown (git's user.signingkey) nor in $shown.pub: it is the \
public key that is needed there, the private one stays with the agent"
    fi
    is_whole "$key" || die "user.signingkey is ${shown:-empty}, which is no public key \
of a known type, and no file with one (one is fetched only to a path that begins with / or ~/)"
    source=${whole%.pub}.pub
    fetch_key || die "$problem"
    adopt_key
    chosen=yes
}

# Is $1 a public key itself, with or without "key::" before it?
is_key() {
    word=${1#key::}
    blob=${word#* }
    take_key "${word%% *}" "${blob%% *}" && source='' marked=''
}

# Takes the key that was fetched for git's, and puts it where git has it from, if that can be.
adopt_key() {
    wanted=$found marked=yes
    write_key "$source" "$FETCHED, replaced when the key there changes$NEWLINE$fetched" || :
}

# The public key that the proxy signs with: $found, and with its comment $fetched.
fetch_key() {
    find_pubkey_url || return 1
    asked_for=$wanted # which take_key is about to change
    ask_for_key
    settle ask_for_key || return 1
    read -r word blob rest <<END_OF_BODY
$body
END_OF_BODY
    [ -z "$elsewhere" ] || way='' sought='' past='*' # which holds for that host alone
    case $body in
    *"$NEWLINE"?* | *"$NOBODY"* | *"$ANYBODY"*) word='' ;; # it is one line, and somebody's
    esac
    take_key "$word" "$blob" || fail "$place answered 200 without a public key" || return
    found=$wanted
    wanted=$asked_for
    show "$rest"
    fetched="$found${shown:+ $shown}"
}

ask_for_key() {
    place=$pubkey_url elsewhere=yes # the token is none of the business of
    host=${sign_url#*://}
    case $pubkey_url in
    "$sign_url" | "${sign_url%%://*}://${host%%/*}/"*) elsewhere='' ;; # anyone but this
    esac
    ask "$pubkey_url" /publickey ${their_key:+-H "SSHSIG-Key: $their_key"}
}

find_pubkey_url() {
    pubkey_url=${SSH_AGENT_PROXY_PUBKEY_URL:-}
    case $pubkey_url:$sign_url in
    :unix:*) pubkey_url=$sign_url ;;
    :*/sign) pubkey_url=${sign_url%sign}publickey ;;
    :*) fail "$named_in is $sign_url, which does not end in /sign: set SSH_AGENT_PROXY_PUBKEY_URL \
too" ;;
    *) is_url "$pubkey_url" || explain_url SSH_AGENT_PROXY_PUBKEY_URL "$pubkey_url" ;;
    esac
}

# Writes $2 and a line end to file $1, whole or not at all.
write_key() {
    [ -z "$fresh" ] || return 1 # the one before could not be, and its rest is still there
    is_whole "$1" || whole=./$1
    target=$whole
    [ ! -d "$target" ] || return 1
    folder=${target%/*}/
    [ -d "$folder" ] || (umask 077 && mkdir -p -- "$folder") 2>/dev/null || return 1
    fresh=$(make_temporary "$folder.$PROGRAM.XXXXXX") || return 1
    { printf '%s\n' "$2" >"$fresh"; } 2>/dev/null && chmod -- 0644 "$fresh" 2>/dev/null &&
        mv -f -- "$fresh" "$target" 2>/dev/null || return 1
    fresh=''
}

# --- Answers that are none --------------------------------------------------------------------

# There was no signature; that of another key, once, where the one that was asked for is one that
# we fetched, and the proxy will not sign with it any more.
look_at_refusal() {
    granted=yes
    ! settle ask_for_signature || return 0
    # Git's own file of a key is gone by the time that this is read.
    case $server:$answered:$wanted:${source##*/} in
    *:.git_signing_key_tmp* | *:) ;;
    ssh-agent-proxy/*:40[34]:?*:*) problem="$problem (asked for the key in $source)" ;;
    esac
    # No other refusal is asked around: a person's, a policy's and the agent's no are meant.
    case $marked:$once:$answered:$body in
    yes::404:* | "yes::403:this proxy signs with "*) ;;
    *) die "$problem" ;;
    esac
    refusal=$problem
    { is_ours && fetch_key && [ "$found" != "$wanted" ]; } || die "$refusal"
    adopt_key
    ask_for_signature
    settle ask_for_signature || die "$problem"
}

is_ours() {
    [ "${server#ssh-agent-proxy/}." != "$server." ]
}

# True when our proxy has answered 200, asked again by $1 where that does no harm; else $problem
# says what is wrong.
settle() {
    ask_again=$1
    repeated='' # not empty: asked again after a broken connection
    waited=0    # seconds, for a proxy that was busy
    while ! is_granted; do
        if is_broken || is_busy; then
            "$ask_again"
        else
            seek_way || explain_answer || return
        fi
    done
}

# Did the connection break before an answer: a restart, perhaps? Once, and not after so long that
# a person may have been asked.
is_broken() {
    [ -z "$answered$once$repeated" ] || return 1
    repeated=yes
    case $ended:$took in
    52:[0-4].* | 55:[0-4].* | 56:[0-4].* | 52: | 55: | 56:) ;;
    *) return 1 ;;
    esac
}

BUSY_SECONDS=120

# Is the proxy busy, and can it be waited for? Then that was done.
is_busy() {
    is_ours && [ "$answered" = 503 ] && [ -n "$retry_after" ] && [ -z "$once" ] || return 1
    case $retry_after in
    [1-9]) ;;
    *) retry_after=9 ;;
    esac
    case $took in
    [0-9].* | [1-9][0-9].*) waited=$((waited + ${took%%.*})) ;;
    ?*) return 1 ;; # it took too long already
    esac
    waited=$((waited + retry_after))
    [ "$waited" -le "$BUSY_SECONDS" ] || return 1
    sleep "$retry_after" >/dev/null 2>&1 &
    job=$!
    if [ "$waited" -ge "$ANNOUNCE_SECONDS" ]; then
        ANNOUNCE_SECONDS=0 # now, and
        start_timer
        ANNOUNCE_SECONDS=$BUSY_SECONDS # not again
    fi
    job_ends
    stop_timer
}

# --- Getting through --------------------------------------------------------------------------

way=''       # knocked: our proxy was looked for through http_proxy; open: it was found there
tried=''     # the URLs guessed, by none of which it was found
sought=''    # not empty: no further way is known
their_key='' # not empty: the key that is asked about, by `setup`

# $leads: where http_proxy $1 does, to loopback, as in agents' sandboxes, or to Docker's gateway.
see_where_it_leads() {
    leads=$1
    case ${1%%://*} in
    *[!A-Za-z0-9+.-]*) ;; # curl takes it for no scheme either
    *) leads=${1#*://} ;;
    esac
    leads=${leads%%[/?#]*}
    leads=${leads##*@}
    case $leads in
    gateway.docker.internal | gateway.docker.internal:*) leads=gateway ;;
    *) is_loopback "http://$leads/" && leads=loopback || leads='' ;;
    esac
}

# Nothing was reached: is there another way, and was it asked there?
seek_way() {
    is_unreached && [ -z "$sought" ] || return 1
    sought=yes
    case $once:${data-} in
    yes:*/*) return 1 ;; # a pipe by its name cannot be opened again
    esac
    see_where_it_leads "${http_proxy:-}"
    case $leads:$place in
    loopback:http://*) # is our own proxy behind it? It is told no token before that.
        is_loopback "$place" || return
        way=knocked past='' elsewhere=yes
        ask "${place%/*}/healthz" /healthz
        is_ours || return
        way=open
        "$ask_again"
        ;;
    loopback:*) return 1 ;;
    *) guess ;;
    esac
}

# Is the name unknown, or was no connection made in time?
is_unreached() {
    case $answered:$ended:$took in
    :6:* | :7:* | :28:[0-9].*) ;;
    *) return 1 ;;
    esac
}

# By the names that engines give to the host: does our proxy answer there? Only in a container, and
# not where there is a token, which a wrong host could keep.
guess() {
    [ -z "$named_in" ] && [ "${place%/*}" = "${sign_url%/*}" ] && [ -z "${token:+set}" ] &&
        [ ! -e "$holder" ] || return 1
    [ "$leads" = gateway ] || [ -e /.dockerenv ] || [ -e /run/.containerenv ] || return 1
    tried=$sign_url
    set -- host.docker.internal host.containers.internal
    export no_proxy='*' NO_PROXY='*'
    if [ "$leads" = gateway ]; then
        set -- host.docker.internal
        no_proxy='' NO_PROXY=''
    fi
    for candidate; do
        sign_url=http://$candidate:7221/sign
        find_pubkey_url
        "$ask_again"
        ! is_ours || return 0
        tried="$tried, $sign_url"
        [ -z "$once" ] || is_unreached || break # the data is gone
    done
    return 1
}

# --- What the answer says ---------------------------------------------------------------------

# Why there is no signature, and no key: $problem.
explain_answer() {
    if [ "$ended" = 18 ] || { [ -n "$answered" ] && [ -z "$head_ends" ]; }; then
        fail "the answer from $place broke off: try again"
    elif [ -n "$answered" ] && ! is_ours; then
        explain_stranger
    elif [ -n "$answered" ] && [ "$answered" != 200 ]; then
        reason=${body%%"$NEWLINE"*} # (posh would not cut it within other quotes)
        show "$reason"
        problem="$place answered $answered: ${shown:-no reason given}"
        [ "$answered" != 401 ] || advise_token
        return 1
    else
        explain_silence
    fi
}

# It was somebody else who has answered: on the way, or in the proxy's place.
explain_stranger() {
    show "$server"
    stranger="status $answered, Server: ${shown:-none}"
    asked=${tried:-$place}
    problem="what answers at $asked is not ssh-agent-proxy ($stranger) but another program there, \
or a network policy's page: SSH_AGENT_PROXY_URL says where to look"
    case $way:$answered in
    *:403) ! name_permission || problem="a network policy refuses \
$asked ($stranger): the person who set it up has to $permission" ;;
    *:407) problem="the proxy on the way to $asked wants a user and a password ($stranger): \
http_proxy lacks the right ones, which a sandbox puts into it" ;;
    knocked:50[0234]) problem="nothing listens at $asked on the host's side of http_proxy \
($stranger): is ssh-agent-proxy running on the host, on that port?" ;;
    open:50[0234]) problem="the way to $asked through http_proxy broke off ($stranger)" ;;
    esac
    return 1
}

# $permission: what has to be done where $place is refused, in the words of that place's settings.
name_permission() {
    [ -n "$way" ] || ! is_loopback "$place" || return # there is nothing in between
    see_where_it_leads "${http_proxy:-}"
    refused_host=${place#*://}
    refused_host=${refused_host%%/*}
    port=${refused_host##*[!0-9]}
    refused_host=${refused_host%:*[0-9]}
    case $leads:${CODEX_NETWORK_PROXY_ACTIVE:+codex}:${SANDBOX_RUNTIME:+claude} in
    gateway:*) permission="run \`sbx policy allow network localhost:${port:-80} --method POST \
--path /sign\` and \`sbx policy allow network localhost:${port:-80} --method GET \
--path /publickey\` on the host" ;;
    *:codex:*) permission="set \"$refused_host\" = \"allow\" in the network domains of its \
permissions and allow_local_binding = true, in Codex's config.toml" ;;
    *:claude) permission="set {\"sandbox\":{\"network\":{\"allowedDomains\":\
[\"$refused_host\"]}}} in Claude Code's settings.json" ;;
    *) permission="allow the host $refused_host in it" ;;
    esac
}

# The proxy's own word says how to come by a token, and this where one was looked for.
advise_token() {
    refusal=$problem
    case $elsewhere:${token:+set} in
    yes:*) fail "the token is sent to the host of SSH_AGENT_PROXY_URL alone, and this is another" ;;
    :set) fail "what was sent is the one in ${holder:-SSH_AGENT_PROXY_TOKEN}: put another there" ;;
    *) explain_holder || fail "SSH_AGENT_PROXY_TOKEN is not set, and $problem" ;;
    esac || :
    problem="$refusal ($problem)"
}

# There is no (whole) answer: curl's exit status says why.
explain_silence() {
    curl=${SSH_AGENT_PROXY_CURL:-curl}
    asked=${tried:-$place}
    ! is_unreached || ended=un$ended
    case ${place%%:*}:${tried:+tried}$way:$ended:${CODEX_SANDBOX_NETWORK_DISABLED:+codex} in
    unix:*:un6:*) fail "${place#unix:} is longer than the path of a socket can be" ;;
    unix:*:un7:*) explain_socket "${place#unix:}" ;;
    *:un*:codex) fail "$asked cannot be reached, for Codex gives its sandbox no network here: the \
person who set it up has to set network_access = true in config.toml's [sandbox_workspace_write]" ;;
    *:tried:un*) fail "ssh-agent-proxy was not found at $asked: is it running on the host, and \
can this container reach it there? SSH_AGENT_PROXY_URL says where to look" ;;
    *:knocked:un* | *:open:un* | *:knocked:5:*) fail "nothing listens at $asked here, and what \
http_proxy names, which could lead out, cannot be reached" ;;
    *:un6:*) fail "the host of $asked is not known here: SSH_AGENT_PROXY_URL says where to look" ;;
    *:un7:*) fail "nothing listens at $asked (connection refused): is ssh-agent-proxy running on \
the host, and its port reachable from here? SSH_AGENT_PROXY_URL says where to look" ;;
    *:un28:*) fail "no connection to $asked in time ($CONNECT_SECONDS s): is there a firewall?" ;;
    *:28:*) fail "no answer from $place in time ($ANSWER_SECONDS s): a prompt on the host?" ;;
    *:3:*) fail "$place cannot be asked: its port is no port, or it names no host" ;;
    *:5:*) fail "http_proxy, which leads to $place, names no host that is known here" ;;
    *:2:* | *:4:* | *:48:*) fail "$curl lacks something that curl 7.68 has: install a newer one" ;;
    *:[18]:*) fail "what answers at $place does not speak HTTP: another program there?" ;;
    *:23:*) fail "the answer from $place could not be kept: is it too long, or the disk full?" ;;
    *:35:* | *:5[13489]:* | *:60:* | *:77:* | *:83:* | *:9[01]:*) fail "$place: no trusted TLS \
connection (curl's exit status $ended)" ;;
    *:0:* | *:5[256]:*) fail "$place closed the connection without an answer: try again, and see \
that it is ssh-agent-proxy's own, whose log tells more, and not an agent's" ;;
    *:120:*) fail "$curl could not be handed the token: it takes a writable /tmp, or /dev/fd" ;;
    *:12[67]:*) fail "$curl cannot be run: install curl, or name another in SSH_AGENT_PROXY_CURL" ;;
    *) fail "$curl ended with exit status $ended, asking $place" ;;
    esac
}

explain_socket() {
    if [ ! -e "$1" ]; then
        can_be_read "$1" || fail "$problem (its folder, with ssh-agent-proxy running on the host)"
    elif [ ! -S "$1" ]; then
        fail "$1 is not a socket (engines make a folder where there was nothing to mount)"
    elif [ ! -w "$1" ]; then
        fail "$1: permission denied: the socket is not open to this user (?mode=0666 opens it)"
    else
        fail "nobody listens on $1: is ssh-agent-proxy running on the host? (It makes the \
socket anew at each start: mount the folder, not the socket alone)"
    fi
}

# --- Where there is no file for standard input and the answer ----------------------------------

stream() {
    ended=0 token_from=/dev/fd/4 input=0
    {
        answer=$(
            [ -z "${token:+set}" ] || [ -n "$elsewhere" ] || [ -e /dev/fd/0 ] || exit 120
            run_curl "$@" --limit-rate 1M <&3
        )
    } 2>/dev/null || ended=$?
    shift_key
    read_answer 2>/dev/null <<END_OF_ANSWER
$answer
END_OF_ANSWER
}

# --- The real ssh-keygen ----------------------------------------------------------------------

PACKAGES='package openssh-client (Debian, Ubuntu), openssh (Fedora, Arch), openssh-keygen (Alpine)'

hand_over() {
    ! find_ssh_keygen || exec "$found" "$@"
    die "ssh-keygen is not installed, and only signing is done without it: install $PACKAGES"
}

# The first ssh-keygen on the path that is not this file under its name.
find_ssh_keygen() {
    rest=${PATH-}:
    while [ -n "$rest" ]; do
        found=${rest%%:*}
        found=${found:-.}/ssh-keygen
        rest=${rest#*:}
        [ ! -f "$found" ] || [ ! -x "$found" ] || is_shim "$found" || return 0
    done
    return 1
}

is_shim() {
    line=''
    { read -r line && read -r line; } 2>/dev/null <"$1" || :
    described=${line#"# $PROGRAM: "}
    [ "$described." != "$line." ]
}

# --- Commands for people ----------------------------------------------------------------------

prepare_to_ask() {
    set_out
    exec 3</dev/null
    held=${scratch:+$scratch/answer} # it is that of `setup`
    [ -n "$held" ] || make_scratch || :
    prepare_anyway && fetch_key
}

pubkey() {
    path=${1-}
    { [ $# -le 1 ] && [ "${path#-}." = "$path." ]; } ||
        die "pubkey takes one PATH at most, and no options"
    prepare_to_ask || die "$problem"
    if [ $# -eq 0 ]; then
        put_out "$fetched$NEWLINE" || die "the key could not be written"
    elif [ -L "$path" ] || { [ -e "$path" ] && [ ! -f "$path" ]; } ||
        # (A device, or /dev/stdout, which nobody wants to see replaced.)
        ! write_key "$path" "$fetched"; then
        die "cannot write $path: is it no plain file, or is its folder closed to this user?"
    fi
}

# Git takes a failure here for a missing user.signingkey; with a key that nobody holds it goes
# on to -Y sign, which says what is wrong.
key() {
    [ $# -eq 0 ] || die "key takes no arguments"
    if ! prepare_to_ask; then
        fetched="ssh-ed25519 $NOBODY ssh-agent-proxy-any"
        say "$problem"
    fi
    [ "${fetched#ssh-}" != "$fetched" ] || fetched=key::$fetched
    put_out "$fetched$NEWLINE" || die "the key could not be written"
}

# In braces, without the last of which nothing is run. What follows only setup needs.
{ [ "${1-}" = setup ] || main "$@"; }

# --- setup ------------------------------------------------------------------------------------

# What git is told stands in a file of ours, which git's own includes in its last lines: nothing of
# anyone's is replaced. Nothing that a repository's configuration names is run, written or trusted.

MARK="# $PROGRAM setup"
INCLUDED='    path = ~/.config/ssh-agent-proxy/gitconfig'
TAB='	'
EVERYWHERE='gitdir:**' # a plain [include] loses its path to the next `git config include.path`
WITH_REMOTE='hasconfig:remote.*.url:**'
SEE='see docs/containers.md#where-gitconfig-cant-be-written'
# A commit fails with the settings as long as it can't be signed; so they stay.
UNTIL="git commits nothing until that is mended; then run \`$PROGRAM setup\` again"

setup() {
    read_setup_options ${1+"$@"}
    set_out
    trap 'end_early 141' PIPE # the report's reader may be gone
    set +C # which bash takes from the environment
    is_whole "${TMPDIR:-/tmp}" || is_whole "$PWD/$TMPDIR"
    scratch=$(make_temporary -d "$whole/$PROGRAM.XXXXXX") ||
        halt "no folder can be made in ${TMPDIR:-/tmp}: set TMPDIR to one that can be written to"
    # What a repository is known by; GIT_CONFIG_COUNT and the like are the caller's settings.
    LOCAL=$(git rev-parse --local-env-vars 2>/dev/null | sed /GIT_CONFIG_/d)
    find_files
    [ -z "$undo" ] || undo_setup
    find_program
    find_git
    find_identity
    read_values
    write_settings || unwritable=$problem
    find_what_wins
    obtain_key
    judge_key
    [ "$trusted:$written$to_prove$unwritable" = yes: ] || prove
    [ -z "$address" ] || [ -n "$unwritable" ] || keep url "$address" ||
        halt "$own/url cannot be written: $SEE"
    give_verdict
}

read_setup_options() {
    undo='' remote_only='' to_prove='' to_trust='' ssh_keygen=''
    written='' unwritable='' unverified='' failed='' overridden='' differing='' limit='' stands=''
    while [ $# -gt 0 ]; do
        case $1:${2-} in
        --undo:*) undo=yes ;;
        --remote-only:*) remote_only=yes ;;
        --sign:*) to_prove=yes ;;
        --trust:SHA256:???????????????????????????????????????????) to_trust=$2 && shift ;;
        *)
            say "setup takes [--remote-only] [--trust SHA256:...] [--sign] or --undo, nothing else"
            finish 2
            ;;
        esac
        shift
    done
}

# One line of the report, whatever stands in it.
tell() {
    show "$1" 9999
    { printf '%s\n' "$shown"; } 2>/dev/null || finish 1 # nobody reads it
}

halt() { # (`stop` would be a command of ksh)
    for fault; do
        tell "FAIL $fault"
    done
    finish 1
}

# $config: what `git config --global` writes to; $beside: the other file that git reads; $own: our
# folder; $present: the condition of our lines, where they stand there.
find_files() {
    is_whole "${HOME-}" || :
    own=$whole/.config/ssh-agent-proxy signers=$own/allowed_signers
    config=${GIT_CONFIG_GLOBAL-${HOME-}/.gitconfig}
    beside=${GIT_CONFIG_GLOBAL-${XDG_CONFIG_HOME:-${HOME-}/.config}/git/config}
    [ -e "$config" ] || [ ! -e "$beside" ] || config=$beside
    present=$(sed -n "/^\\[includeIf /{N;s|^\\[includeIf \"\\(.*\\)\"\\]\\n$INCLUDED\$|\\1|p;}" \
        "$config" "$beside" 2>/dev/null | tail -n 1)
}

# $program: this very file, by the path it was called by, for git to run it from anywhere.
find_program() {
    is_whole "$0" || case $whole in
    */* | *.sh | "$PROGRAM"*) is_whole "$PWD/${whole#./}" ;;
    *) whole='' ;; # a shell's name
    esac
    program=$whole
    { is_shim "$program" && [ -x "$program" ]; } ||
        halt "git needs this as a file that can be run: save it, chmod +x it, and run that"
    quote "$program"
    key_command="$quoted key"
}

# $quoted: $1 as one word for a shell, and for git, which splits its key command like one.
quote() {
    quoted="'$(printf '%s\n' "$1" | sed "s/'/'\\\\''/g")'"
}

# git outside any repository, in an empty one of ours, and where the caller stands.
# shellcheck disable=SC2086 # several
outside() (
    unset $LOCAL || :
    cd / && export GIT_DIR=/dev/null && exec git -P "$@" 2>"$scratch/error"
)
# shellcheck disable=SC2086
inside() (
    unset $LOCAL || :
    cd "$scratch/proof" && exec git -P -c core.hooksPath=/dev/null -c include.path="$scratch/off" \
        -c core.fsmonitor=false -c maintenance.auto=false -c log.showSignature=false "$@" \
        2>"$scratch/error"
)
here() (
    unset GIT_CONFIG || : # which counts for `git config` alone
    exec git -P "$@" 2>"$scratch/error"
)

# $shown: what a program of ours said to git, or else git itself, in one line.
read_error() {
    said=$(sed -n "/$PROGRAM: /{p;q;}" "$scratch/error")
    said=${said#*"$PROGRAM: "} # the first: the rest may be a server's
    # (Not a trace, nor what the next line says with its file.)
    show "${said:-$(sed -e '/^[0-9{]/d; /^error: missing /d; s/^fatal: //' -e q "$scratch/error")}"
}

# Makes the repository of ours. What git $lacks: keys of any type by a command, --remote-only, a
# tag that is not made when it can't be signed.
find_git() {
    outcome=0
    version=$(outside version) || outcome=$?
    read_error
    case $outcome:${version#git version }. in
    12[67]:*) halt "git is not installed, or not on the path: its package is called git" ;;
    0:[01].* | 0:2.[0-9].* | 0:2.[12][0-9].* | 0:2.3[0-3].*)
        halt "$version is too old to sign with SSH keys: it takes 2.34 or newer"
        ;;
    0:2.34.*) lacks='keys, remotes, tags' ;;
    0:2.35.*) lacks='remotes, tags' ;;
    0:2.3[6-9].* | 0:2.4[0-2].* | 0:2.43.[01].*) lacks=tags ;;
    0:[1-9]*) lacks='' ;;
    *) halt "git does not run: $shown" ;;
    esac
    # Settings name hooks as well, since git 2.54.
    outside config --name-only --get-regexp '^hook\..*\.command$' | sed 's/["\\]/\\&/g
        s/^hook\.\(.*\)\.command$/[hook "\1"]enabled = false/' >"$scratch/off"
    mkdir -- "$scratch/proof"
    inside init -q --template= && inside config remote.none.url https://none.invalid && return
    read_error
    halt "git cannot make a repository in ${TMPDIR:-/tmp}: ${shown:-is the disk full?}"
}

# $email, as git would use it outside a repository; an identity that git makes up is none.
find_identity() {
    [ -n "${EMAIL:-}" ] || set -- -c user.useConfigOnly=true
    identity=$(outside ${1+"$@"} var GIT_COMMITTER_IDENT) || identity=''
    email=${identity%>*}
    email=${email##*<}
    case $email in
    *@*@* | *[!][A-Za-z0-9._%+=/"'"@-]*) ;;
    ?*@?*) return ;;
    esac
    [ -n "$email" ] || has_home || halt "$problem; without it EMAIL must tell git your address"
    read_error
    show "${email:-$shown}"
    halt "git must know your name, and a mail address such as you@example.com ($shown): \
git config --global user.name 'YOUR NAME' && git config --global user.email YOU@EXAMPLE.COM"
}

# get WHERE NAME: $value, fit to be printed $shown, and $from, where it is set, if it is.
get() {
    where=$1 name=$2
    case $name in
    commit.gpgsign | tag.*) set -- --bool ;;
    *SignersFile | user.signingkey) set -- --path ;;
    *) set -- ;;
    esac
    said=$("$where" config --show-origin ${1+"$@"} --get "$name") ||
        said=$("$where" config --show-origin --get "$name") || said=''
    from=${said%%"$TAB"*}
    value=${said#"$from"}
    value=${value#?}
    show "$value"
}

# What git is told outside repositories, where our lines do not count: $their_key, where it can be
# used, $key_file of ours where not, $signers, and what is $overridden.
read_values() {
    printf '%s\n' "# written by $PROGRAM setup; its --undo takes it away" >"$scratch/gitconfig"
    override gpg.format ssh
    override gpg.ssh.program "$program"
    override gpg.ssh.defaultKeyCommand "$key_command"
    override commit.gpgsign true
    override tag.forceSignAnnotated true
    get outside user.signingkey
    find_their_key || override user.signingkey "${key_file:=$own/key.pub}"
    get outside gpg.ssh.allowedSignersFile
    # One that depends on the folder is none.
    ! is_whole "$value" || [ ! -f "$whole" ] || [ ! -r "$whole" ] || signers=$whole
    [ "${signers%/*}" != "$own" ] || override gpg.ssh.allowedSignersFile "$signers"
}

# override KEY VALUE: for our file; names what another sets otherwise.
override() {
    outside config --file "$scratch/gitconfig" "$1" "$2"
    get outside "$1"
    case $from:$value in
    : | "command line:"* | *":$2" | *"$PROGRAM"*) ;;
    *) overridden="${overridden:+$overridden; }$1 = '$shown' ($from)" ;;
    esac
}

# $their_key: that of user.signingkey $value, unless it depends on the folder. True without one.
find_their_key() {
    their_key='' key_file=''
    [ -n "$from" ] || return 0
    is_key "$value" ||
        { is_whole "$value" && { read_key "$whole" || read_key "$whole.pub"; }; } || return
    their_key=$wanted wanted=''
    case $their_key in
    *" $NOBODY" | *" $ANYBODY") their_key='' && return 1 ;;
    esac
}

# Everything that is written before the proof. $written: something that was not there.
write_settings() {
    condition=${present:-$EVERYWHERE}
    has_home || return
    [ -z "$remote_only" ] || condition=$WITH_REMOTE
    [ "${present:-$condition}" = "$condition" ] ||
        halt "git signs in every repository by now: run \`$PROGRAM setup --undo\` first"
    case $condition:$lacks in
    h*remotes*) halt "--remote-only takes git 2.36 or newer, and this is $version" ;;
    h*)
        get outside commit.gpgsign
        [ "$value" != true ] || tell_cure "commit.gpgsign is true, without a remote too"
        [ -z "$failed" ] || halt "nothing was written: do that, then the same setup again"
        ;;
    esac
    [ -f "$config" ] || [ ! -e "$config" ] || fail "$config is no regular file" || return
    lines="$MARK${NEWLINE}[includeIf \"$condition\"]$NEWLINE$INCLUDED"
    [ ! -e "$own/gitconfig" ] || stands=yes # and another file of settings may include it
    keep gitconfig "$(cat "$scratch/gitconfig")" &&
        { [ -n "$present" ] || append "$config" "$lines"; } && return
    [ -n "$stands" ] || remove_ours
    fail "$config or ~/.config/ssh-agent-proxy cannot be written"
}

has_home() {
    { [ -d "${HOME-}" ] && [ "${HOME#/}" != "$HOME" ]; } ||
        fail "HOME is '${HOME-}', which is not the whole path of a folder here"
}

# Writes $2 and a line end to our file $1, where that is not what it holds.
keep() {
    [ "$(cat -- "$own/$1" 2>/dev/null)" != "$2" ] || return 0
    write_key "$own/$1" "$2" && written=yes
}

# append FILE TEXT: as lines of its own.
append() {
    [ -z "$(tail -c 1 -- "$1" 2>/dev/null)" ] || set -- "$1" "$NEWLINE$2"
    size=$({ true >>"$1" && wc -c <"$1"; } 2>/dev/null) || :
    { printf '%s\n' "$2" >>"$1"; } 2>/dev/null && written=yes && return
    [ -z "$size" ] || dd bs=1 count=0 seek="$((size))" of="$1" 2>/dev/null # half a line ends git
    return 1
}

remove_ours() {
    rm -f -- "$own/gitconfig" ${undo:+"$own/url"} 2>/dev/null || : # that one may be a person's
    rmdir -- "$own" "${own%/*}" 2>/dev/null || :
}

# Are the settings in force, in a new repository and in this one?
find_what_wins() {
    get inside gpg.ssh.program
    resolved=$(command -v "$value") || : # however it is spelled
    ! is_whole "$resolved" || ! is_shim "$whole" || program=$value
    expect_settings inside
    [ -z "$failed" ] || halt "the next commit will not be signed until that is mended"
    if ! here rev-parse --git-dir >/dev/null; then
        [ -n "$(sed -n '/^fatal: not a git repository/p' "$scratch/error")" ] || failed=yes
        [ -z "$failed" ] || tell "FAIL git refuses this: $(tr -s '\n\t' '  ' <"$scratch/error")"
        return
    fi
    [ "$condition" = "$EVERYWHERE" ] ||
        here config --get-regexp '^remote\..*\.url$' >/dev/null || return 0
    expect_settings here
    for name in user.signingkey gpg.ssh.defaultKeyCommand gpg.ssh.allowedSignersFile; do
        get inside "$name"
        expected=$value
        get here "$name"
        [ "$value" = "$expected" ] || differing="${differing:+$differing; }$name = '$shown' ($from)"
    done
}

expect_settings() {
    for setting in "gpg.format ssh" "gpg.ssh.program $program" "commit.gpgsign true"; do
        get "$1" "${setting%% *}"
        [ "$value" != "${setting#* }" ] || continue
        [ "$where" = here ] || [ -z "$unwritable" ] || halt "$unwritable: $SEE"
        tell_cure "$name is ${shown:-not set}"
    done
}

# tell_cure WHAT: a failure of setting $name, where it comes from, and what mends it.
tell_cure() {
    quote "${from#file:}"
    case $from in
    file:/* | file:[A-Za-z]:/*) cure="git config --file $quoted --unset-all $name" ;;
    file:.git/config | file:config) cure="git config --local --unset-all $name" ;;
    file:.git/config.worktree) cure="git config --worktree --unset-all $name" ;;
    file:*) cure="take it out of that file" ;; # the path is escaped, or an include's in the above
    *) cure="take it out of this shell's GIT_CONFIG_COUNT or GIT_CONFIG_PARAMETERS" ;;
    esac
    failed=yes
    tell "FAIL $1 ($from): $cure"
}

# $signing_key, with its comment $whole_key.
obtain_key() {
    ! find_ssh_keygen || ssh_keygen=$found
    [ -n "$ssh_keygen" ] || unverified="ssh-keygen is missing: it comes in $PACKAGES"
    case $("${ssh_keygen:-:}" -lf /dev/null 2>&1) in # as in containers of a number alone
    "No user exists"*) ssh_keygen='' unverified="ssh-keygen takes a user that /etc/passwd knows" ;;
    esac
    prepare_to_ask || halt "$problem${their_key:+ (of the key in user.signingkey)}" "$UNTIL"
    signing_key=$found whole_key=$fetched
    case $their_key$key_file:$lacks:$signing_key in
    :keys*:ssh-*) ;;
    :keys*) halt "$version takes a key such as ${signing_key%% *} from a file only: $PROGRAM \
pubkey ~/.ssh/signing.pub && git config --global user.signingkey ~/.ssh/signing.pub" "$UNTIL" ;;
    esac
    [ "$signing_key" = "${their_key:-$signing_key}" ] ||
        halt "user.signingkey names another key than $pubkey_url does" "$UNTIL"
    address=${SSH_AGENT_PROXY_URL:-}
    [ -z "$address" ] || [ "$(cat -- "$own/url" 2>/dev/null)" = "$address" ] || to_prove=yes
}

# $fingerprint of key $1 as ssh-keygen tells it; the key itself where nothing can.
find_fingerprint() {
    printf '%s\n' "$1" >"$scratch/key.pub"
    fingerprint=''
    if [ -n "$ssh_keygen" ]; then
        fingerprint=$("$ssh_keygen" -lf "$scratch/key.pub" 2>/dev/null | cut -d ' ' -f 2)
    elif sum=$(cut -d ' ' -f 2 "$scratch/key.pub" | { base64 -d | sha256sum; } 2>/dev/null); then
        digits=$(printf '%s\n' "${sum%% *}" | sed 's/../0x& /g')
        # shellcheck disable=SC2059,SC2086 # each is a word, and becomes an escape sequence
        fingerprint=$(printf "$(printf '\\%03o' $digits)" | base64 2>/dev/null) || fingerprint=''
        fingerprint=${fingerprint:+SHA256:${fingerprint%=}}
    fi
    fingerprint=${fingerprint:-$1}
}

# $trusted: not empty where the signers hold the key; in our file with its line alone.
judge_key() {
    trusted='' rival='' more=yes
    trust_line="$email namespaces=\"git\" $signing_key"
    cat -- "$signers" >"$scratch/signers" 2>/dev/null || :
    while [ -n "$more" ]; do
        read -r who option word blob rest || more=''
        case "$who $option $word $blob $rest" in
        "$trust_line "*) trusted=yes ;;
        *" $signing_key "*) ;; # on other terms: git will say whether they hold
        "$email $option AAAA"*) rival="$option $word" ;;
        "$email "*) rival="$word $blob" ;;
        esac
    done <"$scratch/signers"
    find_fingerprint "$signing_key"
    [ "${to_trust:-$fingerprint}" = "$fingerprint" ] ||
        halt "the key that signs is $fingerprint, and --trust names another: compare it again"
    [ -n "$rival" ] && [ -z "$trusted$to_trust" ] || return 0
    new=$fingerprint
    find_fingerprint "$rival"
    halt "trusted for $email is the key $fingerprint, and what signs now is $new" \
        "the key was changed, or somebody else is at the proxy's address: only where \
\`ssh-agent-proxy check\` on the host shows the second one, add it by setup --trust FINGERPRINT"
}

# Has git make and verify a commit; only then the key is trusted.
prove() {
    inside commit -q --allow-empty -m "$PROGRAM setup" || {
        read_error
        halt "${shown:-git did not say why: is ${TMPDIR:-/tmp} full?}" "$UNTIL"
    }
    if [ -z "$ssh_keygen" ]; then
        case $(inside cat-file commit HEAD) in
        *"$BEGIN"*) trust "$MARK: signed, and not verified$NEWLINE" ;;
        *) halt "git made a commit without a signature, and did not say why" ;;
        esac
        return
    fi
    printf '%s\n' "$trust_line" >"$scratch/signers"
    is_good -c gpg.ssh.allowedSignersFile="$scratch/signers" ||
        halt "the signature is none by $fingerprint that verifies: ${shown:-$verdict}" "$UNTIL"
    trust ''
    is_good || case $unwritable:$signers in
    :"$own"/*) halt "the commit does not verify by $signers: ${shown:-$verdict}" ;;
    :*) halt "$signers (git's gpg.ssh.allowedSignersFile) lacks this line: $trust_line" \
        "commits are signed, and do not verify here until it is in there" ;;
    *) unverified="git has no file of allowed signers with this key in it" ;;
    esac
}

is_good() {
    verdict=$(inside ${1+"$@"} log -1 --format=%G?) || :
    read_error
    [ "$verdict" = G ]
}

# Adds the key to the file of signers, after $1, where that is ours.
trust() {
    [ "$trusted$unwritable$signers" = "$own/allowed_signers" ] || return 0
    { append "$signers" "$1$trust_line" && chmod -- go-w "$signers"; } ||
        halt "$signers cannot be written: $SEE"
}

give_verdict() {
    [ -n "$unwritable" ] ||
        tell "ok   git's settings: ~/.config/ssh-agent-proxy/gitconfig, included by $config"
    [ -z "$overridden" ] || tell "warn overridden: $overridden"
    tags="tags: git tag -m and -s sign, -a does not"
    case $lacks:$written in
    *tags:*) tell "warn $tags; where signing fails, git before 2.43.2 makes the tag, unsigned" ;;
    *:yes) tell "ok   $tags" ;;
    esac
    relied="${SSH_AGENT_PROXY_TOKEN:+ SSH_AGENT_PROXY_TOKEN}${SSH_AGENT_PROXY_TOKEN_FILE:+ \
SSH_AGENT_PROXY_TOKEN_FILE}${SSH_AGENT_PROXY_PUBKEY_URL:+ \
SSH_AGENT_PROXY_PUBKEY_URL}${SSH_AGENT_PROXY_CURL:+ SSH_AGENT_PROXY_CURL}"
    [ -z "$relied" ] || tell "warn this relies on$relied of this shell, which git lacks elsewhere: \
a token is kept in ~/.config/ssh-agent-proxy/token (mode 0600)"
    [ -z "$differing" ] || tell "warn this repository has its own $differing"
    tell "ok   key $fingerprint, for $email"
    [ -z "$failed" ] ||
        halt "the next commit in this repository will not be signed until that is mended"
    tell "todo compare: \`ssh-agent-proxy check\` on the host must show $fingerprint"
    tell "todo register as a *signing* key, where your commits are shown: $whole_key"
    [ "$condition" = "$EVERYWHERE" ] || limit=' in a repository that has a remote'
    [ -z "$differing" ] || limit="$limit outside this repository"
    [ -z "$unverified" ] || tell "ok   signs$limit; not verified here: $unverified"
    [ -n "$unverified" ] || tell "ok   the next commit$limit will be signed, and verify"
}

# Takes our lines away, and what was written.
undo_setup() {
    has_home || halt "$problem"
    lines="$MARK\\n\\[includeIf \"[^\"]*\"\\]\\n$INCLUDED"
    for target in "$config" "$beside" "${HOME-}/.gitconfig"; do
        take_away "$target" "/^$MARK\$/{\$!N;/\\n\\[/!{P;D;};\$!N;\\|^$lines\$|d;}"
    done
    take_away "$signers" "/^$MARK: /d;/^[^ #]* namespaces=\"git\" [^ ]* [^ ]*\$/d"
    [ -s "$signers" ] || rm -f -- "$signers" 2>/dev/null || :
    ! read_key "$own/key.pub" || [ -z "$marked" ] || rm -f -- "$own/key.pub" 2>/dev/null || :
    remove_ours
    find_files
    { [ -z "$present" ] && [ ! -e "$own/gitconfig" ]; } ||
        halt "$own/gitconfig, or its lines in $config, cannot be taken away: read-only, or full?"
    get outside commit.gpgsign
    now="signs no commit by itself"
    [ "$value" != true ] || now="signs commits as $from says"
    tell "ok   undone: git $now"
    finish
}

# What sed's $2 leaves of file $1, in one step where that is neither a link nor mounted.
take_away() {
    # One reading counts, for another --undo may be writing it now, and it is empty in between.
    { cat "$1" >"$scratch/was" && sed "$2" "$scratch/was"; } >"$scratch/new" 2>/dev/null || return 0
    ! cmp -s "$scratch/new" "$scratch/was" || return 0
    fresh=$(make_temporary "$1.XXXXXX") || return 0
    if [ -L "$1" ] || ! {
        cp -p -- "$1" "$fresh" && cat "$scratch/new" >"$fresh" && mv -f -- "$fresh" "$1"
    } 2>/dev/null; then
        { cat "$scratch/was" >"$fresh"; } 2>/dev/null || halt "there is no room to rewrite $1"
        copy=$fresh fresh='' # which stays, should the writing end in the middle
        { cat "$scratch/new" >"$1"; } 2>/dev/null || cmp -s "$copy" "$1" ||
            halt "$1 could not be written whole: what it was is in $copy"
        rm -f -- "$copy"
    fi
    fresh=''
    [ -s "$1" ] || [ -L "$1" ] || rm -f -- "$1" 2>/dev/null || :
}

{ main "$@"; }
