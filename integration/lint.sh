#!/usr/bin/env bash
# lint.sh: checks the code without running it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

unformatted=$(gofmt -l $(git ls-files '*.go'))
[[ -z $unformatted ]] || { echo "gofmt would change: $unformatted" >&2; exit 1; }
go vet ./...
go vet -tags integration ./...
go run honnef.co/go/tools/cmd/staticcheck@v0.8.2 -tags integration ./...
go mod tidy -diff
echo "lint: nothing found"
