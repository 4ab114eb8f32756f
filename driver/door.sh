# door.sh: puts a door into a guest that is about to be saved: a shell of root's and an SSH server that wait at channels
# of the machine's until the host connects to them, which the host does once the guest has been restored. It is plain
# sh. It is called with the user who is to log in then, and a public key that is not to be let in any more.
root=
[ "$(id -u)" = 0 ] || root='sudo -n'
exec $root sh -s -- "$1" "$2" <<'ROOT'
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
refuse() {
	echo "$*" >&2
	exit 1
}
for port in /sys/class/virtio-ports/*; do
	if read -r name <"$port/name"; then
		case $name in
		org.libvirt-driver.door) server=/dev/${port##*/} ;;
		org.libvirt-driver.door.shell) shell=/dev/${port##*/} ;;
		esac
	fi
done 2>/dev/null
[ -c "$server" ] && [ -c "$shell" ] || refuse 'it has no devices for the channels: does its kernel have virtio_console?'
command -v sshd >/dev/null || refuse 'it has no sshd, OpenSSH'"'"'s server'

# Guests that are restored from one memory would draw the same random numbers, but for one of these. See identity.sh.
modprobe -q vmgenid 2>/dev/null
[ -d /sys/bus/acpi/drivers/vmgenid ] || [ -d /sys/bus/platform/drivers/vmgenid ] ||
	command -v perl >/dev/null || command -v python3 >/dev/null ||
	refuse 'it has no perl, no python3, and no vmgenid in its kernel: guests from one memory would draw the same random numbers'

# What has not started yet would start in every job's time.
if [ -d /run/systemd/system ]; then
	timeout 120 systemctl is-system-running --wait >/dev/null 2>&1 </dev/null
fi

# A write to a channel waits, in the kernel, until the host is connected: the SSH server's first, and the shell's. The
# server stands still by then, until the shell lets it go on, since what it draws is to be its own. The shell says that
# it is there to the one who waits for it here, and then to the host, and hears from it what to become. It is the one in
# the background since that ignores SIGINT, and the jobs' processes must not.
door=/run/libvirt-driver-door
rm -f "$door.ready" "$door.shut"
cat >"$door" <<'DOOR'
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
user=$3 made=$4
exec 3<>"$1" 5<>"$2" 2>/dev/null
sshd=$$

# identity.sh

{
	sleep 3
	kill -STOP "$sshd"
	prepare </dev/null >/dev/null 2>"$0.shut" || exit
	echo >"$0.ready"
	echo 'libvirt-driver: the door'
	read -r greeted rest </proc/uptime
	hear
	become </dev/null 3>&1 >/dev/null 2>&1
	echo 'libvirt-driver: open'
	exit
} <&5 >&5 3>&- 5>&- &
exec "$(command -v sshd)" -i -o LoginGraceTime=600 <&3 >&3 3>&- 5>&-
DOOR
systemd-run --quiet --collect -p KillMode=process -p TasksMax=infinity -p OOMPolicy=continue \
	sh "$door" "$server" "$shell" "$1" "$2" >/dev/null 2>&1 </dev/null || setsid sh "$door" "$server" "$shell" "$1" "$2" >/dev/null 2>&1 </dev/null &
tries=0
until [ -e "$door.ready" ]; do
	tries=$((tries + 1))
	[ "$tries" -lt 200 ] || refuse "nothing could be started that waits at $shell: $(cat "$door.shut" 2>/dev/null)"
	sleep 0.1
done
rm -f "$door" "$door.ready" "$door.shut"
sync
ROOT
