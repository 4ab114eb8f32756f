package settings

import "strings"

const (
	unknownKey = "is not a known key"
	didYouMean = "did you mean "
)

// whereTo returns the remedy for the unknown key name, which holds v in the
// table at path, where only known would be.
func whereTo(path keyPath, name string, v any, known []string) string {
	_, isTable := v.(map[string]any)
	if isTable && len(path) == 2 && path[0] == "images" {
		return `put quotes around a name with dots, as in [images."debian-12.5"]`
	}
	if len(path) == 0 {
		known = append(known, "timeouts", "defaults", "images", "aliases")
	}
	// The right key in the wrong place is what forgetting about the table above
	// it looks like.
	if !isTable {
		switch {
		case topKeys[name] != nil:
			return "move it to the top of the file, before the first table"
		case imageKeys[name] != nil:
			return "move it to [defaults] or to the table of an image"
		case timeoutKeys[name] != nil:
			return "move it to [timeouts]"
		case aliasKeys[name] != nil:
			return "move it to a table [[aliases]]"
		}
	}
	if near := Nearest(name, known); near != "" {
		return didYouMean + near + "?"
	}
	return "remove it, the keys here are " + strings.Join(known, ", ")
}

// Nearest returns which of known is most like name, "" if none is near: at most
// two letters off, and less than half of them. A wrong first letter, which few
// people type, counts twice: vcpu is vcpus rather than cpu.
func Nearest(name string, known []string) string {
	best, least := "", 3
	for _, k := range known {
		if len(name) > len(k)+2 {
			continue
		}
		a, b := strings.ToLower(name), strings.ToLower(k)
		d := distance(a, b)
		if a != "" && a[0] != b[0] {
			d++
		}
		if d < least && 2*d < len(k) {
			best, least = k, d
		}
	}
	return best
}

// distance returns the number of letters to insert, remove, replace or swap with
// their neighbour to make b of a (optimal string alignment).
func distance(a, b string) int {
	prev2, prev, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		prev2, prev, row = prev, row, prev2
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			row[j+1] = min(prev[j+1]+1, row[j]+1, prev[j]+cost)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				row[j+1] = min(row[j+1], prev2[j-1]+1)
			}
		}
	}
	return row[len(b)]
}
