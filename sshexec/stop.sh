# Ends the processes of one run, round by round.
#
# Standard input: the marker of the run, then one signal name per line. For each
# the processes of the run that are alive are looked up. KILL goes to all of them,
# any other signal only to those that no earlier round knew. The answer is a line
# with their number from before the signal.
#
# A process belongs to the run when the marker is in its environment (or in its
# command line, as in that of the login shell that starts a run), when its parent
# belongs to it, or when its session leader does or did. So children that went
# into the background, into a session of their own or over to init are found too.
#
# Nothing is used but sh and /proc, and sudo if it is there and asks nothing.
# The text is handed over between single quotes and must not have any.

IFS= read -r mark || exit
pids=" "  # the pids of all processes found in any round
seen=" "  # the same as pid:start, which outlives the reuse of a pid

# slurp FILE puts its text, without NULs and with spaces for newlines, into $text.
slurp() {
	text=
	while IFS= read -r part || [ -n "$part" ]; do text="$text$part "; done <"$1"
} 2>/dev/null

# marked PID says whether a process carries the marker.
marked() {
	slurp "/proc/$1/environ"
	case $text in *"LIBVIRT_DRIVER_RUN=$mark"*) return 0 ;; esac
	slurp "/proc/$1/cmdline"
	case $text in *"LIBVIRT_DRIVER_RUN=$mark"*) return 0 ;; esac
	return 1
}

# list sets $procs to pid:parent:session:start of each process but this one, the
# server above it, and the dead that nobody has waited for.
list() {
	procs=
	for dir in /proc/[0-9]*; do
		slurp "$dir/stat"
		pid=${dir#/proc/}
		set -- ${text##*) } # what follows the name, which may contain anything
		case $1 in "" | Z | X) continue ;; esac
		[ "$pid" = $$ ] || [ "$pid" = "$PPID" ] || procs="$procs $pid:$2:$4:${20}"
	done
}

# find sets $found to the pids of the run, and $fresh to those found just now.
find() {
	list
	found= fresh= first=1 grown=1
	while [ -n "$grown" ]; do
		grown= others=
		for proc in $procs; do
			pid=${proc%%:*}
			start=${proc##*:}
			sid=${proc#*:}
			ppid=${sid%%:*}
			sid=${sid#*:}
			sid=${sid%%:*}
			case $seen in *" $pid:$start "*) found="$found $pid" && continue ;; esac
			case $pids in
			*" $ppid "* | *" $sid "*) ;;
			*) [ -n "$first" ] && marked "$pid" || { others="$others $proc" && continue; } ;;
			esac
			found="$found $pid" fresh="$fresh $pid" grown=1
			pids="$pids$pid "
			seen="$seen$pid:$start "
		done
		procs=$others first=
	done
}

while read -r sig; do
	find
	foreign=
	[ "$sig" = KILL ] && targets=$found || targets=$fresh
	for pid in $targets; do
		kill -s "$sig" "$pid" 2>/dev/null || [ ! -d "/proc/$pid" ] || foreign="$foreign $pid"
	done
	[ -z "$foreign" ] || sudo -n sh -c "kill -s $sig $foreign" </dev/null >/dev/null 2>&1
	set -- $found
	echo "alive $#"
done
