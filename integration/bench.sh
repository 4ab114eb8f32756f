#!/usr/bin/env bash
# bench.sh: measures the driver and the scripts of GitLab's documentation page side by side.
#
# usage: integration/bench.sh [--baseline FOLDER] [-n N] [--ways WAYS] [--tail N] [--many NUMBERS]
#                             [--markdown FILE] [--virt-type qemu|kvm]
#
#   --baseline FOLDER  the scripts prepare.sh, run.sh, cleanup.sh and base.sh of
#                      https://docs.gitlab.com/runner/executors/custom_examples/libvirt/, executable,
#                      with --virt-type "${VIRT_TYPE:-kvm}" among virt-install's arguments in
#                      prepare.sh. Without it: ../shared/baseline beside the checkout.
#   -n N               how many jobs of each side count (7). From 20 on the report has percentiles,
#                      too. 0 compares nothing, and is for --tail and --many alone.
#   --ways WAYS        which ways of the driver to measure beside the baseline (boot,standby,memory):
#                        boot     prepare boots the machine: the defaults
#                        standby  the service has booted it before: standby = 1
#                        memory   prepare starts it from memory: start = "memory"
#                      Their key is an Ed25519 one, as an RSA key costs 11 ms of processor time a job;
#                      the scripts have theirs, /root/.ssh/id_rsa.
#   --tail N           runs N jobs more of each way, without the baseline and without runs at rest,
#                      for percentiles of the driver's own: 50 is a good number.
#   --many NUMBERS     runs so many jobs at once, as 1,4,16, each with a tiny guest that it boots;
#                      without it, none.
#   --markdown FILE    writes the report to FILE, too, as Markdown.
#   --virt-type TYPE   how the guests run: qemu (emulated, the default: that works everywhere) or kvm.
#
# As root on a Debian 12 machine with Go. It builds the driver as releases are built, starts a private
# libvirt host (host.sh, which installs packages and builds guest images when they are missing), and
# there runs whole jobs of all sides in turns (baseline, boot, standby, memory; boot, standby, memory,
# baseline; ...): config where there is one, prepare, run for eight sub-stages whose script does
# nothing, cleanup. Before cleanup, and beside the job, the eight are run once more when the guest has
# had 5 s to finish its boot, and then a script that writes a line. The first job of each side does
# not count, and makes what start = "memory" starts from; the next N do, all of them; one more of each
# is traced for the processes and the memory that it takes, and not timed. The service of standby is
# started for each of its jobs, which begins when a machine stands ready, and ended and drained after
# it, so that no other job meets it; its runs at rest wait until the next machine stands ready, too.
# With emulated guests on two cores that nothing else uses the baseline and boot take about half a
# minute a job each.
#
# The report on standard output has, for every figure, the baseline's median, each way's with its
# ratio to that, and which of the driver's targets are met. How the figures are obtained:
#
#   - prepare is taken apart from outside: libvirt's event that the guest has started, the packets on
#     the guests' bridge (DHCP; what SSH says before it encrypts), and the first answer of the guest's
#     SSH port, which is asked every 20 ms in a way that its SSH server does not notice. What is left
#     is not the guest's doing.
#   - The driver reaches libvirtd through a socket of the bench's, which counts and times its calls.
#     What that costs, some hundredths of a millisecond a call, is on the driver's side of every
#     figure.
#   - The driver's processor time is that of its calls, as the kernel tells who waits for a process;
#     of the finisher, for which the bench waits when its parent has ended; and of the keeper, by its
#     clock just before cleanup ends it, without the runs at rest. The service of standby is not in it
#     and has a line of its own. libvirtd and QEMU are in no side's.
#   - Peak memory is what the kernel notes of each process, of the traced jobs' calls and of what the
#     others leave behind.
#
# With --many a batch of each size runs twice: timed, and traced for its memory. A figure "a job" is
# the batch's divided by its jobs: what the driver does for one must not depend on how many there are.
#
# Nothing remains on the host but packages and the images' cache. Exits 0 when everything could be
# measured, whatever came of it.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

main() {
	local baseline='' rounds='' arguments=()
	while (($#)); do
		case $1 in
		--baseline)
			(($# > 1)) || { usage >&2 && exit 2; }
			baseline=$2
			shift
			;;
		-n | --ways | --tail | --many | --markdown | --virt-type)
			(($# > 1)) || { usage >&2 && exit 2; }
			arguments+=("$1" "$2")
			[[ $1 != -n ]] || rounds=$2
			shift
			;;
		-h | --help | help) usage && exit ;;
		*) usage >&2 && exit 2 ;;
		esac
		shift
	done
	: "${baseline:=$here/../../shared/baseline}"
	[[ $rounds == 0 ]] || check_baseline "$baseline"

	build=$(mktemp -d)
	trap 'rm -rf "$build"' EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM HUP
	export CGO_ENABLED=0
	local version
	version=$(git -C "$here" describe --tags --always --dirty 2>/dev/null || echo devel)
	(cd "$here/.." && go build -tags urfave_cli_no_docs -trimpath -ldflags "-s -w -X main.version=$version" -o "$build/libvirt-driver" .)
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
