package doctor

import (
	"runtime"
	"syscall"
)

// asUser asks a question of the file system as another user and group, and no
// other group. The calling goroutine's thread is not used for anything else
// afterwards: the goroutine must end.
func asUser(uid, gid int, question func() bool) bool {
	runtime.LockOSThread()
	// These calls are for the thread alone, see setfsuid(2); those of package
	// syscall for groups are for the process.
	syscall.RawSyscall(syscall.SYS_SETGROUPS, 0, 0, 0)
	syscall.Setfsgid(gid)
	syscall.Setfsuid(uid)
	return question()
}
