package driver

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// A refusal is the record that guests of a fingerprint cannot start from memory,
// so that not every job makes a slot in vain. It counts for a while.
const refusalCounts = time.Hour

func (h *Host) refusalPath(print string) string { return filepath.Join(h.LockDir, print+".refusal") }

// note records that a slot that was just made, or was to be, is of no use, and
// returns why.
func (mk *Maker) note(ctx context.Context, print string, err error) error {
	var no *unfitError
	if errors.As(err, &no) && ctx.Err() == nil {
		return errors.Join(err, mk.refuse(print, no.error))
	}
	return err
}

// refuse records why guests of a fingerprint cannot start from memory.
func (h *Host) refuse(print string, why error) error {
	return os.WriteFile(h.refusalPath(print), []byte(why.Error()), 0o600)
}

// refused returns why guests of a fingerprint cannot start from memory, if that
// is on record.
func (h *Host) refused(print string) string {
	info, err := os.Stat(h.refusalPath(print))
	if err != nil || time.Since(info.ModTime()) > refusalCounts {
		return ""
	}
	why, err := os.ReadFile(h.refusalPath(print))
	if err != nil {
		return ""
	}
	return string(why)
}

// dropRefusals removes those that no image is like any more, unless told to keep
// them.
func (h *Host) dropRefusals(wanted map[string]bool, keep bool) error {
	paths, err := filepath.Glob(h.refusalPath("*"))
	if err != nil || keep {
		return err
	}
	for _, path := range paths {
		print := strings.TrimSuffix(filepath.Base(path), ".refusal")
		if wanted[print] && h.refused(print) != "" {
			continue
		}
		if err := gone(os.Remove(path)); err != nil {
			return err
		}
	}
	return nil
}
