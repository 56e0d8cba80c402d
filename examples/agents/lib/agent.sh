# Shared by the example agents; read with `.`, in a POSIX shell.
LC_ALL=C
export LC_ALL
JSON_AWK=$(cat "$here/lib/json.awk")
export JSON_AWK

# json TEXT: the text as a JSON string.
json() {
  JSON_TEXT=$1 awk "$JSON_AWK"' BEGIN { printf "%s", json(ENVIRON["JSON_TEXT"]) }'
}

# progress PERCENT MESSAGE
progress() {
  printf '::lattice {"progress": %s, "message": %s}\n' "$1" "$(json "$2")"
}

# fail CODE MESSAGE: 75 is worth another try, 1 is not.
fail() {
  printf '%s\n' "$2" >&2
  exit "$1"
}

# rooted PATH: the path in a form that no program takes for an option or an assignment.
rooted() {
  case $1 in
    /*) printf '%s' "$1" ;;
    *) printf './%s' "$1" ;;
  esac
}

# scan_files PATH: runs the awk program $SCAN_AWK over every readable text-sized file below PATH.
scan_files() {
  export SCAN_AWK
  find "$1" -type d \( -name .git -o -name node_modules -o -name target -o -name vendor -o -name .venv -o -name .tools \) -prune -o \
    -type f -size -2048 -exec sh -c '
      for file do
        shift
        if [ -r "$file" ]; then set -- "$@" "$file"; else printf "cannot read %s\n" "$file" >&2; fi
      done
      [ "$#" -eq 0 ] || awk "$JSON_AWK$SCAN_AWK" "$@"
    ' sh {} +
}

# findings MAX: JSON lines on standard input as the fields "total", "truncated" and "findings".
findings() {
  awk -v max="$1" '
    NR <= max { list = list (NR > 1 ? "," : "") $0 }
    END { printf "\"total\": %d, \"truncated\": %s, \"findings\": [%s]", NR, (NR > max ? "true" : "false"), list }
  '
}
