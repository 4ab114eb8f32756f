#!/usr/bin/env bash
# release.sh: builds the release.
#
# usage: packaging/release.sh [FOLDER [ARCHITECTURE...]]
#
# For each architecture, all that libvirt and QEMU serve well unless some are named, FOLDER (dist by default) gets a tarball with the static
# binary, the sample of its settings and the part of GitLab Runner's config.toml that calls it, and all together get
# checksums. The same commit gives the same bytes, whoever builds it wherever: no paths (-trimpath), no build id, and
# the commit's time in place of the clock.
#
# VERSION and SOURCE_DATE_EPOCH are taken from git unless they are set.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "${1:-$here/../dist}"
folder=$(cd "${1:-$here/../dist}" && pwd)
cd "$here/.."

version=${VERSION:-$(git describe --tags --always --dirty)}
epoch=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
shift $(($# > 0))
(($#)) || set -- amd64 arm64 riscv64 ppc64le s390x
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT

archives=()
for arch; do
	name=libvirt-driver-$version-linux-$arch
	mkdir "$stage/$name"
	CGO_ENABLED=0 GOOS=linux GOARCH=$arch go build -tags urfave_cli_no_docs -trimpath -buildvcs=false \
		-ldflags "-s -w -buildid= -X main.version=$version" -o "$stage/$name/libvirt-driver" .
	install -m 0644 packaging/config.toml packaging/runner-config.toml \
		packaging/libvirt-driver-gc.service packaging/libvirt-driver-gc.timer \
		packaging/libvirt-driver-standby.service "$stage/$name/"
	tar --create --directory "$stage" --sort=name --format=ustar --mtime="@$epoch" --owner=0 --group=0 --numeric-owner \
		--mode='u=rwX,go=rX' "$name" | gzip --no-name --best >"$folder/$name.tar.gz"
	archives+=("$name.tar.gz")
	echo "$folder/$name.tar.gz"
done
(cd "$folder" && sha256sum "${archives[@]}" >SHA256SUMS)
echo "$folder/SHA256SUMS"
