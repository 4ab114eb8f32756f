# identity.sh: makes a guest that has just been restored one of its own, and lets the job's SSH in. root's shell at the
# door gets it from the host, after lines that set: clock, seed, name, machine_id, host_private, host_public, user,
# made, authorized, patience; sshd is the door's SSH server. It is plain sh.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

shut() {
	echo "$*" >&3
	exit 1
}

# What the kernel draws next must follow from the seed, which the host drew for this machine alone. To write the seed
# is not enough: the kernel takes it up when it sees fit, within a minute, or when it is told to (RNDRESEEDCRNG of
# random(4)). Where nothing here can tell it, it has noticed by itself, with vmgenid, that it runs anew.
reseed() {
	echo "$seed" >/dev/urandom
	perl -e 'open(R, ">", "/dev/urandom") && ioctl(R, 0x5207, 0) or exit 1' && return
	python3 -c 'import fcntl; fcntl.ioctl(open("/dev/urandom", "wb"), 0x5207)' && return
	tries=0
	until dmesg | grep -q 'virtual machine fork'; do
		tries=$((tries + 1))
		[ "$tries" -lt 50 ] || return 1
		sleep 0.1
	done
}

identity() {
	# Right after the restore an emulated guest takes a tenth of a second or more to start a program. So two go on by
	# themselves, and what follows starts none where it can do without.
	{ date -s "@$clock" || date -s "@${clock%.*}"; } &
	setting=$! # first: the clock goes on meanwhile
	reseed &
	seeding=$!

	echo "$name" >/proc/sys/kernel/hostname
	echo "$name" >/etc/hostname
	# sudo asks for its own name, and what logs logins for the SSH client's, which is UNKNOWN behind the door. The network
	# may not answer yet.
	echo "127.0.1.1 $name UNKNOWN" >>/etc/hosts
	for file in /etc/machine-id /var/lib/dbus/machine-id; do
		if [ -f "$file" ] && [ ! -L "$file" ]; then
			echo "$machine_id" >"$file" || shut "$file cannot be written"
		fi
	done

	for file in /etc/ssh/ssh_host_*_key /etc/ssh/ssh_host_*_key.pub; do
		case $file in
		*/ssh_host_ed25519_key | */ssh_host_ed25519_key.pub) [ ! -L "$file" ] || rm -f "$file" ;;
		*) [ ! -e "$file" ] || rm -f "$file" ;;
		esac
	done
	echo "$host_public" >/etc/ssh/ssh_host_ed25519_key.pub
	mask=$(umask)
	umask 077
	echo "$host_private" >/etc/ssh/ssh_host_ed25519_key || shut 'the host key cannot be written'
	eval "home=~$user"
	keys=$home/.ssh/authorized_keys
	[ -d "$home/.ssh" ] || { mkdir -m 700 "$home/.ssh" && chown "$user:" "$home/.ssh"; }
	[ -f "$keys" ] || { : >"$keys" && chown "$user:" "$keys"; }
	umask "$mask"
	kept=
	while read -r line; do
		[ "$line" = "$made" ] || kept="$kept$line
"
	done <"$keys"
	echo "$kept$authorized" >"$keys" || shut "$keys cannot be written"
	wait "$setting" || shut 'the clock cannot be set'
	wait "$seeding" || shut 'the kernel was not seeded anew'
	network 3>&- &
}

# network makes ready for a network that does not answer yet, and tells what answers on it who it is.
network() {
	# The bridge of the network may say nothing to a new port for some seconds. Until it does, packets wait for the
	# answer to a question that is asked again and again, rather than being lost.
	for dir in /proc/sys/net/ipv4/neigh/*; do
		nic=${dir##*/}
		case $nic in
		default | lo) ;;
		*)
			echo 100 >"$dir/retrans_time_ms"
			echo 600 >"$dir/mcast_solicit"
			ip neigh flush dev "$nic"
			;;
		esac
	done
	sleep "$patience"
	read -r server </run/sshd.pid && kill -HUP "$server" || pkill -HUP -o -x sshd

	sleep 60
	for dir in /proc/sys/net/ipv4/neigh/*; do
		echo 1000 >"$dir/retrans_time_ms"
		echo 3 >"$dir/mcast_solicit"
	done
}

exec 3>&1
identity </dev/null >/dev/null 2>&1
echo 'libvirt-driver: open'
kill -CONT "$sshd"
exit
