//go:build integration

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"libvirt-driver/integration/runner"
)

// address returns where a prepared machine's guest is.
func address(t *testing.T, job runner.Job) string {
	t.Helper()
	ip := lent(t, "default")[macOf(job)]
	if ip == "" {
		t.Fatalf("no lease of %s", machineOf(job))
	}
	return ip
}

// Jobs are written by strangers to each other: their guests share a bridge and nothing more, unless the
// administrator wants it so.
func TestGuestsReachEachOtherOnlyWhereTheAdministratorLetsThem(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		image string
		reach bool
	}{
		"by default": {"", false},
		"allowed":    {"isolated = false", true},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSettings(t, tiny(test.image))
			here, there := newJob(runner.Job{}), newJob(runner.Job{})
			ex := prepared(t, s.runner(t), here)
			prepared(t, s.runner(t), there)
			ping := func(to string) bool {
				r := ex.Run(t.Context(), "step_ping", "sudo ping -c 3 -w 6 "+to)
				return r.ExitCode == 0
			}
			if !ping("192.168.122.1") {
				t.Error("the guest cannot reach the host's end of the network: what follows says nothing")
			}
			if got := ping(address(t, there)); got != test.reach {
				t.Errorf("the guest reaches its neighbour: %v, want %v", got, test.reach)
			}
		})
	}
}

// forge makes a guest speak as another and prints what came of it: "answered" when the host's end of the network took
// it for that. The guest is itself again afterwards.
const forge = `
gw=192.168.122.1
# It asks anew each time, and in asking tells who it is: the host does not listen to that for a second after it has
# heard of another.
try() {
	for n in 1 2; do
		sudo ip neigh flush dev eth0 >/dev/null 2>&1
		if sudo ping -c 2 -w 3 "$@" $gw >/dev/null; then echo answered; return; fi
	done
	echo nothing
}
printf 'itself: '; try
sudo ip address add %[1]s/24 dev eth0
printf 'address: '; try -I %[1]s
sudo ip address del %[1]s/24 dev eth0
own=$(cat /sys/class/net/eth0/address)
sudo ip link set eth0 down; sudo ip link set eth0 address 52:54:00:00:be:ef; sudo ip link set eth0 up
printf 'mac: '; try
sudo ip link set eth0 down; sudo ip link set eth0 address "$own"; sudo ip link set eth0 up
`

