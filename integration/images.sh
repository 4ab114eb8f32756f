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
#   tiny-HASH/vmlinuz, tiny-HASH/initrd, tiny-HASH/disk.qcow2
# HASH is that of the recipe: this script, its files and the SSH key. An image that is there is not built again.
# Packages come from where this machine's apt gets Debian's.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=integration/lib.sh
source "$here/lib.sh"

disk_size=8G      # of the Debian guest; a sparse file
boot_start=1      # MiB; where its FAT partition starts
boot_size=63      # MiB; kernel, initramfs and two boot loaders
tiny_disk_size=64M

main() {
	case ${1:-all} in
	all) set -- debian tiny ;;
	debian | tiny) set -- "$1" ;;
	-h | --help | help) usage && return ;;
	*) usage >&2 && return 2 ;;
	esac

	((EUID == 0)) || die "root is needed to build guest images"
	mkdir -p "$cache"
	chmod 755 "$cache"
	make_key
	local name
	for name in "$@"; do
		image "$name"
	done
}

usage() {
	sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}

# make_key makes the key pair that every image admits, once.
make_key() {
	[[ -e $cache/id_rsa.pub ]] && return
	need_packages openssh-client
	(
		flock 9
		[[ -e $cache/id_rsa.pub ]] && exit
		rm -f "$cache/id_rsa.new" "$cache/id_rsa.new.pub"
		ssh-keygen -q -t rsa -b 3072 -N '' -C gitlab-runner -f "$cache/id_rsa.new"
		mv "$cache/id_rsa.new" "$cache/id_rsa"
		mv "$cache/id_rsa.new.pub" "$cache/id_rsa.pub" # last: its presence says that both are there
	) 9>"$cache/key.lock"
}

# image NAME: builds the image unless it is there, and prints where it is.
image() {
	local name=$1 dir
	dir=$cache/$name-$(recipe "$name")
	if [[ ! -d $dir ]]; then
		(
			flock 9
			[[ -d $dir ]] || build "$name" "$dir" 9>&-
		) 9>"$cache/$name.lock"
	fi
	touch "$dir" # images that nothing has used for a week are removed by build
	printf '%s %s\n' "$name" "$dir"
}

