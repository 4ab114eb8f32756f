package sshexec

import (
	"errors"
	"syscall"
)

// A Verdict is an error of this package on its way to another process: its text,
// and what a caller tells apart.
type Verdict struct {
	Text string     `json:"error,omitempty"` // empty for none
	Is   []string   `json:"is,omitempty"`    // keys of verdicts
	Exit *ExitError `json:"exit,omitempty"`
}

// verdicts are the errors that a caller tells apart.
var verdicts = map[string]error{
	"unreachable": ErrUnreachable,
	"key":         ErrKeyRejected,
	"host key":    ErrHostKey,
	"refused":     ErrRefused,
	"lost":        ErrLost,
	"no server":   syscall.ECONNREFUSED,
}

// Judge returns err's verdict.
func Judge(err error) (v Verdict) {
	if err == nil {
		return v
	}
	v.Text = err.Error()
	for word, kind := range verdicts {
		if errors.Is(err, kind) {
			v.Is = append(v.Is, word)
		}
	}
	errors.As(err, &v.Exit)
	return v
}

// Err returns the error that v was made of, as far as v knows it.
func (v Verdict) Err() error {
	if v.Text == "" {
		return nil
	}
	told := &toldError{text: v.Text}
	for _, word := range v.Is {
		if kind, ok := verdicts[word]; ok {
			told.kinds = append(told.kinds, kind)
		}
	}
	if v.Exit != nil {
		told.kinds = append(told.kinds, v.Exit)
	}
	return told
}

// A toldError is an error of another process.
type toldError struct {
	text  string
	kinds []error
}

func (e *toldError) Error() string   { return e.text }
func (e *toldError) Unwrap() []error { return e.kinds }
