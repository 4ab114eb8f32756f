package sshexec

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
)

// TestVerdictIsTheErrorAgain sends errors through JSON, as they are between processes.
func TestVerdictIsTheErrorAgain(t *testing.T) {
	exit := &ExitError{Code: 137, Signal: "KILL"}
	for _, err := range []error{
		nil,
		errors.New("any other"),
		fmt.Errorf("log in: %w: %w", ErrUnreachable, ErrRefused),
		fmt.Errorf("script: %w", exit),
		&stoppedError{"guest", ErrLost, errUncertain},
	} {
		text, failed := json.Marshal(Judge(err))
		var v Verdict
		if failed == nil {
			failed = json.Unmarshal(text, &v)
		}
		if failed != nil {
			t.Fatal(failed)
		}
		again := v.Err()
		if fmt.Sprint(again) != fmt.Sprint(err) {
			t.Errorf("%v has become %v", err, again)
		}
		for _, kind := range verdicts {
			if errors.Is(again, kind) != errors.Is(err, kind) {
				t.Errorf("%v is %v, and was so: %t", again, kind, errors.Is(err, kind))
			}
		}
		var one, other *ExitError
		if errors.As(err, &one) != errors.As(again, &other) || one != nil && *one != *other {
			t.Errorf("exit %v has become %v", one, other)
		}
	}
	if _, err := net.Dial("tcp", "127.0.0.1:1"); err == nil || Judge(err).Err() == nil || !strings.Contains(fmt.Sprint(Judge(err).Is), "no server") {
		t.Errorf("a refused connection: %v, %+v", err, Judge(err))
	}
}
