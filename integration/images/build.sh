# shellcheck shell=bash
# build.sh: what the images' builds share. It is sourced by NAME/build WORK; WORK is a temporary directory.

work=$1
# shellcheck source=integration/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

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
	sed -n 's/^VERSION_CODENAME=//p' /etc/os-release
}

debian_sources() {
	# shellcheck disable=SC2016 # apt's own variables
	apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' \
		'Created-By: Packages' 'Origin: Debian' 'Component: main' "Architecture: $(architecture)" | grep " $(debian_codename)" | sort -u || true
}

# packages FILE: the packages that FILE lists, with commas between.
packages() {
	sed 's/#.*//' "$1" | xargs | tr ' ' ,
}

# add_runner ROOT: lets the keys in as user gitlab-runner.
add_runner() {
	local root=$1
	install -d -m 700 "$root/home/gitlab-runner/.ssh"
	cat "$cache"/id_*.pub >"$root/home/gitlab-runner/.ssh/authorized_keys"
	chmod 600 "$root/home/gitlab-runner/.ssh/authorized_keys"
	chown -R 1000:1000 "$root/home/gitlab-runner"
}

# add_modules ROOT DEST MODULE...: copies the kernel's modules and what they depend on to DEST/modules,
# and their order to DEST/modules/order, for insmod.
add_modules() {
	local root=$1 dest=$2 version module path
	shift 2
	version=$(ls "$root/lib/modules")
	depmod --basedir "$root" "$version" # a kernel package that is only unpacked has no list of dependencies
	mkdir -p "$dest/modules"
	for module in "$@"; do
		modprobe --dirname "$root" --set-version "$version" --show-depends "$module"
	done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' >"$work/modules"
	while read -r path; do
		cp "$path" "$dest/modules/"
		basename "$path"
	done <"$work/modules" >"$dest/modules/order"
}

# unpack_kernel BZIMAGE FILE: the kernel in it, which it would unpack when it boots. On an emulated guest that takes
# most of a second. Where it is and how long: https://www.kernel.org/doc/html/latest/arch/x86/boot.html
unpack_kernel() {
	local sectors offset length
	sectors=$(od -An -tu1 -j $((0x1f1)) -N 1 "$1")
	offset=$(od -An -tu4 -j $((0x248)) -N 4 "$1")
	length=$(od -An -tu4 -j $((0x24c)) -N 4 "$1")
	# The last four bytes are its unpacked length.
	dd if="$1" bs=1M iflag=skip_bytes,count_bytes skip=$(((sectors + 1) * 512 + offset)) count=$((length - 4)) status=none |
		lz4 --decompress >"$2"
}

# pack ROOT FILE: ROOT as an initramfs. It is not compressed: emulated guests unpack slowly.
pack() {
	(cd "$1" && find . -print0 | sort -z | cpio --quiet --null --create --format newc --reproducible) >"$2"
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
