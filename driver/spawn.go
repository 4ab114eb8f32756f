package driver

import (
	"os"
	"strconv"
	"syscall"
)

// threads is the variable by which Go's runtime is told how many threads may
// compute at a time. In a stage and what it leaves behind there is little to compute
// and much to wait for, and threads that stand by would take a fifth of its
// processor time. It counts only if it is there when the process starts.
//
// https://pkg.go.dev/runtime#hdr-Environment_Variables
const threads = "GOMAXPROCS"

// spawn starts this program with other arguments, in a session of its own, so
// that what ends a job's stages does not end it. It gets no environment but env
// and threads, which keeps the job's out, and no file but these, as its first. Nobody
// need wait for it.
func spawn(args, env []string, files ...*os.File) (pid int, err error) {
	closeOnExec()
	fds := make([]uintptr, len(files))
	for i, f := range files {
		fds[i] = f.Fd()
	}
	// os.StartProcess would first start a process to see what the kernel can do.
	return syscall.ForkExec("/proc/self/exe", append([]string{"libvirt-driver"}, args...), &syscall.ProcAttr{
		Dir:   "/",
		Env:   append(env, threads+"=1"),
		Files: fds,
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
}

// closeOnExec keeps the files that this process has from whoever started it
// from being handed on. Go's own are not.
func closeOnExec() {
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return
	}
	for _, file := range files {
		if fd, err := strconv.Atoi(file.Name()); err == nil && fd > 2 {
			syscall.CloseOnExec(fd)
		}
	}
}
