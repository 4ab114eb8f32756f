package driver

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"time"

	"libvirt-driver/driver/hypervisor"
	"libvirt-driver/driver/settings"
	"libvirt-driver/sshexec"
)

// keys are those that are made for one machine, where its image takes any.
type keys struct {
	// client logs in to the guest, in place of the key of the settings.
	client *sshexec.KeyPair
	// host is the guest's own. The driver keeps the public half alone.
	host *sshexec.KeyPair
}

// newKeys makes the keys that a machine gets which is to know the driver, and to
// be known, in this way.
func newKeys(way settings.HostKey) (k keys, err error) {
	if way == settings.HostKeyPinned {
		return k, nil
	}
	if k.client, err = sshexec.NewKeyPair(); err != nil {
		return k, err
	}
	if way == settings.HostKeyInjected {
		k.host, err = sshexec.NewHostKeyPair()
	}
	return k, err
}

// identityVolume returns the name of the volume by which a machine gets its
// keys.
func identityVolume(machine string) string { return machine + identitySuffix }

const identitySuffix = "-identity"

// inject puts the machine's keys where QEMU reads them as it starts, and returns
// the path.
//
// They are in a file, and neither in the domain nor on QEMU's command line, as
// every user of the host can read those.
func (mk *Maker) inject(ctx context.Context, m machine) (path string, err error) {
	if m.keys.host == nil {
		return "", nil
	}
	begun := time.Now()
	volume, err := mk.Hypervisor.CreateSecret(ctx, m.image.Pool, m.identity, []byte(provision(m.image, m.keys)))
	if err != nil {
		return "", fmt.Errorf("hand the guest its keys: %w", err)
	}
	mk.Log.Step("key", time.Since(begun), "%s, injected", m.keys.host)
	return volume.Path, nil
}

// blank overwrites what inject wrote: QEMU has read it, for as long as the
// machine runs. The file itself stays until cleanup. Without it libvirt, which
// gave it to QEMU's user, would take back none of the machine's files.
func (mk *Maker) blank(ctx context.Context, m machine) error {
	if m.keys.host == nil {
		return nil
	}
	if err := mk.Hypervisor.WipeVolume(ctx, m.image.Pool, m.identity); err != nil {
		return fmt.Errorf("wipe the guest's keys off the host's disk: %w", err)
	}
	return nil
}

// provision returns what gives the keys to a guest, in the format of
// https://www.freedesktop.org/software/systemd/man/latest/tmpfiles.d.html.
// The user's name has no character that means anything there, and the rest is
// encoded.
func provision(image settings.Image, k keys) string {
	encode := func(text string) string {
		return base64.StdEncoding.EncodeToString([]byte(strings.TrimSpace(text) + "\n"))
	}
	const hostKey = "/etc/ssh/ssh_host_ed25519_key"
	ssh := image.Home() + "/.ssh"
	return strings.Join([]string{
		"f+~ " + hostKey + " 0600 root root - " + encode(k.host.Private()),
		"f+~ " + hostKey + ".pub 0644 root root - " + encode(k.host.Public()),
		"d " + ssh + " 0700 " + image.User + " - -",
		"f+~ " + ssh + "/authorized_keys 0600 " + image.User + " - - " + encode(k.client.Public()),
		"",
	}, "\n")
}

// credentials returns how to knock at the machine's guest: who logs in, with
// which key, and which host key to expect, none when the first that is seen is
// to be taken. Only the address is missing.
func (mk *Maker) credentials(ctx context.Context, m machine) (knock, error) {
	k := knock{User: m.image.User, Shell: string(m.image.Shell), Limit: attempt}
	switch m.image.HostKey {
	case settings.HostKeyInjected:
		k.Own, k.HostKey = m.keys.client.Private(), m.keys.host.Public()
		return k, nil
	case settings.HostKeyAgent:
		begun := time.Now()
		key, print, err := mk.askForKey(ctx, m)
		if err != nil {
			return k, err
		}
		mk.Log.Step("key", time.Since(begun), "%s, by the agent", print)
		k.Own, k.HostKey = m.keys.client.Private(), key
		return k, nil
	}
	k.Key = m.image.Key
	return k, nil
}

// hostKeyFiles are where an SSH server has its public keys, best type first.
var hostKeyFiles = []string{
	"/etc/ssh/ssh_host_ed25519_key.pub",
	"/etc/ssh/ssh_host_ecdsa_key.pub",
	"/etc/ssh/ssh_host_rsa_key.pub",
}

// askForKey waits until the guest agent has told the guest's host key and has
// let the driver's key in. The agent's words come by a channel that nobody but
// the guest can speak on.
func (mk *Maker) askForKey(ctx context.Context, m machine) (key, print string, err error) {
	var last error
	for try := 0; ; try++ {
		key, print, err = mk.tryAgent(ctx, m)
		const remedy = `install and enable qemu-guest-agent in the image, and let it execute guest-file-open, ` +
			`guest-file-read and guest-ssh-add-authorized-keys, or set host_key = "pinned"`
		switch {
		case err == nil:
			return key, print, nil
		case errors.Is(err, hypervisor.ErrAgentRefuses):
			return "", "", fmt.Errorf("ask the guest agent of image %s: %w: %s", m.image.Name, err, remedy)
		case ctx.Err() != nil && last != nil:
			return "", "", fmt.Errorf("%w: asked the guest agent of image %s for the host key: %w: %s", context.Cause(ctx), m.image.Name, last, remedy)
		case ctx.Err() != nil:
			return "", "", context.Cause(ctx)
		case errors.Is(err, hypervisor.ErrUnreachable):
			return "", "", err
		}
		last = err
		pause(ctx, backoff(try))
	}
}

// tryAgent asks the guest agent once. A file that is not there, or not whole,
// may be in the making.
func (mk *Maker) tryAgent(ctx context.Context, m machine) (key, print string, err error) {
	var failures []error
	for _, file := range hostKeyFiles {
		text, err := mk.Hypervisor.ReadGuestFile(ctx, m.domain, file)
		if errors.Is(err, hypervisor.ErrNoAgent) || errors.Is(err, hypervisor.ErrAgentRefuses) || ctx.Err() != nil {
			return "", "", err
		}
		if err == nil {
			key, print, err = sshexec.CheckHostKey(string(text))
		}
		if err == nil {
			return key, print, mk.Hypervisor.AuthorizeKey(ctx, m.domain, m.image.User, m.keys.client.Public())
		}
		failures = append(failures, fmt.Errorf("%s: %w", file, err))
	}
	return "", "", failures[0]
}

// keyName names the key that logs in to the machine's guest.
func (m machine) keyName() string {
	if m.keys.client != nil {
		return "the key that was made for the job"
	}
	return m.image.Key
}

// stranger adds to a refusal of a guest's host key what may be behind it.
func stranger(err error, image settings.Image) error {
	switch {
	case !errors.Is(err, sshexec.ErrHostKey):
		return err
	case image.HostKey == settings.HostKeyInjected:
		return fmt.Errorf("%w: the guest did not take the key that was made for it, or something else answers at its address: "+
			`see what the image needs for host_key = "injected"`, err)
	}
	return fmt.Errorf("%w: something else than the guest answers at its address", err)
}
