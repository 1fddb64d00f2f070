#!/usr/bin/env bash
# Build the API server of Kubernetes custom resources (apiextensions-apiserver) from Debian's packages alone.
#   build_apiserver.sh TARGET    TARGET becomes the binary; nothing happens when it is there
# Needs root, Debian's mmdebstrap and some 2 GB of disk for the time of the build; about 6 CPU-minutes.
set -euo pipefail
target=$1
[ -x "$target" ] && exit 0
work=$(mktemp -d "${TMPDIR:-/tmp}/gw-apiserver-XXXXXX")
trap 'rm -rf "$work"' EXIT
mirror=$(apt-get indextargets --format '$(REPO_URI)' | grep -m1 '/debian/\?$')
[ -n "$mirror" ] || { echo "no Debian mirror in apt's sources" >&2; exit 2; }
mmdebstrap --quiet --variant=minbase --aptopt='Acquire::Check-Valid-Until "false"' \
  --include=golang-k8s-apiextensions-apiserver-dev,golang-go,ca-certificates sid "$work/sid" "$mirror"
goroot=$(cd "$work/sid" && ls -d usr/lib/go-1.* | sort -V | tail -1)
version=$(chroot "$work/sid" dpkg-query -W -f '${Version}' golang-k8s-apiextensions-apiserver-dev)
dpkg --compare-versions "$version" ge 0.36 || { echo "Debian has k8s.io/apiextensions-apiserver $version; 0.36 is needed" >&2; exit 2; }
chroot "$work/sid" env -i GOROOT="/$goroot" PATH="/$goroot/bin:/usr/bin:/bin" HOME=/root GOTOOLCHAIN=local GOTELEMETRY=off \
  GO111MODULE=off GOPATH=/usr/share/gocode CGO_ENABLED=0 GOCACHE=/root/gocache sh -c \
  'cd /usr/share/gocode/src/k8s.io/apiextensions-apiserver && go build -p 2 -ldflags "-s -w" -o /root/apiserver .'
mkdir -p "$(dirname "$target")"
cp "$work/sid/root/apiserver" "$target.new.$$"
mv "$target.new.$$" "$target"
echo "$version" > "$target.version"
