package doctor

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"libvirt-driver/driver/hypervisor"
	"libvirt-driver/driver/settings"
)

func TestCommandsAreWordsToBash(t *testing.T) {
	words := []string{"printf", `%s\n`, "plain", "", "two words", "it's", `"$HOME"`, "`id`", `it's "$HOME"`, `back\slash`, "end!", "\t;|&\n",
		strings.Repeat("long ", 30), "<range start='192.0.2.1' end='192.0.2.9'/>"}
	got, err := exec.Command("bash", "-c", command(words...)).CombinedOutput()
	if want := strings.Join(words[2:], "\n") + "\n"; err != nil || string(got) != want {
		t.Errorf("%v: %q, not %q", err, got, want)
	}
	for line := range strings.Lines(command("virsh", "net-update", "default", "add-last", "ip-dhcp-range",
		"<range start='192.168.122.2' end='192.168.122.254'/>", "--live", "--config")) {
		if len(strings.TrimSuffix(line, "\n")) > lineWidth+len(" \\") {
			t.Errorf("a line of %d columns: %s", len(line), line)
		}
	}
}

// A change to the settings is made by sed and printf, and read by settings.
func TestSettingsAreChangedWhereTheyStand(t *testing.T) {
	const debian = "[images.debian]\nvolume = \"debian.qcow2\"\nkernel = \"/k\"\n"
	virtType := func(s *settings.Settings) string { return string(s.VirtType) }
	image := func(name string) func(*settings.Settings) string {
		return func(s *settings.Settings) string {
			i := s.Images[name]
			return fmt.Sprint(i.Format, " ", settings.FormatSize(i.Memory), " ", i.Cmdline)
		}
	}
	for name, test := range map[string]struct {
		doc        string // "-" for no file
		table      []string
		key, value string
		look       func(*settings.Settings) string
		want       string
	}{
		"no file":                   {"-", nil, "virt_type", `"qemu"`, virtType, "qemu"},
		"an empty file":             {"", nil, "virt_type", `"qemu"`, virtType, "qemu"},
		"no line of it":             {debian, nil, "virt_type", `"qemu"`, virtType, "qemu"},
		"a line of it":              {"# first\nvirt_type=\"kvm\" # why\n" + debian, nil, "virt_type", `"qemu"`, virtType, "qemu"},
		"the defaults":              {"[defaults]\nmemory = 512\n", []string{"defaults"}, "memory", `"1 GiB"`, image("default"), "qcow2 1 GiB "},
		"no defaults":               {"log_dir = \"/a\"", []string{"defaults"}, "format", `"raw"`, image("default"), "raw 2 GiB "},
		"an image":                  {debian + "[images.other]\nvolume = \"o\"\n", []string{"images", "debian"}, "format", `"raw"`, image("debian"), "raw 2 GiB "},
		"an image in quotes":        {"[images.\"a:1\"]\nvolume = \"o\"\nformat = \"qcow2\"\n", []string{"images", "a:1"}, "format", `"raw"`, image("a:1"), "raw 2 GiB "},
		"signs of sed's and bash's": {debian, []string{"images", "debian"}, "cmdline", `"a\\b 'c' &/\"d $e"`, image("debian"), `qcow2 2 GiB a\b 'c' &/"d $e`},
	} {
		t.Run(name, func(t *testing.T) {
			f := file{path: filepath.Join(t.TempDir(), "etc", "config.toml"), doc: []byte(test.doc), lost: test.doc == "-"}
			if f.lost {
				f.doc = nil
			} else {
				if err := os.MkdirAll(filepath.Dir(f.path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(f.path, f.doc, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			remedy := f.set(test.table, test.key, test.value)
			if out, err := exec.Command("bash", "-euc", remedy).CombinedOutput(); err != nil {
				t.Fatalf("%s: %v: %s", remedy, err, out)
			}
			s, err := settings.Load(f.path)
			if err != nil {
				t.Fatalf("%s: %v", remedy, err)
			}
			if got := test.look(s); got != test.want {
				t.Errorf("%s: %q, not %q", remedy, got, test.want)
			}
		})
	}
}

func TestWhatOnlyAPersonCanChangeOpensTheEditor(t *testing.T) {
	f := file{path: "/etc/c.toml", doc: []byte("images = { debian = { volume = \"d\" } }\n")}
	if got := f.set([]string{"images", "debian"}, "format", `"raw"`); got != "editor /etc/c.toml" {
		t.Error(got)
	}
}

func TestJobsAtOnceAreReadFromTheRunnersConfiguration(t *testing.T) {
	for doc, want := range map[string]int{
		"concurrent = 4\ncheck_interval = 0\n":     4,
		"# it\r\n\tconcurrent=12 # twelve\r\n[x]":  12,
		"[[runners]]\nconcurrent = 4\n":            0,
		"concurrent = 0\n":                         0,
		"concurrent = \"4\"\n":                     0,
		"#concurrent = 4\nrequest_concurrency = 3": 0,
		"": 0,
	} {
		if n, ok := concurrent(doc); n != want && ok || ok != (want > 0) {
			t.Errorf("%q: %d, %v", doc, n, ok)
		}
	}
	if got := (jobs{4, "/r.toml"}).fewer(2); got != `sed -i 's/^\s*concurrent\s*=.*/concurrent = 2/' /r.toml` {
		t.Error(got)
	}
	if got := (jobs{4, ""}).fewer(2) + (jobs{4, "/r.toml"}).fewer(0); got != "" {
		t.Error(got)
	}
}

// header makes a qcow2 header of version 3.
func header(change func([]byte)) []byte {
	b := make([]byte, 512)
	copy(b, "QFI\xfb")
	binary.BigEndian.PutUint32(b[4:], 3)
	change(b)
	return b
}

func TestTheBeginningOfAVolumeSaysWhatItIs(t *testing.T) {
	backing := func(offset uint64, length uint32) []byte {
		return header(func(b []byte) {
			binary.BigEndian.PutUint64(b[8:], offset)
			binary.BigEndian.PutUint32(b[16:], length)
			copy(b[200:], "/base\xff.raw")
		})
	}
	for name, test := range map[string]struct {
		bytes []byte
		want  head
	}{
		"nothing":                 {nil, head{format: "raw"}},
		"a boot sector":           {append(make([]byte, 510), 0x55, 0xaa), head{format: "raw"}},
		"qcow2":                   {header(func([]byte) {}), head{format: "qcow2"}},
		"cut short":               {header(func([]byte) {})[:40], head{format: "qcow2", corrupt: true}},
		"the first version":       {header(func(b []byte) { b[7] = 1 }), head{format: "qcow"}},
		"a backing file":          {backing(200, 10), head{format: "qcow2", backing: "/base?.raw"}},
		"a name out of the file":  {backing(500, 100), head{format: "qcow2", backing: "an unnamed file"}},
		"a name out of the world": {backing(1<<64-5, 100), head{format: "qcow2", backing: "an unnamed file"}},
		"encrypted":               {header(func(b []byte) { b[35] = 2 }), head{format: "qcow2", encrypted: true}},
		"corrupt":                 {header(func(b []byte) { b[79] = 2 }), head{format: "qcow2", corrupt: true}},
		"a data file":             {header(func(b []byte) { b[79] = 4 }), head{format: "qcow2", dataFile: true}},
		"version 2 has none":      {header(func(b []byte) { b[7], b[79] = 2, 4 }), head{format: "qcow2"}},
		"vmdk":                    {[]byte("KDMV\x01"), head{format: "vmdk"}},
	} {
		if got := readHead(test.bytes); got != test.want {
			t.Errorf("%s: %+v, not %+v", name, got, test.want)
		}
	}
}

func TestTheLargestRangeLeavesOutTheHostsOwnAddress(t *testing.T) {
	for address, want := range map[string]string{
		"192.168.122.1/24":   "192.168.122.2-192.168.122.254 253",
		"192.168.122.254/24": "192.168.122.1-192.168.122.253 253",
		"10.1.2.9/29":        "10.1.2.10-10.1.2.14 5",
		"10.1.2.1/30":        "10.1.2.2-10.1.2.2 1",
		"10.1.2.1/32":        "invalid IP-invalid IP 0",
		"fd00::1/64":         "invalid IP-invalid IP 0",
	} {
		_, r := largestRange(hypervisor.Network{Addresses: []netip.Prefix{netip.MustParsePrefix(address)}})
		if got := r.Start.String() + "-" + r.End.String() + " " + strings.TrimSpace(strings.Split(addresses(r.Size()), " ")[0]); got != want {
			t.Errorf("%s: %s, not %s", address, got, want)
		}
	}
}

func TestModularDaemonsNeedEachOther(t *testing.T) {
	dir := t.TempDir()
	listen := func(name string) {
		l, err := net.Listen("unix", filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
	}
	listen("virtqemud-sock")
	found := modular(filepath.Join(dir, "virtqemud-sock"))
	if found.Level != Failure || !strings.Contains(found.Found, "virtstoraged and virtnetworkd") || !strings.Contains(found.Remedy, "virtnetworkd") {
		t.Errorf("neither is there: %+v", found)
	}
	listen("virtstoraged-sock")
	if found = modular(filepath.Join(dir, "virtqemud-sock")); found.Level != Failure || strings.Contains(found.Remedy, "virtstoraged") {
		t.Errorf("one is there: %+v", found)
	}
	listen("virtnetworkd-sock")
	if found = modular(filepath.Join(dir, "virtqemud-sock")); found.Level != OK {
		t.Errorf("both are there: %+v", found)
	}
	if found = modular("/run/libvirt/libvirt-sock"); found.Level != OK {
		t.Errorf("one daemon for all: %+v", found)
	}
}

func TestAGuestsAnswersAreJudged(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	const began = "1767323000"
	image := settings.Default().Images["default"]
	for name, test := range map[string]struct {
		look  func(patient) Finding
		said  map[string][]string
		level Level
		found string
	}{
		"no machine-id":             {patient.machineID, nil, OK, "none"},
		"an id to be made":          {patient.machineID, map[string][]string{"machine-id": {"1 uninitialized"}}, OK, "none"},
		"an id of this boot":        {patient.machineID, map[string][]string{"machine-id": {"1767323000 abc"}}, OK, "by the guest"},
		"an id of the image":        {patient.machineID, map[string][]string{"machine-id": {"1767322998 abc"}}, Failure, "abc is in the image"},
		"keys of the image":         {patient.hostKeys, map[string][]string{"host-key": {"1767323009 /etc/ssh/a", "5 /etc/ssh/b"}}, Warning, "b is in the image"},
		"keys of this boot":         {patient.hostKeys, map[string][]string{"host-key": {"1767323009 /etc/ssh/a"}}, OK, "by the guest"},
		"a clock that is right":     {patient.clock, map[string][]string{"clock": {"1767323045.200000000"}}, OK, "right within 0.2 s"},
		"a clock of seconds":        {patient.clock, map[string][]string{"clock": {"1767323045."}}, OK, "right within 0.1 s"},
		"a clock that is ahead":     {patient.clock, map[string][]string{"clock": {"1767326645.000000000"}}, Warning, "ahead of the host's by 1h0m0s"},
		"a clock that is behind":    {patient.clock, map[string][]string{"clock": {"0.5"}}, Warning, "behind"},
		"no clock":                  {patient.clock, nil, Warning, "does not tell"},
		"a server that asks names":  {patient.sshd, map[string][]string{"sshd": {"usedns yes", "gssapiauthentication yes"}}, Warning, "UseDNS and GSSAPIAuthentication"},
		"no bash":                   {patient.bash, nil, Failure, "no script"},
		"no sudo":                   {patient.sudo, nil, Warning, "gitlab-runner may not"},
		"a boot that costs nothing": {patient.bootCosts, map[string][]string{"host-key": {"5 /etc/ssh/ssh_host_rsa_key", "1767323009 /etc/ssh/ssh_host_ed25519_key"}}, OK, "nothing"},
		"a boot that costs": {patient.bootCosts, map[string][]string{"costs": {"console", "kernel 6.1.0-9-amd64", "unit snapd.service"},
			"host-key": {"1767323009 /etc/ssh/ssh_host_rsa_key"}}, Warning, "not quiet), kernel 6.1.0-9-amd64, which is not made for virtual machines, an RSA host key, snapd.service:"},
		"a boot that is told": {patient.bootTime, map[string][]string{"boot": {"Startup finished in 1s (kernel) = 1s"}, "slow": {"2.0s a.service"}}, OK, "1s (kernel) = 1s; slowest: a.service 2.0s"},
	} {
		p := patient{told: told{at: at, said: map[string][]string{"began": {began}}}, image: image, volume: "/pool/base"}
		for key, answers := range test.said {
			p.said[key] = answers
		}
		if got := test.look(p); got.Level != test.level || !strings.Contains(got.Found, test.found) {
			t.Errorf("%s: %+v", name, got)
		}
	}
	addresses := told{said: map[string][]string{"costs": {"addresses"}}}
	for emulated, want := range map[bool]Level{false: OK, true: Warning} {
		p := patient{told: addresses, image: image, volume: "/pool/base", emulated: emulated}
		if found := p.bootCosts(); found.Level != want || strings.Contains(found.Remedy, "randomize_va_space") != emulated {
			t.Errorf("random addresses in a guest that is emulated %v: %+v", emulated, found)
		}
	}
	p := patient{image: image}
	if found := p.git(); found.Level != Failure || found.Remedy != "" {
		t.Errorf("a guest whose system is not on its disk: %+v", found)
	}
}

func TestAGuestCannotWriteToTheTerminal(t *testing.T) {
	var a answers
	if _, err := a.Write([]byte("git \x1b[2Jgit version\u202e 2\nclock 1\n")); err != nil {
		t.Fatal(err)
	}
	if got := a.read().one("git"); got != "[2Jgit version 2" {
		t.Errorf("%q", got)
	}
	if _, err := a.Write(make([]byte, maxAnswers)); err == nil {
		t.Error("a guest may say what it likes")
	}
}

func TestVersionsAreCompared(t *testing.T) {
	for _, test := range []struct {
		a, b string
		want bool
	}{{"7.1.9", "7.2.0", true}, {"7.2.0", "7.2.0", false}, {"10.0.0", "7.2.0", false}, {"6.10.0", "7.2.0", true}} {
		if older(test.a, test.b) != test.want {
			t.Errorf("%s older than %s", test.a, test.b)
		}
	}
}

func TestMachinesThatShallStandReadyNeedTheService(t *testing.T) {
	s := settings.Default()
	image := s.Images["default"]
	image.Standby = 2
	s.Images["default"] = image
	d := &Doctor{settings: s, LockDir: t.TempDir()}
	if names := d.standing(); len(names) != 1 {
		t.Fatal(names)
	}
	if f := d.checkStandby(t.Context(), "default"); f.Level != Warning || !strings.Contains(f.Remedy, "libvirt-driver-standby") {
		t.Errorf("%+v", f)
	}
	lock, err := os.Create(filepath.Join(d.LockDir, "standby.lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if f := d.checkStandby(t.Context(), "default"); f.Level != OK {
		t.Errorf("%+v", f)
	}
}
