//go:build integration

package integration

import (
	"path/filepath"
	"testing"
	"time"

	"libvirt-driver/integration/runner"
)

func TestALibvirtdThatIsNotThereFailsWithARemedyInBoundedTime(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(t.TempDir(), "no-such-socket")
	for name, begin := range map[string]func(*runner.Executor) *runner.Call{
		"prepare": (*runner.Executor).StartPrepare, "cleanup": (*runner.Executor).StartCleanup,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSettings(t, "socket = \""+socket+"\"\n"+tiny("", "[timeouts]", "destroy = \"5s\""))
			ex := start(t, s.runner(t), newJob(runner.Job{}))
			r := begin(ex).Wait(t.Context())
			s.write(t, tiny("")) // for the cleanup at the test's end
			want(t, ex, r, 2, socket, "waiting for libvirtd", "not done after 5s", "is libvirtd running? (systemctl start libvirtd)")
			wantWithin(t, r, 20*time.Second)
		})
	}
}
