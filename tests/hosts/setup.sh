#!/usr/bin/env bash
# Installs the coding agents that the tests drive, into .tools/hosts of this repository: about 700 MB, for codex and opencode bring
# programs of their own. Needs npm, and the Node that tests/clients/setup.sh installs. Does nothing when they are there already.
#
# Of opencode it takes the program alone, in the build that runs on every processor: the package opencode-ai has all builds.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
tools=$(cd "$here/../.." && pwd)/.tools
hosts=$tools/hosts

fail() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

wanted=$(cat "$here/setup.sh" "$here/package-lock.json" | cksum)
is_whole() {
  [[ -f $hosts/stamp && $(<"$hosts/stamp") == "$wanted" ]]
}

is_whole && exit 0
[[ -x $tools/bin/node ]] || fail "no $tools/bin/node: run ./tests/clients/setup.sh first"
exec 9>"$tools/lock"
if command -v flock >/dev/null; then flock 9; fi
is_whole && exit 0
printf 'setup: installing the coding agents of the tests into %s (once, about half a minute)\n' "$hosts" >&2
rm -rf "$hosts"
mkdir -p "$hosts"
cp "$here/package.json" "$here/package-lock.json" "$hosts/"
# An npm that came from PyPI stands beside its Node.
export PATH="$PATH:$tools/python-modern/bin"
if ! said=$(cd "$hosts" && npm ci --ignore-scripts --no-audit --no-fund --no-update-notifier --loglevel=error 2>&1); then
  printf '%s\n' "$said" | tail -n 40 >&2
  fail "npm could not install the coding agents: see above; the tests need npm's registry"
fi
printf '%s' "$wanted" >"$hosts/stamp"