// The neighbour says nothing meanwhile, so that only the filter stands between the guest and its address.
func TestAGuestThatForgesItsNeighboursAddressGetsNothing(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ image, want string }{
		"by default": {"", "itself: answered\naddress: nothing\nmac: nothing\n"},
		"allowed":    {`filter = ""`, "itself: answered\naddress: answered\nmac: answered\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSettings(t, tiny(test.image))
			here, there := newJob(runner.Job{}), newJob(runner.Job{})
			ex := prepared(t, s.runner(t), here)
			prepared(t, s.runner(t), there)
			neighbour := address(t, there)
			virsh(t, "suspend", machineOf(there))
			// In the background, as the guest's connection stands still meanwhile.
			output(t, ex, "cat > forge <<'END'\n"+fmt.Sprintf(forge, neighbour)+"\nEND\nsh forge > forged 2> errors < /dev/null &")
			time.Sleep(3 * time.Second)
			got := output(t, ex, "for i in $(seq 120); do ! grep -q '^mac: [an]' forged || break; sleep 1; done; sleep 2; cat forged errors")
			if got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

// A lease outlives its guest, unless it is given back: a network with one address serves one job after another.
func TestASmallRangeServesManyJobs(t *testing.T) {
	t.Parallel()
	n := smallNetwork(t, 2)
	s := newSettings(t, tiny(fmt.Sprintf("network = %q", n.name)))
	for range 3 {
		job := newJob(runner.Job{Script: []string{"echo green"}})
		if outcome, err := runner.RunJob(t.Context(), s.runner(t), job); err != nil || outcome.Status != runner.Success {
			t.Fatalf("job %d: %+v, %v", job.ID, outcome, err)
		}
	}
	until(t, "all leases are given back", func() bool { return !strings.Contains(virsh(t, "net-dhcp-leases", n.name), n.prefix) })
	until(t, "no address is kept", func() bool { return len(reservations(t, n.name)) == 0 })
}

// libvirt, and not the guest, sets the bounds.
func TestAGuestsIOIsBounded(t *testing.T) {
	t.Parallel()
	job := newJob(runner.Job{})
	prepared(t, newSettings(t, tiny("disk_rate = \"4 MiB\"\ndisk_iops = 200")).runner(t), job)
	machine := machineOf(job)
	tune := virsh(t, "blkdeviotune", machine, "vda")
	for label, want := range map[string]int{"total_bytes_sec:": 4 << 20, "total_iops_sec :": 200} {
		if got := number(t, tune, label); got != want {
			t.Errorf("%s %d, want %d", label, got, want)
		}
	}
}

// number returns the number before a unit in a line of virsh's that starts with label.
func number(t *testing.T, text, label string) int {
	t.Helper()
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(line), label); ok {
			n, err := strconv.Atoi(strings.Fields(rest)[0])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no %q in %s", label, text)
	return 0
}

// Not parallel: it counts on what the host's guests take of its memory. The guests here may take much and touch
// little, so that what they may take is what fills the host.
func TestTwentyJobsOnAHostThatHoldsFourAreAllGreen(t *testing.T) {
	const jobs, holds, each, qemu = 20, 4, 3072, 128 // MiB
	taken := 0
	for _, domain := range strings.Fields(virsh(t, "list", "--name")) {
		taken += number(t, virsh(t, "dominfo", domain), "Max memory:") / 1024
	}
	reserve := number(t, virsh(t, "nodememstats"), "total  :")/1024 - taken - holds*each - 2*qemu
	if reserve < 0 {
		t.Fatalf("the host has too little memory for %d guests of %d MiB", holds, each)
	}
	s := newSettings(t, fmt.Sprintf("reserve_memory = %d\n", reserve)+strings.Replace(tiny(""), `"256 MiB"`, fmt.Sprint(each), 1))

	most, stop, watched := 0, make(chan struct{}), make(chan struct{})
	others := len(strings.Fields(virsh(t, "list", "--name")))
	go func() {
		defer close(watched)
		for {
			select {
			case <-stop:
				return
			case <-time.After(200 * time.Millisecond):
				out, _ := tryVirsh("list", "--name")
				most = max(most, len(strings.Fields(out))-others)
			}
		}
	}()
	var all sync.WaitGroup
	for range jobs {
		all.Go(func() {
			job := newJob(runner.Job{Script: []string{"echo green"}})
			outcome, err := runner.RunJob(t.Context(), s.runner(t), job)
			if err != nil || outcome.Status != runner.Success {
				t.Errorf("job %d: %+v, %v", job.ID, outcome, err)
			}
		})
	}
	all.Wait()
	close(stop)
	<-watched
	if most < 2 || most > holds {
		t.Errorf("up to %d guests at once, on a host that holds %d", most, holds)
	}
}

// A machine's remains, as a host that lost its power leaves them: the metadata says how old it is.
func plant(t *testing.T, id int, domain, volume bool) string {
	t.Helper()
	machine := fmt.Sprintf("runner-1-project-42-concurrent-0-job-%d", id)
	if volume {
		virsh(t, "vol-create-as", "default", machine+".qcow2", "1M", "--format", "qcow2")
	}
	if domain {
		virsh(t, "define", document(t, `<domain type='qemu'><name>%s</name><memory unit='MiB'>64</memory>
			<metadata><machine xmlns='urn:libvirt-driver:machine:1'><job>%d</job><project>42</project><runner>1</runner>
			<image>tiny</image><pool>default</pool><volume>%[1]s.qcow2</volume><network>default</network>
			<created>2026-01-02T03:04:05Z</created><owner>another-boot pid:[1] 1 1</owner></machine></metadata>
			<os><type arch='x86_64' machine='q35'>hvm</type></os></domain>`, machine, id))
	}
	return machine
}

// Not parallel: it collects whatever is old on the host.
func TestGCBesideRunningJobsRemovesOrphansAndNothingElse(t *testing.T) {
	s := newSettings(t, tiny(""))
	const running = 8
	var jobs [running]*runner.Executor
	var all sync.WaitGroup
	for i := range jobs {
		all.Go(func() { jobs[i] = prepared(t, s.runner(t), newJob(runner.Job{})) })
	}
	all.Wait()
	if t.Failed() {
		t.FailNow()
	}
	var orphans []string
	for i := range 8 {
		// Domains with and without their volume. A volume alone is too young yet.
		orphans = append(orphans, plant(t, 900+i, true, i%2 == 0))
	}
	virsh(t, "vol-create-as", "default", orphans[0]+"-identity", "4k", "--format", "raw")
	young := plant(t, 990, false, true)
	virsh(t, "define", document(t, `<domain type='qemu'><name>runner-1-project-42-concurrent-0-job-991</name>
		<memory unit='MiB'>64</memory><os><type arch='x86_64' machine='q35'>hvm</type></os></domain>`))
	t.Cleanup(func() {
		virsh(t, "undefine", "runner-1-project-42-concurrent-0-job-991")
		virsh(t, "vol-delete", young+".qcow2", "--pool", "default")
	})

	dry := command(t, binary, "--config", string(s), "gc", "--dry-run")
	done := command(t, binary, "--config", string(s), "gc")
	if strings.Count(dry, "would remove") != len(orphans) || strings.Count(done, "removed ") != len(orphans) {
		t.Errorf("dry run:\n%s\nthen:\n%s", dry, done)
	}
	for _, orphan := range orphans {
		wantGone(t, orphan)
	}
	if !exists(t, "runner-1-project-42-concurrent-0-job-991") {
		t.Error("a domain that is not the driver's is gone")
	}
	if list := command(t, binary, "--config", string(s), "list"); strings.Count(list, " running ") != running || !strings.Contains(list, "no domain") {
		t.Errorf("list:\n%s", list)
	}
	for _, ex := range jobs {
		if got := output(t, ex, "echo alive"); got != "alive\n" {
			t.Errorf("a job that runs: %q", got)
		}
	}
}

// A network filter learns the guest's address from what it sees first, and that need not be what the guest gets in the
// end.
func TestAGuestWhoseFilterHasLearnedAnotherAddressIsReached(t *testing.T) {
	t.Parallel()
	job := newJob(runner.Job{})
	ex, call := midway(t, newSettings(t, tiny("")).runner(t), job, "  machine ")
	domain, file := machineOf(job), filepath.Join(newFolder(t), "interface.xml")
	wrong := fmt.Sprintf(`<interface type="network"><mac address="%s"/><source network="default"/><port isolated="yes"/>
		<model type="virtio"/><filterref filter="clean-traffic"><parameter name="IP" value="192.168.122.254"/></filterref>
		<rom enabled="no"/></interface>`, macOf(job))
	if err := os.WriteFile(file, []byte(wrong), 0o600); err != nil {
		t.Fatal(err)
	}
	command(t, "virsh", "update-device", domain, file, "--live")
	want(t, ex, call.Wait(t.Context()), 0)
	if ip := address(t, job); !strings.Contains(command(t, "virsh", "dumpxml", domain), fmt.Sprintf("<parameter name='IP' value='%s'/>", ip)) {
		t.Errorf("the filter does not know the guest's address %s", ip)
	}
	if out := output(t, ex, "echo reached"); out != "reached\n" {
		t.Errorf("the guest says %q", out)
	}
	remove(t, ex, job)
}
