package domainxml

import (
	"encoding/xml"
	"errors"
	"fmt"
	"time"
)

// Namespace is the XML namespace of the driver's metadata in a domain, and
// NamespacePrefix its usual prefix. A domain is the driver's only if it
// carries an element in this namespace; virsh metadata DOMAIN NAMESPACE shows
// it.
const (
	Namespace       = "urn:libvirt-driver:machine:1"
	NamespacePrefix = "libvirt-driver"
)

// Metadata says whose machine a domain is, for later stages and for people.
type Metadata struct {
	// Job, Project and Runner are GitLab's ids.
	Job     int64 `xml:"job"`
	Project int64 `xml:"project"`
	Runner  int64 `xml:"runner"`
	// JobURL leads to the job's page.
	JobURL string `xml:"job-url,omitempty"`
	// Image is the image's name in the driver's settings.
	Image string `xml:"image"`
	// Pool and Volume name the overlay.
	Pool   string `xml:"pool"`
	Volume string `xml:"volume"`
	// Network is the libvirt network that lends the guest its address.
	Network string `xml:"network"`
	// Start is how a machine came to be that was made before its job was known:
	// "standby" or "memory". Machine is then the job's name for it, empty while it
	// is nobody's; the domain has a name of its own.
	Start   string `xml:"start,omitempty"`
	Machine string `xml:"machine,omitempty"`
	// Created is when the machine was made, in UTC, to the second.
	Created time.Time `xml:"created"`
	// Owner is the process that had the machine made.
	Owner string `xml:"owner,omitempty"`
	// Address and HostKey are where the guest's SSH server was found and the
	// key that it showed, in authorized_keys format. Empty until prepare has
	// reached it.
	Address string `xml:"address,omitempty"`
	HostKey string `xml:"host-key,omitempty"`
}

// element is the one element that libvirt keeps for a namespace; see
// https://libvirt.org/formatdomain.html#general-metadata.
type element struct {
	XMLName xml.Name `xml:"machine"`
	// NS makes the namespace the element's own in a domain's XML. libvirt's
	// calls for metadata add and remove it themselves.
	NS string `xml:"xmlns,attr,omitempty"`
	Metadata
}

// title says whose machine it is to people who look at a list of domains.
func (m Metadata) title() string {
	if m.Job == 0 {
		return "made ahead for a GitLab job, image " + m.Image
	}
	return fmt.Sprintf("GitLab job %d of project %d", m.Job, m.Project)
}

// Element returns m as virDomainSetMetadata takes it.
func (m Metadata) Element() (string, error) {
	return m.marshal("")
}

func (m Metadata) marshal(namespace string) (string, error) {
	m.Created = m.Created.UTC().Truncate(time.Second)
	text, err := xml.Marshal(element{NS: namespace, Metadata: m})
	if err != nil {
		return "", fmt.Errorf("write metadata: %w", err)
	}
	return string(text), nil
}

// ParseMetadata reads what virDomainGetMetadata returns.
func ParseMetadata(text string) (Metadata, error) {
	var e element
	if err := xml.Unmarshal([]byte(text), &e); err != nil {
		return Metadata{}, fmt.Errorf("read metadata: %w", err)
	}
	// A zone can lead out of the years that a date can be written in.
	if e.Created = e.Created.UTC(); e.Created.Year() < 0 || e.Created.Year() > 9999 {
		return Metadata{}, errors.New("read metadata: the machine was made in no year that can be")
	}
	return e.Metadata, nil
}
