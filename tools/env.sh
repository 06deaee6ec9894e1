#!/bin/sh
# Make .venv and install the project into it: `tools/env.sh base` or `tools/env.sh dev docs` (extras of setup.py).
# Does nothing when .venv already has what is asked for and nothing that decides the install has changed.
# PYTHON=/path/to/python picks the interpreter; without it the first suitable one on the PATH is taken.
set -eu
cd "$(dirname "$0")/.."
want=${*:-base}
py=.venv/bin/python
stamp=.venv/installed
log=.venv/install.log

say() { printf '%s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

suits() { # a Python of the right age, not itself missing the means to make a venv
  "$1" -c 'import sys; sys.exit(not (3,10) <= sys.version_info[:2])' >/dev/null 2>&1
}
makes_venvs() { "$1" -c 'import venv, ensurepip' >/dev/null 2>&1; }

find_python() {
  seen=''; lacking=''
  # 3.10 to 3.13 are the tested ones; a newer one is tried only when there is no other.
  if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"
  else set -- python3 python python3.13 python3.12 python3.11 python3.10 python3.14 python3.15
  fi
  for c; do
    command -v "$c" >/dev/null 2>&1 || continue
    v=$("$c" -c 'import sys; print(".".join(map(str, sys.version_info[:3])))' 2>/dev/null) || continue
    seen="$seen $c=$v"
    suits "$c" || continue
    if makes_venvs "$c"; then printf '%s\n' "$c"; return 0; fi
    lacking="$c"
  done
  if [ -n "$lacking" ]; then
    die "$lacking cannot make virtual environments: its venv and ensurepip modules are missing." \
        "On Debian or Ubuntu: apt-get install python3-venv. Then run the same command again."
  fi
  die "Python 3.10 or newer is needed; found:${seen:- none}." \
      "Install one (3.11 is the best tested), or point to it: make PYTHON=/path/to/python3.11 ..."
}

# What decides an install: these files, and where the checkout lies (scripts in .venv/bin carry that path).
key=$( { pwd; cat settings.ini constraints.txt pyproject.toml setup.py; } | cksum | tr ' ' '-' )
old=''; have='' # have: what was asked for so far; it is kept when the key changes
if [ -f "$stamp" ]; then read -r old have < "$stamp" || true; fi
lacks=''; [ "$old" = "$key" ] || lacks=yes
for w in $want; do
  case " $have " in *" $w "*) ;; *) lacks=yes ;; esac
done
if [ -z "$lacks" ] && "$py" -c 'import sys' >/dev/null 2>&1; then exit 0; fi
where=$(sed -n 2p "$stamp" 2>/dev/null || true)

if ! "$py" -m pip --version >/dev/null 2>&1 || { [ -n "$where" ] && [ "$where" != "$PWD" ]; }; then
  host=$(find_python) || exit 1
  say "making .venv with $("$host" --version 2>&1) ($host)"
  "$host" -m venv --clear .venv || die "$host -m venv failed (see above)"
fi

extras=$(printf '%s\n' $have $want | grep -v '^base$' | sort -u | paste -sd, - || true)
say "installing the project${extras:+ with $extras} into .venv: 1 to 3 minutes the first time (log: $log)"
rm -f "$stamp"
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
unset PYTHONPATH PYTHONHOME || true
# A module is compiled when it is first imported: of 19,000 files a quarter ever is. Where Python is told to keep no compiled files, pip compiles all.
later=--no-compile
[ -z "${PYTHONDONTWRITEBYTECODE:-}" ] || later=--compile
{
  # Editable installs from pyproject.toml need pip 21.3.
  "$py" -c 'import pip, sys; sys.exit(tuple(map(int, pip.__version__.split(".")[:2])) < (21, 3))' \
    || "$py" -m pip install -U 'pip>=22' || exit 1
  "$py" -m pip install --progress-bar off "$later" -c constraints.txt -e ".${extras:+[$extras]}" || exit 1
} > "$log" 2>&1 || { tail -n 25 "$log" >&2; die "the installation failed: the end of $log is above"; }
printf '%s base %s\n%s\n' "$key" "$(printf '%s' "$extras" | tr ',' ' ')" "$PWD" > "$stamp"
say "installed"
