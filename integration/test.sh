#!/usr/bin/env bash
# test.sh: runs all tests.
#
# usage: integration/test.sh [ARGUMENT...]
#
# From a bare Debian 12 machine with Go, as root, it installs what the tests need, builds the driver and the guest
# images, and runs the unit tests, under the race detector, and then the tests in this folder against a private
# libvirtd with real guests (host.sh). ARGUMENTs are go test's, for the latter: -run Cancel, -v, -skip 200MB, ...
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=integration/lib.sh
source "$here/lib.sh"
cd "$here/.."

build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

need_packages openssh-server gcc libc6-dev
go vet ./... # quick, and its failures are easier to read than a test's
go test -race ./...

args=("${@/#-test./-}") # a compiled test knows go test's flags as -test.FLAG, and only so

go build -trimpath -o "$build/libvirt-driver" .
go test -c -race -tags integration -o "$build/integration.test" ./integration
LIBVIRT_DRIVER_BINARY=$build/libvirt-driver "$here/host.sh" run -- \
	bash -c 'cd "$1" && shift && exec "$@"' - "$here" "$build/integration.test" -test.timeout 60m -test.parallel 3 "${args[@]/#-/-test.}"
