package main

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

func TestALockIsCounted(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for range 100 { // other programs' locks on the same file system come and go
		before := countLocks(filepath.Dir(f.Name()))
		if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
			t.Fatal(err)
		}
		held := countLocks(filepath.Dir(f.Name()))
		if err := syscall.Flock(int(f.Fd()), syscall.LOCK_UN); err != nil {
			t.Fatal(err)
		}
		if after := countLocks(filepath.Dir(f.Name())); held == before+1 && after == before {
			return
		}
	}
	t.Error("a lock makes no difference")
}
