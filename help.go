package main

// The texts of --help. They are read in a terminal of 100 columns.

const description = `GitLab Runner calls the driver for each stage of a job. In the runner's config.toml:

  [runners.custom]
    config_exec  = "/opt/libvirt-driver/libvirt-driver"
    config_args  = ["config"]
    prepare_exec = "/opt/libvirt-driver/libvirt-driver"
    prepare_args = ["prepare"]
    run_exec     = "/opt/libvirt-driver/libvirt-driver"
    run_args     = ["run"]
    cleanup_exec = "/opt/libvirt-driver/libvirt-driver"
    cleanup_args = ["cleanup"]

Without any settings a job gets a machine with 2 vCPUs and 2048 MiB of memory on libvirt's
network "default", its disk on top of the volume gitlab-runner-base.qcow2 of the pool "default",
and is logged in to as gitlab-runner with the key /root/.ssh/id_rsa.

Every stage exits with 0, with $BUILD_FAILURE_EXIT_CODE for what is the job's own fault, or with
$SYSTEM_FAILURE_EXIT_CODE for what is not. Called by hand, outside of GitLab Runner, it exits
with 64.`

const configHelp = `Prints the driver's name and version, the job's folders in the guest, the shell, and what later
stages may trust, as one JSON object on standard output.

Reads the settings [images], [[aliases]], default_image, and of the image builds_dir, cache_dir,
shell and the maxima that LIBVIRT_DRIVER_VCPUS, _MEMORY and _DISK of the job may ask for.

Exits with $BUILD_FAILURE_EXIT_CODE when the job asks for an image or a size that it cannot
have, or forges who it is; with $SYSTEM_FAILURE_EXIT_CODE when settings or job response cannot
be read.`

const prepareHelp = `Creates an overlay on the image's base volume, defines and starts a domain on it, waits for the
guest's address and then for a real SSH session. What an earlier attempt at the same job left is
removed first, and while the host has no room for the machine it waits for its turn. Each step
is a line in the job log; a failure shows the last lines of the guest's console. A guest that
stops, pauses or crashes, or refuses the key, is not waited for to the end.

Reads the settings uri, socket, virt_type, log_dir, reserve_memory, reserve_disk, all of
[timeouts] (turn, address, ssh, destroy), and all of the job's image.

Exits with $BUILD_FAILURE_EXIT_CODE when the job asks for what it cannot have: that is not tried
again; with $SYSTEM_FAILURE_EXIT_CODE for everything else, and when it is told to stop.`

const runHelp = `Runs SCRIPT in the job's machine: the script goes to the image's shell over SSH, what it writes
comes back as it comes. SUBSTAGE is the runner's name for it and changes nothing.

On SIGTERM the script's processes in the guest are ended, the guest itself stays usable.

Reads the settings user, key, host_key and shell of the job's image, and uri and socket to see
the guest stop.

Exits with 0 when the script does; with $BUILD_FAILURE_EXIT_CODE when the script fails, its own
exit code (128 and more for a signal) in $BUILD_EXIT_CODE_FILE; with $SYSTEM_FAILURE_EXIT_CODE
when the guest or the connection is lost, and when it is told to stop.`

const cleanupHelp = `Destroys and undefines the job's domain, with its NVRAM, saved state and snapshots, and deletes
its volumes and its logs. Nothing being there is success. What carries the job's name but was
not made by the driver is left alone. It returns when the machine can neither run nor be reached
any more, and a process of its own finishes; with early_cleanup = false it does all itself.

Reads the settings uri, socket, log_dir, timeouts.destroy, early_cleanup, and the
pools and networks of all images.

Exits with 0, or with $SYSTEM_FAILURE_EXIT_CODE when something is left, which it names. It never
blames the job, and a job that forges who it is has its machine removed all the same.`

const listHelp = `Prints one line for each of the driver's machines, the oldest first: its job and project, its
image, how it came to be (boot, standby, memory), its age, the state of its domain, the guest's
address, and what its disk takes of the host's. A machine that is nobody's yet has no job, nor
has a guest that was saved for machines to start from memory: it is saved, or in use. A domain
without a volume has the disk "none", a volume without a domain the state "no domain".

With --metrics it prints numbers for Prometheus instead: machines, and the bytes that they take
of the host's disk, by image, by how they came to be, and by whether a job has them.

Reads the settings uri and socket, and the pools of all images.

Exits with 0, or with 1 when libvirt cannot be asked.`

const standbyHelp = `Keeps as many machines ready as standby says for each image: booted, with keys of their own, and
nobody's yet. A prepare whose job fits one takes it in place of booting; the service makes the
next a few seconds later. Machines are made as a job's are, one after the other on small hosts,
and only while there is room and no job waits for any. Removed are those that the settings, or a
new base volume, have made out of date, and some when the host runs short of memory. What it
does is said on standard error.

SIGTERM ends the service and leaves the machines: jobs go on to take them, and the next service
to look after them. It reads its settings when it starts. One runs on a host at a time.

With --drain the machines that stand ready are removed, while no service runs.

Reads all settings.

Exits with 0 when told to stop, or with 1 when another standby service runs or, with --drain,
something could not be removed.`

const gcHelp = `Removes the machines whose jobs are over, with their volumes, NVRAM, leases and logs, and says
why:

  - those older than AGE, which must be more than any job may take;
  - those whose runner, the process that called prepare, is gone, as after a crash or a restart
    of the host, once no stage of the job has been at work for 5 minutes;
  - those whose cleanup began and was not finished;
  - volumes of such machines that have lost their domain;
  - machines made before their job that were not finished, or ran and do not any more;
  - guests saved for machines to start from memory, when no image of the settings is like them
    any more, or they were not made to their end, and no machine starts from them.

Only what has a machine's name is looked at: domains that carry the driver's metadata, and
volumes in the pools of the settings. A machine on which a stage is at work making or removing
it is left alone.

Reads the settings uri, socket, log_dir and timeouts.destroy, and the pools and networks of all
images.

Exits with 0, or with 1 when something could not be looked at or removed.`

const doctorHelp = `Looks at everything that a job needs, in the order in which it needs it, and prints a line for
each point: settings, how many jobs run at once, libvirt's socket and versions, whether KVM works
and is not only there, memory, pools and their room, base volumes and who else may write to them,
networks, addresses enough for all jobs at once, bridges, kernels, keys, folders, and machines
that jobs have left. What is wrong comes with commands that mend it, ready to be pasted.

It changes nothing. A virtual machine without a disk runs for a second to see whether KVM works.
With --boot a guest of IMAGE is booted as for a job, asked for bash, git, git-lfs, gitlab-runner,
sudo, a machine-id and SSH host keys of its own, its clock and what its boot takes, and removed.

Reads all of the settings, and concurrent in /etc/gitlab-runner/config.toml.

Exits with 0 when all is well, with 1 when something keeps jobs from running or makes it unsafe
that they do, and with 2 when there are warnings alone: jobs run, but slower, or not for long.`
