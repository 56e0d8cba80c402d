#!/bin/sh
# Digests a log file: how many errors and warnings, in which span of time, and the most frequent errors.
set -eu
here=$(dirname -- "$0")
. "$here/lib/agent.sh"
[ "$#" -ge 1 ] && [ -n "$1" ] || fail 1 "context.path is missing: the log file"
path=$(rooted "$1")
[ ! -d "$path" ] || fail 1 "$1 is a folder, not a log file"
# While a log is rotated it is away for a moment.
[ -f "$path" ] || fail 75 "there is no log file $1"
[ -r "$path" ] || fail 1 "the log file $1 cannot be read"

progress 10 "reading $1"
digest=$(awk "$JSON_AWK"'
  function stamp(line) {
    if (match(line, /[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9][T ][0-9][0-9]:[0-9][0-9]:[0-9][0-9]/)) return substr(line, RSTART, RLENGTH)
    return ""
  }
  # What is left when times, numbers and ids are taken away is the same for the same error.
  function shape(line) {
    gsub(/[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9][T ][0-9:.,]*(Z|[+-][0-9][0-9]:?[0-9][0-9])?/, "", line)
    gsub(/0x[0-9a-fA-F]+/, "#", line)
    gsub(/[0-9a-f]*[0-9][0-9a-f]*-[0-9a-f-]+/, "#", line)
    gsub(/[0-9]+/, "#", line)
    gsub(/[ \t]+/, " ", line)
    sub(/^ /, "", line)
    return substr(line, 1, 200)
  }
  {
    low = tolower($0)
    at = stamp($0)
    if (at != "") { if (first == "") first = at; last = at }
    if (low ~ /(^|[^a-z])(error|fatal|panic|critical|exception)([^a-z]|$)/) {
      errors++
      key = shape($0)
      if (!(key in count)) {
        if (kinds >= 20000) next
        kinds++
        example[key] = substr($0, 1, 400)
        line_first[key] = NR
      }
      count[key]++
      line_last[key] = NR
    } else if (low ~ /(^|[^a-z])warn(ing)?([^a-z]|$)/) warnings++
  }
  END {
    printf "\"lines\": %d, \"errors\": %d, \"warnings\": %d, \"kinds\": %d, ", NR, errors, warnings, kinds
    printf "\"first\": %s, \"last\": %s, \"top\": [", (first == "" ? "null" : json(first)), (last == "" ? "null" : json(last))
    for (n = 0; n < 10; n++) {
      best = ""
      for (key in count)
        if (best == "" || count[key] > count[best] || (count[key] == count[best] && line_first[key] < line_first[best])) best = key
      if (best == "") break
      printf "%s{\"count\": %d, \"message\": %s, \"example\": %s, \"first_line\": %d, \"last_line\": %d}", \
        (n ? "," : ""), count[best], json(best), json(example[best]), line_first[best], line_last[best]
      delete count[best]
    }
    printf "]"
  }
' "$path") || fail 75 "the log file $1 could not be read to its end"
progress 90 "writing the report"
printf '{"path": %s, %s}\n' "$(json "$1")" "$digest"
