package settings

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

const (
	// maxEcho is how many bytes of a bad value a message repeats.
	maxEcho = 60
	// maxProblems is how many problems of a file are told at once.
	maxProblems = 20
)

// problem is one thing that is wrong with the file.
type problem struct {
	line  int
	key   string
	fault fault
}

// fault is what is wrong with a value and how to set it right.
type fault struct{ wrong, remedy string }

// problems collects what is wrong with one file.
type problems struct {
	file string
	all  []problem
}

func (p *problems) add(line int, key, wrong, remedy string) {
	p.all = append(p.all, problem{line: line, key: key, fault: fault{wrong, remedy}})
}

// Problem is one thing that is wrong with a settings file. The error of [Load]
// holds one for each.
type Problem struct {
	File string
	Line int
	// Key is the key that is wrong, with its tables: "images.debian.memory".
	Key string
	// Wrong says what is wrong with it, and Remedy what to do about it.
	Wrong, Remedy string
}

func (p *Problem) Error() string {
	return fmt.Sprintf("%s:%d: %s: %s; %s", p.File, p.Line, p.Key, p.Wrong, p.Remedy)
}

// Meant returns the key that was probably meant by one that is not known.
func (p *Problem) Meant() (key string, ok bool) {
	key, ok = strings.CutPrefix(p.Remedy, didYouMean)
	return strings.TrimSuffix(key, "?"), ok && p.Wrong == unknownKey
}

// err returns all problems in the file's order, one line each, or nil.
func (p *problems) err() error {
	slices.SortFunc(p.all, func(a, b problem) int {
		return cmp.Or(cmp.Compare(a.line, b.line), cmp.Compare(a.key, b.key), cmp.Compare(a.fault.wrong, b.fault.wrong))
	})
	// What an image inherits can be wrong for several images.
	p.all = slices.Compact(p.all)

	var errs []error
	for i, pr := range p.all {
		if i == maxProblems {
			errs = append(errs, fmt.Errorf("%s:%d: %d more problems from here on; solve those above first",
				p.file, pr.line, len(p.all)-maxProblems))
			break
		}
		errs = append(errs, &Problem{p.file, pr.line, pr.key, pr.fault.wrong, pr.fault.remedy})
	}
	return errors.Join(errs...)
}

// quote returns s in quotes, on one line, cut after maxEcho bytes.
func quote(s string) string {
	if len(s) <= maxEcho {
		return strconv.Quote(s)
	}
	cut := maxEcho
	for cut > maxEcho-utf8.UTFMax && !utf8.RuneStart(s[cut]) {
		cut--
	}
	return strconv.Quote(s[:cut]) + "..."
}
