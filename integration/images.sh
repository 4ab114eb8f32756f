#!/usr/bin/env bash
# images.sh: builds the guest images that the demo, the tests and the benchmarks boot.
#
# usage: images.sh [debian|tiny|all]
#
#   debian  Debian 12 on a disk that boots by BIOS and by UEFI: the guest that proves things.
#   tiny    Debian's kernel with an initramfs of busybox, bash and OpenSSH, for direct kernel boot:
#           the guest for suites that start many.
#
# For each image one line goes to stdout: its name and the directory that holds it, in the cache
# ${LIBVIRT_DRIVER_CACHE:-/var/cache/libvirt-driver}:
#   debian-HASH/disk.qcow2
#   tiny-HASH/vmlinux, tiny-HASH/initrd, tiny-HASH/disk.qcow2
# HASH is that of the recipe: images/build.sh, images/NAME and the SSH keys. An image that is there is
# not built again. Packages come from where this machine's apt gets Debian's.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=integration/lib.sh
source "$here/lib.sh"

main() {
	case ${1:-all} in
	all) set -- debian tiny ;;
	debian | tiny) set -- "$1" ;;
	-h | --help | help) usage && return ;;
	*) usage >&2 && return 2 ;;
	esac

	((EUID == 0)) || die "root is needed to build guest images"
	trap 'finish' EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM HUP
	mkdir -p "$cache"
	chmod 755 "$cache"
	make_key rsa
	make_key ed25519
	local name
	for name in "$@"; do
		image "$name"
	done
}

usage() {
	sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}

# make_key TYPE: makes the key pair of that type that every image admits, once.
make_key() {
	local key=$cache/id_$1
	[[ -e $key.pub ]] && return
	need_packages openssh-client
	lock key
	if [[ ! -e $key.pub ]]; then
		rm -f "$key.new"
		ssh-keygen -q -t "$1" -N '' -C gitlab-runner -f "$key.new"
		mv "$key.new" "$key"
		mv "$key.new.pub" "$key.pub" # last: its presence says that both are there
	fi
	unlock
}

# image NAME: builds the image unless it is there, and prints where it is.
image() {
	local name=$1 dir
	dir=$cache/$name-$(recipe "$name")
	if [[ ! -d $dir ]]; then
		lock "$name"
		[[ -d $dir ]] || build "$name" "$dir"
		unlock
	fi
	touch "$dir" # build removes what nothing has used for a week
	printf '%s %s\n' "$name" "$dir"
}

# lock NAME waits until no other images.sh holds the lock of that name; unlock lets it go.
lock() {
	exec 9>"$cache/$1.lock"
	until flock --timeout 1 9; do :; done # rather than without end: a trap has to wait for what the shell waits for
}

unlock() {
	exec 9>&-
}

# recipe NAME: the hash of all that decides what the image holds.
recipe() {
	{
		(cd "$here/images" && find build.sh "$1" -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum)
		cat "$cache"/id_*.pub
	} | sha256sum | cut -c1-12
}

# build NAME DIR: builds the image in a temporary directory beside DIR and renames that to DIR.
build() {
	local name=$1 dir=$2 began=$SECONDS
	need_packages mmdebstrap kmod cpio lz4 e2fsprogs dosfstools mtools fdisk syslinux syslinux-common qemu-utils
	say "building the $name image"
	find "$cache" -maxdepth 1 \( -name "$name-*" -mtime +7 -o -name 'build.*' -mtime +0 \) -exec rm -rf {} +

	# The build has process and mount namespaces of its own: when this script ends, however it ends,
	# so does everything that the build started and mounted.
	work=$(mktemp -d "$cache/build.XXXXXX")
	setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child --mount-proc -- \
		"$here/images/$name/build" "$work" >"$work/log" 2>&1 </dev/null &
	child=$!
	if ! wait "$child"; then
		tail -n 40 "$work/log" >&2
		die "cannot build the $name image: see the lines above"
	fi
	child=''
	chmod 755 "$work/out"
	chmod 444 "$work/out"/*
	mv "$work/out" "$dir"
	rm -rf "$work"
	work=''
	say "built the $name image in $((SECONDS - began)) s"
}

finish() {
	if [[ ${child:-} ]]; then
		kill -KILL "$child" || true # unshare takes its child with it
		wait "$child" || true
	fi 2>/dev/null
	[[ -z ${work:-} ]] || rm -rf "$work"
}

main "$@"
