//go:build race

package sshexec

// The race detector takes a multiple of the memory that is measured.
const maxMeasured = 150 << 20
