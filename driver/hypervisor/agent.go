package hypervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/digitalocean/go-libvirt"
)

var (
	// ErrNoAgent: no guest agent answers in the guest, as long as it boots or
	// because it has none.
	ErrNoAgent = errors.New("no guest agent answers")
	// ErrAgentRefuses: the guest agent does not have the command, or is
	// configured not to execute it.
	ErrAgentRefuses = errors.New("the guest agent does not do this")
)

const (
	// agentPatience is how long an agent may take for one command, in seconds.
	agentPatience = 10
	// maxGuestFile is how much of a guest's file is read, in bytes.
	maxGuestFile = 16 << 10
)

// ReadGuestFile returns the first 16 KiB of a file in the guest, as the guest
// agent reads them. ErrNoAgent and ErrAgentRefuses tell why there is none. The
// content is whatever the guest says.
//
// https://www.qemu.org/docs/master/interop/qemu-ga-ref.html
func (c *Connection) ReadGuestFile(ctx context.Context, domain, path string) ([]byte, error) {
	fail := func(err error) ([]byte, error) {
		return nil, fmt.Errorf("read %s in the guest %s: %w", path, domain, err)
	}
	var handle int64
	if err := c.agent(ctx, domain, "guest-file-open", map[string]any{"path": path, "mode": "r"}, &handle); err != nil {
		return fail(err)
	}
	var read struct {
		Content []byte `json:"buf-b64"`
	}
	err := c.agent(ctx, domain, "guest-file-read", map[string]any{"handle": handle, "count": maxGuestFile}, &read)
	closed := c.agent(ctx, domain, "guest-file-close", map[string]any{"handle": handle}, nil)
	if err := errors.Join(err, closed); err != nil {
		return fail(err)
	}
	return read.Content, nil
}

// AuthorizeKey has the guest agent make key, in the format of an
// authorized_keys file, the only one in the account's own authorized_keys.
// ErrNoAgent and ErrAgentRefuses tell why it did not.
//
// https://www.qemu.org/docs/master/interop/qemu-ga-ref.html
func (c *Connection) AuthorizeKey(ctx context.Context, domain, user, key string) error {
	err := c.agent(ctx, domain, "guest-ssh-add-authorized-keys",
		map[string]any{"username": user, "keys": []string{key}, "reset": true}, nil)
	if err != nil {
		return fmt.Errorf("authorize a key for %s in the guest %s: %w", user, domain, err)
	}
	return nil
}

// agent has the guest agent execute a command, and reads its answer into reply
// unless that is nil.
//
// https://libvirt.org/html/libvirt-libvirt-qemu.html#virDomainQemuAgentCommand
func (c *Connection) agent(ctx context.Context, domain, command string, arguments, reply any) error {
	text, err := json.Marshal(map[string]any{"execute": command, "arguments": arguments})
	if err != nil {
		return err
	}
	var answer libvirt.OptString
	err = c.domain(ctx, domain, func(rpc *libvirt.Libvirt, d libvirt.Domain) (err error) {
		answer, err = rpc.QEMUDomainAgentCommand(d, string(text), agentPatience, 0)
		return err
	})
	switch {
	case is(err, libvirt.ErrAgentUnresponsive), is(err, libvirt.ErrAgentUnsynced), is(err, libvirt.ErrAgentCommandTimeout):
		return fmt.Errorf("%w: %w", ErrNoAgent, err)
	case err != nil && refused(err):
		return fmt.Errorf("%w: %w", ErrAgentRefuses, err)
	case err != nil || reply == nil:
		return err
	}
	var doc struct {
		Return json.RawMessage `json:"return"`
	}
	if len(answer) > 0 {
		err = json.Unmarshal([]byte(answer[0]), &doc)
	}
	if err == nil {
		err = json.Unmarshal(doc.Return, reply)
	}
	if err != nil {
		return fmt.Errorf("%s: the agent's answer: %w", command, err)
	}
	return nil
}

// refused reports whether an agent's error is its answer to a command that it
// does not have or must not execute. libvirt passes on its words alone.
func refused(err error) bool {
	return strings.Contains(err.Error(), "has been disabled") || strings.Contains(err.Error(), "has not been found")
}
