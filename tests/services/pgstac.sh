#!/usr/bin/env bash
# A real STAC API on 127.0.0.1: stac-fastapi-pgstac on PostgreSQL with PostGIS. Starts empty.
# Writes S2CD_TEST_STAC_API (URL) and S2CD_TEST_PGSTAC (shell prefix of environment for pypgstac) to .services/env.
set -eu
: "${SERVICES:?set by start.sh}"
PG=/usr/lib/postgresql/15/bin
VENV="$SERVICES/venv"

if grep -q ^S2CD_TEST_STAC_API= "$SERVICES/env"; then
    url=$(sed -n 's/^S2CD_TEST_STAC_API=//p' "$SERVICES/env")
    if "${PYTHON:-python3}" -c "import urllib.request as u; u.urlopen('$url', timeout=5)" 2>/dev/null; then exit 0; fi
    sed -i '/^S2CD_TEST_STAC_API=/d; /^S2CD_TEST_PG/d' "$SERVICES/env"
fi

if [ ! -x "$PG/initdb" ] || [ ! -e /usr/share/postgresql/15/extension/postgis.control ]; then
    if [ "$(id -u)" != 0 ]; then echo "PostgreSQL 15 with PostGIS is not installed"; exit 1; fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends postgresql-15 postgresql-15-postgis-3
fi
if [ ! -x "$VENV/bin/pypgstac" ]; then
    "${PYTHON:-python3}" -m venv "$VENV"
    "$VENV/bin/pip" install --quiet "stac-fastapi-pgstac>=7,<8" "pypgstac[psycopg]" uvicorn
fi

# PostgreSQL does not run as root: it then runs as its own user, in a folder of that user's.
as_user() { if [ "$(id -u)" = 0 ]; then runuser -u postgres -- "$@"; else "$@"; fi; }
cd /
data=$(as_user mktemp -d "${TMPDIR:-/tmp}/s2cd-postgres.XXXXXX")
read -r pg_port api_port <<<"$("${PYTHON:-python3}" - <<'PY'
import socket
sockets = [socket.socket() for _ in range(2)]
for s in sockets:
    s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in sockets))
PY
)"
as_user "$PG/initdb" -D "$data/db" -U pgstac --auth=trust >/dev/null
as_user "$PG/pg_ctl" -D "$data/db" -l "$data/log" -w start \
    -o "-p $pg_port -k $data -c listen_addresses=127.0.0.1 -c fsync=off -c shared_buffers=256MB"
export PGHOST=127.0.0.1 PGPORT=$pg_port PGUSER=pgstac PGPASSWORD=pgstac PGDATABASE=postgis
export POSTGRES_USER=$PGUSER POSTGRES_PASS=$PGPASSWORD POSTGRES_DBNAME=$PGDATABASE POSTGRES_PORT=$PGPORT
export POSTGRES_HOST=$PGHOST POSTGRES_HOST_READER=$PGHOST POSTGRES_HOST_WRITER=$PGHOST POSTGRES_PASSWORD=$PGPASSWORD
"$PG/createdb" "$PGDATABASE"
"$PG/psql" -q -c "CREATE EXTENSION postgis"
"$VENV/bin/pypgstac" migrate
nohup "$VENV/bin/uvicorn" --factory stac_fastapi.pgstac.app:create_app --host 127.0.0.1 --port "$api_port" \
    --log-level warning >"$SERVICES/api.log" 2>&1 </dev/null &
echo $! >"$SERVICES/api.pid"
for _ in $(seq 60); do
    if "${PYTHON:-python3}" -c "import urllib.request as u; u.urlopen('http://127.0.0.1:$api_port/', timeout=5)" 2>/dev/null; then
        {
            echo "S2CD_TEST_STAC_API=http://127.0.0.1:$api_port"
            echo "S2CD_TEST_PGSTAC_DSN=postgresql://$PGUSER:$PGPASSWORD@$PGHOST:$PGPORT/$PGDATABASE"
            echo "S2CD_TEST_PYPGSTAC=$VENV/bin/pypgstac"
        } >>"$SERVICES/env"
        exit 0
    fi
    sleep 0.5
done
tail -n 3 "$SERVICES/api.log"
exit 1
