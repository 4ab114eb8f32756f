# shellcheck shell=bash
# lib.sh: what host.sh and images.sh share. It is sourced, never run.

# Everything that outlives a run (images, SSH key) is here; nothing of it is in the checkout.
cache=${LIBVIRT_DRIVER_CACHE:-/var/cache/libvirt-driver}

# say prints one line about what is going on; stdout belongs to the callers' results.
say() {
	printf '%s: %s\n' "${0##*/}" "$*" >&2
}

die() {
	say "$*"
	exit 1
}

# need_packages PACKAGE...: installs those of them that are missing, and starts none of their services.
need_packages() {
	local missing=() package
	for package in "$@"; do
		[[ -e /var/lib/dpkg/info/$package.list || -e /var/lib/dpkg/info/$package:$(architecture).list ]] || missing+=("$package")
	done
	((${#missing[@]})) || return 0
	((EUID == 0)) || die "cannot install ${missing[*]}: not root"

	say "installing ${missing[*]}"
	mkdir -p "$cache"
	# The package lists may be absent (fresh container images) or name versions that the mirror has dropped.
	local log
	log=$(mktemp)
	exec 6>"$cache/packages.lock"
	flock 6
	if ! { install_packages "${missing[@]}" || { update_lists && install_packages "${missing[@]}"; }; } >"$log" 2>&1; then
		tail -n 40 "$log" >&2
		rm -f "$log"
		die "cannot install ${missing[*]}: see the lines above"
	fi
	exec 6>&-
	rm -f "$log"
}

# install_packages PACKAGE...: apt-get install with a policy that forbids every service start. The policy is
# mounted in a mount namespace of apt's own, so that the host's own policy, if any, stays as it is.
install_packages() {
	local policy=/usr/sbin/policy-rc.d forbid made='' status=0
	forbid=$(mktemp)
	printf '#!/bin/sh\nexit 101\n' >"$forbid"
	chmod 755 "$forbid"
	[[ -e $policy ]] || { touch "$policy" && made=1; }
	# shellcheck disable=SC2016 # the inner shell's own parameters
	DEBIAN_FRONTEND=noninteractive unshare --mount -- bash -euc '
		mount --bind "$1" "$2"; shift 2
		exec apt-get install --yes --quiet=2 --no-install-recommends "$@" </dev/null
	' install "$forbid" "$policy" "$@" || status=$?
	[[ -z $made ]] || rm -f "$policy"
	rm -f "$forbid"
	return "$status"
}

update_lists() {
	apt-get update --quiet=2 </dev/null
}

architecture() {
	dpkg --print-architecture
}
