#!/usr/bin/env bash
# bench.sh: measures the driver and the scripts of GitLab's documentation page side by side.
#
# usage: integration/bench.sh [--baseline FOLDER] [-n N] [--markdown FILE] [--virt-type qemu|kvm]
#
#   --baseline FOLDER  the scripts prepare.sh, run.sh, cleanup.sh and base.sh of
#                      https://docs.gitlab.com/runner/executors/custom_examples/libvirt/, executable, with
#                      --virt-type "${VIRT_TYPE:-kvm}" among virt-install's arguments in prepare.sh.
#                      Without it: ../shared/baseline beside the checkout.
#   -n N               how many jobs of each side count (7). From 20 on the report has percentiles, too.
#   --markdown FILE    writes the report to FILE, too, as Markdown.
#   --virt-type TYPE   how the guests run: qemu (emulated, the default: that works everywhere) or kvm.
#
# As root on a Debian 12 machine with Go. It builds the driver as releases are built, starts a private libvirt host
# (host.sh, which installs packages and builds guest images when they are missing), and there runs whole jobs of both
# sides in turns (baseline, driver; driver, baseline; ...): config where there is one, prepare, run for eight sub-stages
# whose script does nothing, cleanup. Before cleanup, and beside the job, the eight are run once more when the guest has
# had 5 s to finish its boot. The first job of each side does not count, the next N do, all of them; one more of each is
# traced for the processes and the memory that it takes, and not timed. With emulated guests on two cores that nothing
# else uses it all takes about N minutes and two.
#
# The report on standard output has, for every figure, both sides' medians and spread, their ratio, and whether the
# driver's target is met. prepare is also taken apart from outside: libvirt's event that the guest has started, the DHCP
# server's answer, and the first answer of the guest's SSH port, which is asked every 20 ms in a way that its SSH server
# does not notice. What is left is not the guest's doing. Nothing remains on the host but packages and the images' cache.
# Exits 0 when everything could be measured, whatever came of it.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

main() {
	local baseline='' arguments=()
	while (($#)); do
		case $1 in
		--baseline)
			(($# > 1)) || { usage >&2 && exit 2; }
			baseline=$2
			shift
			;;
		-n | --markdown | --virt-type)
			(($# > 1)) || { usage >&2 && exit 2; }
			arguments+=("$1" "$2")
			shift
			;;
		-h | --help | help) usage && exit ;;
		*) usage >&2 && exit 2 ;;
		esac
		shift
	done
	check_baseline "${baseline:=$here/../../shared/baseline}"

	build=$(mktemp -d)
	trap 'rm -rf "$build"' EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM HUP
	export CGO_ENABLED=0
	local version
	version=$(git -C "$here" describe --tags --always --dirty 2>/dev/null || echo devel)
	(cd "$here/.." && go build -trimpath -ldflags "-s -w -X main.version=$version" -o "$build/libvirt-driver" .)
	(cd "$here/.." && go build -trimpath -o "$build/bench" ./integration/bench)

	"$here/host.sh" run -- "$build/bench" --driver "$build/libvirt-driver" --baseline "$baseline" "${arguments[@]}"
}

usage() {
	sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}

# check_baseline FOLDER: says what is missing there, before anything is built.
check_baseline() {
	local script missing=()
	for script in prepare.sh run.sh cleanup.sh base.sh; do
		[[ -r $1/$script && (-x $1/$script || $script == base.sh) ]] || missing+=("$script")
	done
	((${#missing[@]})) || return 0
	echo "${0##*/}: the baseline folder $1 lacks ${missing[*]}: it must hold prepare.sh, run.sh, cleanup.sh (executable)" \
		"and base.sh from https://docs.gitlab.com/runner/executors/custom_examples/libvirt/: see ${0##*/} --help" >&2
	exit 1
}

main "$@"
