#!/bin/sh
# Proves the image without access to a registry: makes a base with debootstrap, builds the Dockerfile on it with podman,
# runs one service as compose.yml would, checks its health and stops it. Needs root on Debian; takes minutes.
set -eu
cd "$(dirname "$0")/../.."

say() { printf 'prove: %s\n' "$*" >&2; }
fail() {
    say "$*"
    exit 1
}

for program in podman debootstrap; do
    command -v $program >/dev/null ||
        fail 'needs: apt-get install --no-install-recommends podman runc netavark catatonit debootstrap'
done

base=localhost/clawbus-base
image=localhost/clawbus:proof
name=clawbus-proof-$$
work=$(mktemp -d)
trap 'podman rm --force --volumes $name >/dev/null 2>&1 || true; podman volume rm $name-own $name-public >/dev/null 2>&1 || true; rm -rf "$work"' EXIT
# In a sandbox, podman may not raise resource limits.
printf '[containers]\ndefault_ulimits = []\n' >"$work/containers.conf"
export CONTAINERS_CONF="$work/containers.conf"

if ! podman image exists $base; then
    . /etc/os-release
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Component: main' | head -n 1)
    say "making a base of Debian $VERSION_CODENAME"
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates "$VERSION_CODENAME" "$work/base" \
        "$mirror" >"$work/log" || fail "$(tail "$work/log")"
    tar -C "$work/base" -c . | podman import - $base >/dev/null
fi

say 'building'
# This machine's access to the package index is mounted, so that the image keeps nothing of it.
set --
for file in /etc/pip.conf /etc/ssl/certs/ca-certificates.crt; do
    [ ! -f $file ] || set -- "$@" --volume "$file:$file:ro"
done
nice podman build --quiet --network host --build-arg PYTHON=$base "$@" --tag $image \
    --file infra/deploy/docker/Dockerfile .
say "built, $(podman image inspect --format '{{.Size}}' $image) bytes with its base"
podman run --rm --network none $image sh -c 'test ! -s /etc/pip.conf' || fail 'the image holds a pip.conf'
podman run --rm --network none --read-only --volume /gateway $image sh -c ': >/gateway/nginx.conf' ||
    fail "the user cannot write to a new volume for the gateway's configuration"

podman run --rm --network none --read-only --volume $name-own:/keys/user --volume $name-public:/keys/public $image \
    python -c 'from pathlib import Path; from tooling.stack.keys import make_keys; make_keys(Path("/keys"), ["user"])' ||
    fail 'the user cannot make its keys in new volumes'
say 'starting the user service, without any store'
secret() { head -c 32 /dev/urandom | base64 -w 0; }
podman run --detach --name $name --network none --init --read-only --tmpfs /tmp --cap-drop ALL \
    --security-opt no-new-privileges --memory 768m \
    --env CLAW_DATABASE_URL=postgresql://user_worker@postgres/claw \
    --env CLAW_REQUEST_DATABASE_URL=postgresql://user_request@postgres/claw \
    --env CLAW_KAFKA_BOOTSTRAP_SERVERS=kafka:9092 --env CLAW_RABBITMQ_URL=amqp://rabbitmq \
    --env CLAW_REDIS_URL=redis://redis --env CLAW_HTTP_PORT=8001 --env CLAW_GRPC_PORT=9001 \
    --volume $name-own:/keys/user --volume $name-public:/keys/public \
    --env CLAW_PRIVATE_KEY_FILE=/keys/user/private.pem --env CLAW_PUBLIC_KEYS_FILE=/keys/public/keys.json \
    --env CLAW_MASTER_KEY_FILE=/keys/user/master.txt --env CLAW_ADMIN_TOKEN="$(secret)" \
    $image python -m services.user >/dev/null
ask='import urllib.request as u; print(u.urlopen("http://127.0.0.1:8001/healthz", timeout=4).read().decode())'
tries=0
until podman exec $name python -c "$ask" 2>/dev/null; do
    tries=$((tries + 1))
    [ $tries -lt 60 ] || fail "no answer: $(podman logs $name 2>&1 | tail)"
    sleep 1
done
[ "$(podman exec $name id -u)" = 10001 ] || fail 'the service does not run as user 10001'
! podman exec $name touch /app/file 2>/dev/null || fail 'the service can write into the image'
podman stop --time 30 $name >/dev/null
[ "$(podman inspect --format '{{.State.ExitCode}}' $name)" = 0 ] || fail "exit code not 0: $(podman logs $name | tail)"
say 'the service was healthy as an ordinary user, wrote nowhere, and stopped with exit code 0'
