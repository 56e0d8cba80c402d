#!/bin/sh
# The largest folders below a folder, as JSON.
set -eu
here=$(dirname -- "$0")
. "$here/lib/agent.sh"
[ "$#" -ge 1 ] && [ -n "$1" ] || fail 1 "context.path is missing: the folder to measure"
path=$(rooted "$1")
[ -d "$path" ] || fail 1 "there is no folder $1"
sizes=$(mktemp) || fail 75 "there is no room for a temporary file"
trap 'rm -f "$sizes"' EXIT
trap 'exit 143' TERM INT HUP

progress 10 "measuring $1"
complete=true
du -kx "$path" >"$sizes" || complete=false
[ -s "$sizes" ] || fail 75 "du measured nothing below $1"
progress 80 "sorting"
largest=$(
  # A name may hold newlines: a line without a size goes on with the one before.
  awk "$JSON_AWK"'
    function flush() { if (name != "") printf "%d {\"path\": %s, \"kib\": %d}\n", size, json(name), size }
    /^[0-9]+\t[.\/]/ { flush(); size = $1; name = substr($0, index($0, "\t") + 1); next }
    { name = name "\n" $0 }
    END { flush() }
  ' "$sizes" | sort -rn | awk 'NR <= 20 { sub(/^[0-9]+ /, ""); printf "%s%s", (NR > 1 ? "," : ""), $0 }'
)
total=$(awk '/^[0-9]+\t[.\/]/ { last = $1 } END { print last + 0 }' "$sizes")
printf '{"path": %s, "total_kib": %s, "complete": %s, "largest": [%s]}\n' "$(json "$1")" "$total" "$complete" "$largest"
