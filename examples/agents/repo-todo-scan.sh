#!/bin/sh
# Lists TODO, FIXME, XXX and HACK marks below a folder as JSON.
set -eu
here=$(dirname -- "$0")
. "$here/lib/agent.sh"
[ "$#" -ge 1 ] && [ -n "$1" ] || fail 1 "context.path is missing: the folder to look through"
path=$(rooted "$1")
[ -d "$path" ] || fail 1 "there is no folder $1"

progress 10 "looking through $1"
SCAN_AWK='
  {
    if (match($0, /(^|[^A-Za-z0-9_])(TODO|FIXME|XXX|HACK)($|[^A-Za-z0-9_])/)) {
      rest = substr($0, RSTART)
      match(rest, /TODO|FIXME|XXX|HACK/)
      printf "{\"file\": %s, \"line\": %d, \"mark\": %s, \"text\": %s}\n", \
        json(FILENAME), FNR, json(substr(rest, RSTART, RLENGTH)), json(substr(rest, RSTART, 200))
    }
  }'
list=$(scan_files "$path" | findings 500)
progress 90 "writing the report"
printf '{"path": %s, %s}\n' "$(json "$1")" "$list"
