#!/bin/sh
# Asks for the approval of a release and goes on with the answer. Standard input: the work as one line, then one line per answer.
set -eu
here=$(dirname -- "$0")
. "$here/lib/agent.sh"
[ "$#" -ge 1 ] && [ -n "$1" ] || fail 1 "context.version is missing: the version to release"
version=$1

IFS= read -r work || [ -n "${work:-}" ] || fail 75 "standard input ended before the work arrived"
progress 10 "preparing the release of $version"
printf '::lattice {"escalate": {"reason": %s, "context": {"version": %s, "choices": ["approve", "reject"]}}}\n' \
  "$(json "May version $version be released? Answer approve or reject.")" "$(json "$version")"

IFS= read -r line || [ -n "${line:-}" ] || fail 75 "standard input ended before the answer arrived"
# An answer is a text, or an object that says {"approved": true}.
answer=$(printf '%s\n' "$line" | sed -n 's/.*"answer"[[:space:]]*:[[:space:]]*"\([^"]*\)".*/\1/p' | tr '[:upper:]' '[:lower:]')
approved=false
case $answer in
  approve | approve[!a-z]* | approved | approved[!a-z]* | yes | yes[!a-z]* | ok | y) approved=true ;;
  '')
    if printf '%s\n' "$line" | grep -Eq '"(answer|approved)"[[:space:]]*:[[:space:]]*true'; then approved=true; fi
    ;;
esac
if [ "$approved" = true ]; then
  progress 90 "releasing $version"
else
  progress 90 "keeping $version back"
fi
printf '::lattice {"result": {"version": %s, "approved": %s}}\n' "$(json "$version")" "$approved"
