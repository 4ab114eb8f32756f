# Everything here stands on scripts that run without just, too.

# Show the recipes.
default:
    @just --list

# Run one job of a pipeline in a real virtual machine and show its log.
demo:
    integration/demo.sh

# Run all tests: units, contract, release, on a private libvirtd with real guests.
test *args:
    integration/test.sh {{args}}

# Run every fuzz target for a while: just fuzz 10s, just fuzz 10m Replies.
fuzz *args:
    integration/fuzz.sh {{args}}

# Compare the driver with the documentation page's scripts, side by side.
bench *args:
    integration/bench.sh {{args}}

# Check the code without running it.
lint:
    integration/lint.sh

# Build the binary for this machine.
build:
    CGO_ENABLED=0 go build -tags urfave_cli_no_docs -trimpath -o libvirt-driver .

# Build the release tarballs for every architecture into dist/.
release folder="dist":
    packaging/release.sh {{folder}}
