#!/usr/bin/env bash
# Starts the real servers that the tests marked `services` talk to. Each script beside this one starts one service,
# does nothing if it runs already, and appends NAME=value lines to .services/env. A service that cannot be had here
# is reported and its tests skip, saying so.
set -u
cd "$(dirname "$0")/../.."
export SERVICES="$PWD/.services"
mkdir -p "$SERVICES"
touch "$SERVICES/env"
for script in tests/services/*.sh; do
    name=$(basename "$script" .sh)
    [ "$name" = start ] && continue
    if timeout 240 bash "$script" >"$SERVICES/$name.log" 2>&1 </dev/null; then
        echo "service $name: ready"
    else
        echo "service $name: not available, its tests will skip ($(tail -n 1 "$SERVICES/$name.log"))"
    fi
done
exit 0
