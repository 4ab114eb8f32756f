package main

import (
	"math"
	"slices"
	"time"

	"libvirt-driver/integration/runner"
)

// series are all measurements of one figure, in any order.
type series []float64

// quantile returns the value that the share q of the series, from 0 to 1, does
// not exceed, with straight lines between neighbours: 0 is the minimum, 0.5 the
// median, 1 the maximum. It is NaN for an empty series.
func (s series) quantile(q float64) float64 {
	if len(s) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(s))
	at := q * float64(len(sorted)-1)
	below := int(at)
	above := min(below+1, len(sorted)-1)
	return sorted[below] + (at-float64(below))*(sorted[above]-sorted[below])
}

func (s series) median() float64 { return s.quantile(0.5) }

// of makes a series of a figure that each call has.
func of(calls []*runner.Result, figure func(*runner.Result) float64) series {
	var s series
	for _, r := range calls {
		s = append(s, figure(r))
	}
	return s
}

// between is in seconds.
func between(from, to time.Time) float64 { return to.Sub(from).Seconds() }
