package settings

import (
	"fmt"
	"path"
	"slices"
	"strings"
)

// UnknownImageError tells that the image which a job names is not configured,
// or that the job names none and there is no default image.
type UnknownImageError struct {
	// Name is as the job wrote it, "" when it names no image.
	Name string
	// Allowed lists what jobs may name: images and the aliases' globs, sorted,
	// each once.
	Allowed []string
}

// Error tells, on one line, the name and what is allowed.
func (e *UnknownImageError) Error() string {
	if e.Name == "" {
		return fmt.Sprintf("the job names no image and there is no default image; set image: to one of %s", list(e.Allowed))
	}
	return fmt.Sprintf("image %s is not configured; set image: to one of %s", quote(e.Name), list(e.Allowed))
}

// Is reports that the error matches [ErrJobFault].
func (e *UnknownImageError) Is(target error) bool { return target == ErrJobFault }

// Image returns the image that a job gets which names it so: the image of
// exactly this name, else that of the first alias that matches. A job that
// names none ("") gets the default image. With s.BuiltIn every job gets the
// built-in image. The error is an [*UnknownImageError].
//
// The name is only compared, whatever it holds.
func (s *Settings) Image(name string) (Image, error) {
	if s.BuiltIn {
		return s.Images[builtInName], nil
	}
	if name == "" {
		name = s.DefaultImage
	}
	if img, ok := s.Images[name]; ok {
		return img, nil
	}
	if name != "" {
		for _, a := range s.Aliases {
			if ok, err := path.Match(a.Match, name); err == nil && ok {
				return s.Images[a.Image], nil
			}
		}
	}
	return Image{}, &UnknownImageError{Name: name, Allowed: s.allowed()}
}

// allowed returns what jobs may name, sorted, each once.
func (s *Settings) allowed() []string {
	var names []string
	for name := range s.Images {
		names = append(names, name)
	}
	for _, a := range s.Aliases {
		names = append(names, a.Match)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// list writes names for a message.
func list(names []string) string {
	quoted := make([]string, len(names))
	for i, name := range names {
		quoted[i] = quote(name)
	}
	return strings.Join(quoted, ", ")
}
