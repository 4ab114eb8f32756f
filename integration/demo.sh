#!/usr/bin/env bash
# demo.sh: runs a sample job in a fresh guest, from nothing, and shows what GitLab would show.
#
# As root on a Debian 12 machine with Go. It builds the driver, starts a private libvirt host (host.sh, which installs
# packages and builds guest images when they are missing), lets integration/demo play GitLab Runner there, and leaves
# nothing behind but the packages and the images' cache. Exits 0 when the job succeeded and left nothing on the host.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ $# == 0 ]] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "integration/${0##*/}" >&2 && exit 2; }

build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
export CGO_ENABLED=0
go build -trimpath -o "$build/libvirt-driver" .
go build -trimpath -o "$build/demo" ./integration/demo

integration/host.sh run -- "$build/demo" --driver "$build/libvirt-driver"
