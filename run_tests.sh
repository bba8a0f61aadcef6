#!/usr/bin/env bash
# The whole test suite, with all the set-up it needs. Arguments go through to pytest;
# --slow runs the tests that take minutes as well.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. ./env.sh

arguments=()
slow=
for argument in "$@"; do
    if [ "$argument" = --slow ]; then slow=1; else arguments+=("$argument"); fi
done
[ -n "$slow" ] || arguments=(-m "not slow" ${arguments[@]+"${arguments[@]}"})

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
exec "$PYTHON" -m pytest ${arguments[@]+"${arguments[@]}"}
