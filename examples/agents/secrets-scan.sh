#!/bin/sh
# Looks for credentials in a source tree; shows where they are, never what they are.
set -eu
here=$(dirname -- "$0")
. "$here/lib/agent.sh"
[ "$#" -ge 1 ] && [ -n "$1" ] || fail 1 "context.path is missing: the folder to look through"
path=$(rooted "$1")
[ -d "$path" ] || fail 1 "there is no folder $1"

progress 10 "looking through $1"
SCAN_AWK='
  function report(kind, found) {
    printf "{\"file\": %s, \"line\": %d, \"kind\": %s, \"starts_with\": %s, \"length\": %d}\n", \
      json(FILENAME), FNR, json(kind), json(substr(found, 1, 4)), length(found)
  }
  function look(kind, pattern) {
    if (match($0, pattern)) report(kind, substr($0, RSTART, RLENGTH))
  }
  BEGIN {
    aws = "AKIA" repeated("[0-9A-Z]", 16)
    github = "gh[pousr]_" repeated("[0-9A-Za-z]", 36)
    slack = "xox[abprs]-" repeated("[0-9A-Za-z-]", 10)
    api = "sk-" repeated("[0-9A-Za-z_-]", 20)
    assigned = "(password|passwd|secret|api_key|apikey|token)[\"\047]?[ \t]*[:=][ \t]*[\"\047]" repeated("[^\"\047 \t]", 8)
  }
  length($0) <= 10000 {
    look("aws_access_key", aws)
    look("github_token", github)
    look("slack_token", slack)
    look("api_key", api)
    if ($0 ~ /-----BEGIN [A-Z ]*PRIVATE KEY-----/) report("private_key", "-----BEGIN")
    # What is assigned may be short and guessable: nothing of it is shown.
    if (match(tolower($0), assigned)) report("assigned_in_clear", "")
  }'
list=$(scan_files "$path" | findings 500)
progress 90 "writing the report"
printf '{"path": %s, %s}\n' "$(json "$1")" "$list"
