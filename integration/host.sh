#!/usr/bin/env bash
# host.sh: a private libvirt host with guest images, for as long as one command runs.
#
# usage: host.sh run [--] COMMAND [ARGUMENT...]
#        host.sh shell
#
# On a bare Debian 12 machine, as root, host.sh installs the packages that are missing, builds the
# guest images that are missing (images.sh), starts a virtlogd and a libvirtd in network, process and
# mount namespaces of their own, runs the command (or an interactive shell) beside them, and exits as
# the command did. Then everything is gone: the namespaces end, and with them whatever ran or was
# mounted in them. It can be run several times at once, and a libvirt that the machine itself has is
# neither used nor touched.
#
# The command finds, at libvirt's usual places:
#   qemu:///system            guests run emulated (<domain type='qemu'>) as Debian's user libvirt-qemu
#   network default           virbr0, 192.168.122.0/24, DHCP, active
#   pool default              /var/lib/libvirt/images, active, with the read-only volumes
#     gitlab-runner-base.qcow2  the Debian guest: BIOS and UEFI
#     tiny.qcow2                the tiny guest's empty disk
#   tiny-vmlinux, tiny-initrd   the tiny guest's kernel and initramfs, in the pool's directory
#   /root/.ssh/id_rsa         the key that lets the guests' user gitlab-runner in; id_ed25519 does so, too
#   /etc/libvirt-driver       empty
# These, /run, /var/lib/libvirt, /var/log/libvirt and /var/cache/libvirt are private; the rest of the
# file system is the machine's. There is no network but that of the guests: fetch what the command
# needs (go mod download) before.
#
# On SIGTERM the command gets SIGTERM, and SIGKILL 10 s later. LIBVIRT_DRIVER_CACHE moves the images'
# cache from /var/cache/libvirt-driver.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=integration/lib.sh
source "$here/lib.sh"

main() {
	case ${1:-} in
	run)
		shift
		[[ ${1:-} != -- ]] || shift
		(($#)) || { usage >&2 && return 2; }
		;;
	shell) set -- "${SHELL:-bash}" ;;
	-h | --help | help) usage && return ;;
	*) usage >&2 && return 2 ;;
	esac

	((EUID == 0)) || die "root is needed: libvirt and namespaces are set up"
	child='' work='' inside=''
	trap 'finish' EXIT
	trap 'interrupted=1' INT # the terminal sends it to the command too, which decides
	trap 'terminate' TERM HUP

	need_packages libvirt-daemon-system libvirt-daemon-driver-qemu libvirt-daemon-config-network \
		libvirt-daemon-config-nwfilter libvirt-clients qemu-system-x86 qemu-utils ovmf dnsmasq-base \
		iproute2 iptables ebtables virtinst openssh-client
	make_work
	supervise setpriv --pdeathsig TERM "$here/images.sh" all >"$work/images"
	inside=1
	supervise setpriv --pdeathsig KILL unshare --mount --net --pid --fork --kill-child -- \
		"$here/inside.sh" "$work" "$@"
}

usage() {
	sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}

# make_work makes the directory that holds all of a run's state, and removes those of runs that were killed.
# A run holds a lock on its directory.
make_work() {
	local dir
	mkdir -p "$cache"
	exec 8>"$cache/host.lock"
	flock 8
	for dir in /var/tmp/libvirt-driver.*/; do
		[[ -e $dir/lock ]] && flock --nonblock "$dir/lock" true && rm -rf "$dir"
	done
	work=$(mktemp -d /var/tmp/libvirt-driver.XXXXXX)
	exec 7>"$work/lock"
	flock 7
	exec 8>&-
}

# supervise COMMAND...: runs it, and returns its status even when a signal comes in between.
supervise() {
	local status
	"$@" <&0 &
	child=$!
	while
		interrupted='' status=0
		wait "$child" || status=$?
		[[ $interrupted ]] && kill -0 "$child" 2>/dev/null
	do :; done
	child=''
	return "$status"
}

# terminate passes SIGTERM on: to the first process in the namespaces, which ends them, or to images.sh.
terminate() {
	interrupted=1
	if [[ -e $work/pid ]]; then
		kill -TERM "$(<"$work/pid")" 2>/dev/null || true
	elif [[ $child && ! $inside ]]; then
		kill -TERM "$child" 2>/dev/null || true
	else
		exit 143 # nothing has come to run there yet
	fi
}

finish() {
	if [[ $child ]]; then
		kill -KILL "$child" || true # unshare takes its child with it
		wait "$child" || true
	fi 2>/dev/null
	[[ -z $work ]] || rm -rf "$work"
}

main "$@"
