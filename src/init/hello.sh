#!/bin/sh
# Greets. The task is the first argument; whatever is printed is the result.
set -eu
printf '::lattice {"progress": 50, "message": "thinking of a greeting"}\n'
printf 'Hello from %s! You asked: %s\n' "${LATTICE_AGENT:-hello}" "${1:-nothing}"
