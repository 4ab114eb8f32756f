# Ends the processes of one run, round by round.
#
# Standard input: the marker of the run and how old it is at most, in hundredths
# of a second, then one word per line. For each word the processes of the run that
# are alive are looked up, and the answer is a line with their number. If the word
# is TERM or KILL, they are sent that signal first.
#
# A process belongs to the run when the marker is in its environment (or in its
# command line, as in that of the login shell that starts a run), when its parent
# belongs to it, or when its session leader does or did. So children that went
# into the background, into a session of their own or over to init are found too.
# What is older than the run does not belong to it.
#
# Nothing is used but sh and /proc, and sudo if it is there and asks nothing.
# The text is handed over between single quotes and must not have any.

read -r mark age || exit
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

# Linux counts in hundredths from its boot when a process started. The oldest
# start that can be of the run:
slurp /proc/$$/stat
set -- ${text##*) } # what follows the name, which may contain anything
oldest=$((${20:-0} - age))

# list sets $procs to pid:parent:session:start of each process that is young
# enough, but this one, the server above it, and the dead that nobody waited for.
list() {
	procs=
	for dir in /proc/[0-9]*; do
		slurp "$dir/stat"
		pid=${dir#/proc/}
		set -- ${text##*) }
		case $1 in "" | Z | X) continue ;; esac
		[ "${20}" -ge "$oldest" ] || continue
		[ "$pid" = $$ ] || [ "$pid" = "$PPID" ] || procs="$procs $pid:$2:$4:${20}"
	done
}

# find sets $found to pid:parent of each process of the run.
find() {
	list
	found= first=1 grown=1
	while [ -n "$grown" ]; do
		grown= others=
		for proc in $procs; do
			pid=${proc%%:*}
			start=${proc##*:}
			sid=${proc#*:}
			ppid=${sid%%:*}
			sid=${sid#*:}
			sid=${sid%%:*}
			case $seen in *" $pid:$start "*) found="$found $pid:$ppid" && continue ;; esac
			case $pids in
			*" $ppid "* | *" $sid "*) ;;
			*) [ -n "$first" ] && marked "$pid" || { others="$others $proc" && continue; } ;;
			esac
			found="$found $pid:$ppid" grown=1
			pids="$pids$pid "
			seen="$seen$pid:$start "
		done
		procs=$others first=
	done
}

# signal NAME sends it to the processes of the run, to parents before their
# children: a shell whose child gets it first would go on to its next command.
signal() {
	rest=$found foreign=
	while [ -n "$rest" ]; do
		later=
		for proc in $rest; do
			pid=${proc%%:*}
			case "$rest " in *" ${proc#*:}:"*) later="$later $proc" && continue ;; esac
			kill -s "$1" "$pid" || [ ! -d "/proc/$pid" ] || foreign="$foreign $pid"
		done
		[ "$later" != "$rest" ] || break # no order in a snapshot that is not from one moment
		rest=$later
	done
	[ -z "$foreign" ] || sudo -n sh -c "kill -s $1 $foreign"
} </dev/null >/dev/null 2>&1

while read -r word; do
	find
	case $word in TERM | KILL) signal "$word" ;; esac
	set -- $found
	echo "alive $#"
done
