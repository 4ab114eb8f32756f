#!/usr/bin/env bash
# inside.sh WORK COMMAND [ARGUMENT...]: the first process in host.sh's namespaces. When it exits, the kernel ends every
# other process there, and the namespaces with them.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=integration/lib.sh
source "$here/lib.sh"

main() {
	work=$1
	shift
	trap 'exit 143' TERM
	unset LIBVIRT_DEFAULT_URI VIRSH_DEFAULT_CONNECT_URI
	# /proc is still the host's: this is the process ID that host.sh can send a signal to.
	read -r pid _ </proc/self/stat
	echo "$pid" >"$work/pid"

	mount_private
	ip link set lo up
	configure_libvirt
	start_libvirt
	run "$@"
}

# mount_private puts this run's own directories over those that a libvirt, or a libvirt client, uses.
mount_private() {
	mount -t proc proc /proc

	# /sys shows this network namespace's interfaces. It comes without control groups, which libvirt
	# would share with the machine's own libvirt and with other runs.
	umount --recursive --lazy /sys
	mount -t sysfs sysfs /sys

	# Sockets, PID files and locks. Without systemd's and D-Bus's, libvirt registers guests nowhere.
	mount -t tmpfs -o mode=755 run /run
	mkdir /run/lock
	# Some machines' resolv.conf is a link to /run: dnsmasq does not start without the directory.
	local resolv
	resolv=$(readlink --canonicalize-missing /etc/resolv.conf)
	[[ $resolv != /run/* ]] || mkdir -p "${resolv%/*}"

	# libvirt tries KVM as root and then looks whether QEMU's user may use it. Where udev has not opened the device
	# to group kvm it takes what it learned for outdated, and starts QEMU a dozen times more for every guest.
	if [[ -c /dev/kvm ]]; then
		mknod -m 660 /run/kvm c 10 232
		chgrp kvm /run/kvm
		mount --bind /run/kvm /dev/kvm
	fi

	# On a terminal virsh starts polkit's agent, which complains that there is no polkit here.
	[[ ! -e /usr/bin/pkttyagent ]] || mount --bind /dev/null /usr/bin/pkttyagent

	private 755 /etc/libvirt
	private 755 /etc/libvirt-driver
	private 700 /root/.ssh
	private 755 /var/lib/libvirt
	private 755 /var/log/libvirt
	private 711 /var/cache/libvirt
}

# private MODE DIR: mounts an empty directory of this run's over DIR.
private() {
	local mode=$1 dir=$2
	mkdir -p "$dir" "$work/private$dir"
	chmod "$mode" "$work/private$dir"
	mount --bind "$work/private$dir" "$dir"
}

# present FILE AT: shows FILE, which is the cache's, at AT; read-only, and so for root and libvirt too.
present() {
	touch "$2"
	mount --bind "$1" "$2"
	mount -o remount,bind,ro "$2"
}

configure_libvirt() {
	local images=/var/lib/libvirt/images debian='' tiny='' name dir

	cat >/etc/libvirt/libvirtd.conf <<-END
		log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
	END
	# Profiles for AppArmor would be the machine's, not this run's.
	echo 'security_driver = "none"' >/etc/libvirt/qemu.conf
	cp -r /usr/share/libvirt/nwfilter /etc/libvirt/nwfilter

	while read -r name dir; do
		declare "$name=$dir"
	done <"$work/images"
	install -d -m 711 "$images"
	install -d -m 750 -o libvirt-qemu -g libvirt-qemu /var/lib/libvirt/qemu
	install -d -m 755 /var/log/libvirt/qemu
	present "$debian/disk.qcow2" "$images/gitlab-runner-base.qcow2"
	present "$tiny/disk.qcow2" "$images/tiny.qcow2"
	present "$tiny/vmlinux" "$images/tiny-vmlinux"
	present "$tiny/initrd" "$images/tiny-initrd"

	for name in id_rsa id_ed25519; do
		install -m 600 "$cache/$name" "/root/.ssh/$name"
		install -m 644 "$cache/$name.pub" "/root/.ssh/$name.pub"
	done
}

start_libvirt() {
	# For a guest's filter libvirtd forks some 270 times, and each time all of its memory is copied. With one arena
	# for all of its threads it has half as much.
	export MALLOC_ARENA_MAX=1
	# Each returns when it is ready to be called.
	virtlogd --daemon 7>&-
	libvirtd --daemon 7>&- || {
		cat /var/log/libvirt/libvirtd.log >&2
		die "cannot start libvirtd"
	}
	virsh --quiet "
		net-define /usr/share/libvirt/networks/default.xml
		net-start default
		pool-define-as default dir --target /var/lib/libvirt/images
		pool-start default
		domcapabilities" >/dev/null # the first look at QEMU takes most of a second: not on the command's time
}

# run COMMAND...: runs it and returns its status; on SIGTERM gives it 10 s to end.
run() {
	# A shell without job control starts what it does not wait for with SIGINT and SIGQUIT ignored.
	env --default-signal=INT,QUIT -- "$@" <&0 7>&- &
	command=$!
	trap 'stop' TERM
	local status
	while
		stopping='' status=0
		wait "$command" || status=$?
		[[ $stopping ]] && kill -0 "$command" 2>/dev/null
	do :; done
	return "$status"
}

stop() {
	stopping=1
	kill -TERM "$command" 2>/dev/null || true
	(sleep 10 && kill -KILL "$command") 2>/dev/null &
}

main "$@"