# recipe NAME: the hash of all that decides what the image holds.
recipe() {
	local files=("$here/images.sh" "$here/lib.sh" "$cache/id_rsa.pub" "$here/images/$1"/*)
	(architecture && sed '' "${files[@]}") | sha256sum | cut -c1-12
}

# build NAME DIR: builds the image in a temporary directory beside DIR and renames that to DIR.
build() {
	local name=$1 dir=$2 began=$SECONDS
	need_packages mmdebstrap kmod cpio e2fsprogs dosfstools mtools fdisk syslinux syslinux-common qemu-utils
	say "building the $name image"
	find "$cache" -maxdepth 1 -name "$name-*" -mtime +7 -exec rm -rf {} +

	# The build has process and mount namespaces of its own: when this script ends, however it ends,
	# so does everything that the build started and mounted.
	work=$(mktemp -d "$cache/build.XXXXXX")
	trap 'kill -KILL "${build:-}" 2>/dev/null || true; wait; rm -rf "$work"' EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM HUP
	setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child --mount-proc -- \
		bash -euo pipefail -c "source '$here/images.sh' && build_$name \"\$1\"" images.sh "$work" >"$work/log" 2>&1 </dev/null &
	build=$!
	if ! wait "$build"; then
		tail -n 40 "$work/log" >&2
		die "cannot build the $name image: see the lines above"
	fi
	chmod 755 "$work/out"
	mv "$work/out" "$dir"
	say "built the $name image in $((SECONDS - began)) s"
}

# debootstrap DIR OPTION...: mmdebstrap into DIR, from where this machine's apt gets Debian's packages.
debootstrap() {
	local dir=$1 sources=$work/sources.list conf=$work/apt.conf
	shift
	# A machine may have other sources too; only Debian's are wanted, whatever form they are written in.
	debian_sources >"$sources"
	[[ -s $sources ]] || { update_lists && debian_sources >"$sources"; }
	[[ -s $sources ]] || die "apt knows no source of Debian's packages: see /etc/apt/sources.list.d"
	# How to reach them (proxy, retries, timeouts, what is checked) is this machine's too.
	apt-config dump | grep -E '^Acquire::(http|https|ftp|Retries|Check-|AllowInsecure|Queue|Forced?IPv)' >"$conf" || true
	mmdebstrap --aptopt="$conf" "$@" "$(debian_codename)" "$dir" "$sources"
}

debian_codename() {
	(source /etc/os-release && echo "$VERSION_CODENAME")
}

debian_sources() {
	apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' \
		'Created-By: Packages' 'Origin: Debian' 'Component: main' "Architecture: $(architecture)" | grep " $(debian_codename)" | sort -u || true
}

# packages NAME: the packages of an image's recipe, with commas between.
packages() {
	sed 's/#.*//' "$here/images/$1/packages" | xargs | tr ' ' ,
}

# add_runner ROOT: lets the key in as user gitlab-runner.
add_runner() {
	local root=$1
	install -d -m 700 "$root/home/gitlab-runner/.ssh"
	install -m 600 "$cache/id_rsa.pub" "$root/home/gitlab-runner/.ssh/authorized_keys"
	chown -R 1000:1000 "$root/home/gitlab-runner"
}

# add_modules ROOT DEST MODULE...: copies the kernel's modules and what they depend on to DEST/modules,
# and their order to DEST/modules/order, for insmod.
add_modules() {
	local root=$1 dest=$2 version module path
	shift 2
	version=$(ls "$root/lib/modules")
	mkdir -p "$dest/modules"
	for module in "$@"; do
		modprobe --dirname "$root" --set-version "$version" --show-depends "$module"
	done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' >"$work/modules"
	while read -r path; do
		cp "$path" "$dest/modules/"
		basename "$path"
	done <"$work/modules" >"$dest/modules/order"
}

# pack ROOT FILE: ROOT as an initramfs. It is not compressed: emulated guests unpack slowly.
pack() {
	(cd "$1" && find . -print0 | sort -z | cpio --quiet --null --create --format newc --reproducible) >"$2"
}

build_debian() {
	work=$1
	local root=$work/root initramfs=$work/initramfs boot=$work/boot.fat disk=$work/disk.raw
	mkdir "$work/out"

	INITRD=No debootstrap "$root" --variant=minbase --include="$(packages debian)" \
		--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
		--customize-hook="$here/images/debian/customize"
	add_runner "$root"

	# The initramfs has one job: to find the root file system. Debian's own takes seconds of an emulated guest's boot.
	mkdir -p "$initramfs"/{bin,dev,proc,sys,root}
	cp "$root/bin/busybox" "$initramfs/bin/"
	install -m 755 "$here/images/debian/init" "$initramfs/init"
	add_modules "$root" "$initramfs" virtio_pci virtio_blk virtio_net virtio_rng

	# One FAT partition serves BIOS (syslinux) and UEFI (systemd-boot).
	truncate -s "${boot_size}M" "$boot"
	mkfs.vfat -F 16 -n BOOT -h $((boot_start * 2048)) "$boot" >/dev/null
	pack "$initramfs" "$work/initrd"
	mmd -i "$boot" ::EFI ::EFI/BOOT ::loader ::loader/entries
	mcopy -i "$boot" "$root"/boot/vmlinuz-* ::vmlinuz
	mcopy -i "$boot" "$work/initrd" ::initrd
	mcopy -i "$boot" "$here/images/debian/syslinux.cfg" ::syslinux.cfg
	mcopy -i "$boot" "$here/images/debian/loader.conf" ::loader/loader.conf
	mcopy -i "$boot" "$here/images/debian/entry.conf" ::loader/entries/debian.conf
	mcopy -i "$boot" "$root/usr/lib/systemd/boot/efi/systemd-bootx64.efi" ::EFI/BOOT/BOOTX64.EFI
	syslinux --install "$boot"
	rm -rf "$root"/boot/*

	truncate -s "$disk_size" "$disk"
	sfdisk --quiet "$disk" <<-END
		label: dos
		start=${boot_start}MiB, size=${boot_size}MiB, type=ef, bootable
		start=$((boot_start + boot_size))MiB, type=83
	END
	dd if=/usr/lib/syslinux/mbr/mbr.bin of="$disk" bs=440 count=1 conv=notrunc status=none
	dd if="$boot" of="$disk" bs=1M seek="$boot_start" conv=notrunc,sparse status=none

	# Tables are written out here rather than by the guest's kernel, behind its back, into every overlay.
	local root_start=$(((boot_start + boot_size) << 20))
	mke2fs -q -F -t ext4 -L root -d "$root" -E offset=$root_start,lazy_itable_init=0,lazy_journal_init=0 \
		"$disk" $((($(stat -c %s "$disk") - root_start) / 1024))k

	qemu-img convert -f raw -O qcow2 "$disk" "$work/out/disk.qcow2"
	chmod 444 "$work"/out/*
}

build_tiny() {
	work=$1
	local root=$work/root initramfs=$work/initramfs out=$work/out
	mkdir "$out"
	debootstrap "$root" --variant=extract --include="$(packages tiny)"

	mkdir -p "$initramfs"/{dev,proc,sys,run,root,etc/pam.d,home/gitlab-runner,usr/bin,usr/lib,usr/lib64} "$initramfs/usr/lib/x86_64-linux-gnu"
	install -d -m 1777 "$initramfs"/{tmp,var/tmp}
	ln -s usr/bin usr/lib usr/lib64 "$initramfs/"
	ln -s usr/bin "$initramfs/sbin"
	ln -s bin "$initramfs/usr/sbin"
	add_programs "$root" "$initramfs" /bin/busybox /bin/bash /usr/sbin/sshd /usr/bin/ssh-keygen /usr/sbin/qemu-ga \
		/usr/bin/sudo /usr/libexec/sudo/sudoers.so /lib/x86_64-linux-gnu/security/pam_permit.so
	add_modules "$root" "$initramfs" virtio_pci virtio_net virtio_blk virtio_rng virtio_console
	cp -r "$here/images/tiny/etc/." "$initramfs/etc/"
	chmod 755 "$initramfs"/etc/{rc,udhcpc,shutdown}
	chmod 440 "$initramfs/etc/sudoers"
	ln -s /etc/shutdown "$initramfs/usr/bin/shutdown"
	ln -s /usr/bin/busybox "$initramfs/init"
	local applet
	for applet in $("$initramfs/bin/busybox" --list); do
		[[ -e $initramfs/bin/$applet ]] || ln -s busybox "$initramfs/bin/$applet"
	done
	add_runner "$initramfs"

	cp "$root"/boot/vmlinuz-* "$out/vmlinuz"
	pack "$initramfs" "$out/initrd"
	qemu-img create -q -f qcow2 "$out/disk.qcow2" "$tiny_disk_size"
	chmod 444 "$out"/*
}

# add_programs ROOT DEST FILE...: copies programs and plug-ins with the libraries that they need.
add_programs() {
	local root=$1 dest=$2 file
	shift 2
	for file in "$@"; do
		echo "$file"
		chroot "$root" /lib64/ld-linux-x86-64.so.2 --list "$file" | grep -o '/[^ ]*' || true # busybox needs none
	done | sort -u | while read -r file; do
		mkdir -p "$dest/${file%/*}"
		cp --dereference --preserve=mode,ownership "$root$file" "$dest$file"
	done
}

[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
