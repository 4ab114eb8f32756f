# guest.sh: what the doctor asks of a guest. It is plain sh, and prints a line "NAME ANSWER" for each thing that is so.
echo "clock $(date +%s.%N)"

answer() {
	name=$1
	shift
	text=$("$@" 2>/dev/null </dev/null) && text=$(echo "$text" | head -n 1) && echo "$name $text"
}

# As the runner's scripts find programs: by the PATH of a login without a terminal.
answer bash bash -c 'echo "$BASH_VERSION"'
answer git git --version
answer git-lfs git lfs version
command -v gitlab-runner >/dev/null && echo "gitlab-runner $(gitlab-runner --version 2>/dev/null </dev/null | sed -n 's/^Version: *//p')"
root=
answer sudo sudo -n echo yes && root='sudo -n'

echo "root $(awk '$2 == "/" { type = $3 } END { print type }' /proc/mounts)"

# When the system started, by its own clock at that time: a file that is older was in the image. systemd has noted it;
# elsewhere the kernel works it out from the clock as it is now.
began=$($root systemctl show --timestamp=unix --value --property KernelTimestamp 2>/dev/null </dev/null)
case $began in
@[0-9]*) echo "began ${began#@}" ;;
*) echo "began $(awk '$1 == "btime" { print $2 }' /proc/stat)" ;;
esac

# made FILE: when a file was made. What an initramfs brings has changed when that was unpacked, but its content is as old
# as it says.
made() {
	stat -c '%Y %Z' "$1" | awk '{ print ($1 < $2 ? $1 : $2) }'
}
if [ -s /etc/machine-id ]; then
	echo "machine-id $(made /etc/machine-id) $(cat /etc/machine-id)"
fi
for key in /etc/ssh/ssh_host_*_key; do
	[ ! -e "$key" ] || echo "host-key $(made "$key") $key"
done

$root /usr/sbin/sshd -T 2>/dev/null </dev/null | awk '{ print "sshd " $0 }' | grep -i -E '^sshd (usedns|gssapiauthentication) yes'

# What is known to make boots slow, and no job needs: docs/how-to/guest-image.md has the figures.
grep -q -w quiet /proc/cmdline || echo 'costs console'
case $(uname -r) in
*cloud* | *virtual* | *kvm*) ;;
*) [ ! -e /etc/debian_version ] || echo "costs kernel $(uname -r)" ;; # elsewhere there is no other
esac
[ "$(cat /proc/sys/kernel/randomize_va_space)" = 0 ] || echo 'costs addresses'
systemctl list-unit-files --no-legend --state=enabled 2>/dev/null </dev/null \
	cloud-init.service cloud-init-network.service NetworkManager-wait-online.service systemd-networkd-wait-online.service \
	snapd.service unattended-upgrades.service apt-daily.timer apt-daily-upgrade.timer man-db.timer |
	awk '{ print "costs unit " $1 }'

answer boot $root systemd-analyze time
$root systemd-analyze blame --no-pager 2>/dev/null </dev/null | head -n 3 | sed 's/^ */slow /'
exit 0
