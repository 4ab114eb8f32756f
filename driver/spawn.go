package driver

import (
	"os"
	"strconv"
	"syscall"
)

// spawn starts this program with other arguments, in a session of its own, so
// that what ends a job's stages does not end it. It gets no environment but env,
// which keeps the job's out, and no file but these, as its first. Nobody need
// wait for it.
func spawn(args, env []string, files ...*os.File) (pid int, err error) {
	closeOnExec()
	fds := make([]uintptr, len(files))
	for i, f := range files {
		fds[i] = f.Fd()
	}
	// os.StartProcess would first start a process to see what the kernel can do.
	return syscall.ForkExec("/proc/self/exe", append([]string{"libvirt-driver"}, args...), &syscall.ProcAttr{
		Dir:   "/",
		Env:   env,
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
