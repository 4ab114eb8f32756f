#!/usr/bin/env bash
# fuzz.sh: runs every fuzz target of the project, as many at a time as there are processors.
#
# usage: integration/fuzz.sh [DURATION [TARGET]]
#
# Each target runs for DURATION (60s), on one of them. TARGET is a regular expression that picks targets by name. A line
# per target says how many inputs were tried, how many of them led to something new, and what was found, if anything:
# the input is in the file that is named then, and go test runs it from now on. Exits with 1 when there is a finding.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

duration=${1:-60s}
wanted=${2:-.}
module=$(go list -m)
cache=$(go env GOCACHE)/fuzz # where go test -fuzz keeps what led to something new
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

# try FOLDER TARGET: runs a target of the folder's package and prints its line.
try() {
	local folder=$1 package=${1#./} target=$2 status=0 inputs new finding=none log
	log=$(mktemp -p "$build")
	# A shell without job control starts what it does not wait for with SIGINT ignored.
	(cd "$folder" && exec nice env --default-signal=INT "$build/$package/fuzz.test" -test.run "^$target\$" -test.fuzz "^$target\$" -test.fuzztime "$duration" \
		-test.fuzzcachedir "$cache/$module/$package" -test.parallel 1 -test.fuzzminimizetime 500x) >"$log" 2>&1 || status=$?
	# The last line of progress: fuzz: elapsed: 3s, execs: 4711 (1570/sec), new interesting: 3 (total: 20)
	read -r inputs new < <(sed -nE 's/.*execs: ([0-9]+) .*new interesting: ([0-9]+).*/\1 \2/p' "$log" | tail -n 1) || inputs='' new=''
	# Before Go 1.27 the end of the time itself is now and then taken for a failure: https://go.dev/issue/75804
	if ! grep -q 'Failing input written' "$log" && grep -qx '    context deadline exceeded' "$log"; then
		status=0
	fi
	if ((status != 0)); then
		finding=$(sed -nE "s|.*(testdata/fuzz/$target/[^ ]+).*|$package/\1|p" "$log" | head -n 1)
		finding=${finding:-see below}
		echo "$package $target" >>"$build/findings"
	fi
	printf '%-20s %-20s %12s %8s  %s\n' "$package" "$target" "${inputs:-0}" "${new:-0}" "$finding"
	((status == 0)) || sed 's/^/    /' "$log" >&2
}

targets=0
printf '%-20s %-20s %12s %8s  %s\n' package target inputs new finding
# shellcheck disable=SC2046 # names of folders without spaces
for folder in $(dirname $(grep -rl --include='*_test.go' '^func Fuzz' .) | sort -u); do
	mkdir -p "$build/$folder"
	# One build for all targets of the package; go test would link anew for each.
	go test -c -fuzz=Fuzz -o "$build/$folder/fuzz.test" "$folder"
	for target in $("$build/$folder/fuzz.test" -test.list '^Fuzz'); do
		[[ $target =~ $wanted ]] || continue
		targets=$((targets + 1))
		while (($(jobs -rp | wc -l) >= $(nproc))); do wait -n || true; done
		try "$folder" "$target" &
	done
done
wait
touch "$build/findings"
findings=$(wc -l <"$build/findings")
((targets > 0)) || { echo "fuzz.sh: there is no target $wanted" >&2; exit 1; }
echo "fuzz.sh: $targets targets, $duration each, $findings findings"
((findings == 0))
