# identity.sh: the part of the door, see door.sh, that makes a guest which has just been restored one of its own, and
# lets the job's SSH in. It is plain sh, and is called with user, made and sshd, its process, set.
#
# Right after the restore an emulated guest runs everything for the first time, and to start a program takes a quarter
# of a second. So all that can be done before the save is done there, and what follows the restore starts next to none.

# prepare does what can be done before the save.
prepare() {
	eval "home=~$user"
	keys=$home/.ssh/authorized_keys
	mask=$(umask)
	umask 077
	[ -d "$home/.ssh" ] || { mkdir -m 700 "$home/.ssh" && chown "$user:" "$home/.ssh"; }
	[ -f "$keys" ] || { : >"$keys" && chown "$user:" "$keys"; }
	umask "$mask"
	kept=
	while read -r line; do
		[ "$line" = "$made" ] || kept="$kept$line
"
	done <"$keys" || return

	# The servers that run have their keys in their memory.
	for file in /etc/ssh/ssh_host_*_key /etc/ssh/ssh_host_*_key.pub; do
		case $file in
		*/ssh_host_ed25519_key | */ssh_host_ed25519_key.pub) [ ! -L "$file" ] || rm -f "$file" ;;
		*) [ ! -e "$file" ] || rm -f "$file" ;;
		esac
	done

	# What the kernel draws once the guest is restored must follow from the seed, which the host draws for this machine
	# alone. To write the seed is not enough: the kernel takes it up when it sees fit, within a minute, or when it is
	# told to (RNDRESEEDCRNG of random(4)), which takes a program. It starts here, and waits for the seed.
	mkfifo -m 600 "$0.seed" "$0.sown" && exec 4<>"$0.seed" 6<>"$0.sown" && rm -f "$0.seed" "$0.sown" || return
	if command -v perl; then
		perl -e 'open(R, ">", "/dev/urandom") && sysread(STDIN, $_, 200) && syswrite(R, $_) && ioctl(R, 0x5207, 0) &&
			syswrite(STDOUT, "sown\n") or syswrite(STDOUT, "not sown\n")' <&4 >&6 4>&- 6>&- &
	elif command -v python3; then
		python3 -c 'import fcntl, os
try:
	with open("/dev/urandom", "wb", 0) as r: r.write(os.read(0, 200)); fcntl.ioctl(r, 0x5207); os.write(1, b"sown\n")
finally: os.write(1, b"not sown\n")' <&4 >&6 4>&- 6>&- &
	else
		noticed <&4 >&6 4>&- 6>&- &
	fi
}

# noticed is for a guest with nothing to tell its kernel with: with vmgenid it has noticed by itself that it runs anew.
noticed() {
	read -r seed
	echo "$seed" >/dev/urandom
	tries=0
	until dmesg | grep -q 'virtual machine fork'; do
		tries=$((tries + 1))
		[ "$tries" -lt 50 ] || break
		sleep 0.1
	done
	[ "$tries" -ge 50 ] || echo sown
	echo 'not sown'
}

# hear hears from the host what to become.
hear() {
	read -r clock || exit
	set_clock </dev/null >/dev/null 2>&1 &
	setting=$!
	read -r seed
	echo "$seed" >&4
	read -r machine_id
	read -r name
	read -r patience
	read -r authorized
	read -r host_public
	host_private=
	until [ "$line" = '-----END OPENSSH PRIVATE KEY-----' ]; do
		read -r line || exit
		host_private="$host_private$line
"
	done
}

# set_clock sets the clock to what the host said, and what has passed since it was greeted.
set_clock() {
	read -r now rest </proc/uptime
	passed=$((${now%.*}${now#*.} - ${greeted%.*}${greeted#*.})) # in hundredths
	now=$((${clock%.*}${clock#*.} + passed * 10000))           # in millionths
	seconds=${now%??????}
	date -s "@$seconds.${now#"$seconds"}" || date -s "@$seconds"
}

shut() {
	echo "$*" >&3
	exit 1
}

# become becomes that, and lets the server go on once what it draws is the machine's own: it exchanges keys meanwhile.
# Errors go to the host, on 3.
become() {
	read -r sown <&6
	[ "$sown" = sown ] || shut 'the kernel was not seeded anew'
	kill -CONT "$sshd"
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
	echo "$host_public" >/etc/ssh/ssh_host_ed25519_key.pub
	umask 077
	echo "$host_private" >/etc/ssh/ssh_host_ed25519_key || shut 'the host key cannot be written'
	umask "$mask"
	echo "$kept$authorized" >"$keys" || shut "$keys cannot be written"
	wait "$setting" || shut 'the clock cannot be set'
	network 3>&- 4>&- 6>&- &
}

# network makes ready for a network that does not answer yet, and tells what answers on it who it is.
network() {
	set_clock & # once more: the first time date itself took long to start

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
