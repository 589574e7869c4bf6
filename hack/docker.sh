#!/usr/bin/env bash
# Builds a container image: docker.sh server|agent [ENGINE] [TAG]
# ENGINE is the command of the container engine: docker, or another with the same command line.

# shellcheck source=hack/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

part=${1:-}
engine=${2:-docker}
tag=${3:-dev}

case $part in
  server | agent) ;;
  *) die "usage: hack/docker.sh server|agent [ENGINE] [TAG]" ;;
esac

have "$engine" || die "container images need a container engine, and the command '$engine' is not there: apt-get install docker.io, or DOCKER=podman"
timeout 20 "$engine" info >/dev/null 2>&1 || die "the container engine does not answer: '$engine info' fails; start it, or name another one: make docker DOCKER=podman"

cd "$REPO"
exec "$engine" build --file "deployments/docker/$part.Dockerfile" --tag "hypervisor-$part:$tag" .
