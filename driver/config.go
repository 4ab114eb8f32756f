package driver

import (
	"io"

	"libvirt-driver/driver/gitlab"
)

// Config answers the config stage on w: who the driver is, where the job's
// files go in the guest, and what later stages may trust. A job that cannot
// have the machine it asks for is refused here already.
func (s *Stage) Config(w io.Writer) error {
	m, err := s.plan()
	if err != nil {
		return err
	}
	return gitlab.Config{
		Driver:    gitlab.Driver{Name: "libvirt-driver", Version: s.Version},
		Hostname:  m.name,
		BuildsDir: m.image.BuildsDir,
		CacheDir:  m.image.CacheDir,
		Shell:     string(m.image.Shell),
		JobEnv: map[string]string{
			passedMachine: m.name,
			passedImage:   m.image.Name,
			threads:       "1",
		},
	}.Write(w)
}
