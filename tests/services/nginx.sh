#!/usr/bin/env bash
# A real asset server on 127.0.0.1: nginx, which serves ranges of the files below .services/assets.
# Writes S2CD_TEST_ASSETS_URL and S2CD_TEST_ASSETS_DIR to .services/env.
set -eu
: "${SERVICES:?set by start.sh}"
if grep -q ^S2CD_TEST_ASSETS_URL= "$SERVICES/env"; then
    url=$(sed -n 's/^S2CD_TEST_ASSETS_URL=//p' "$SERVICES/env")
    if "${PYTHON:-python3}" -c "import urllib.request as u; u.urlopen('$url/ready', timeout=5)" 2>/dev/null; then exit 0; fi
    sed -i '/^S2CD_TEST_ASSETS/d' "$SERVICES/env"
fi
if ! command -v nginx >/dev/null; then
    if [ "$(id -u)" != 0 ]; then echo "nginx is not installed"; exit 1; fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    # The package would start a server of its own on port 80.
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d.s2cd && chmod +x /usr/sbin/policy-rc.d.s2cd
    if [ ! -e /usr/sbin/policy-rc.d ]; then cp /usr/sbin/policy-rc.d.s2cd /usr/sbin/policy-rc.d; made=1; fi
    apt-get install -y -qq --no-install-recommends nginx-light
    [ -n "${made:-}" ] && rm -f /usr/sbin/policy-rc.d
    rm -f /usr/sbin/policy-rc.d.s2cd
fi
port=$("${PYTHON:-python3}" -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])")
root="$SERVICES/assets"
mkdir -p "$root" "$SERVICES/nginx"
echo ok >"$root/ready"
cat >"$SERVICES/nginx/nginx.conf" <<CONF
user $(id -un);
worker_processes 1;
pid $SERVICES/nginx/pid;
error_log $SERVICES/nginx/error.log;
events { worker_connections 256; }
http {
    access_log off;
    client_body_temp_path $SERVICES/nginx;
    proxy_temp_path $SERVICES/nginx;
    fastcgi_temp_path $SERVICES/nginx;
    uwsgi_temp_path $SERVICES/nginx;
    scgi_temp_path $SERVICES/nginx;
    server {
        listen 127.0.0.1:$port;
        root $root;
    }
}
CONF
nginx -c "$SERVICES/nginx/nginx.conf"
{
    echo "S2CD_TEST_ASSETS_URL=http://127.0.0.1:$port"
    echo "S2CD_TEST_ASSETS_DIR=$root"
} >>"$SERVICES/env"
