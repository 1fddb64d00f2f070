#!/usr/bin/env bash
# What the tests of this folder need: KubeRay's CRDs, etcd, openssl, the API server, which is built here.
#   require_parts.sh APISERVER    exits with 2, and with what is missing in the last line, where a part cannot be had
set -euo pipefail
lack() { echo "NOT TESTED ON KUBERNETES: $1"; exit 2; }
[ -n "${GRAFTWORK_CRDS:-}" ] && ls "$GRAFTWORK_CRDS"/*.yaml >/dev/null 2>&1 ||
  lack "GRAFTWORK_CRDS='${GRAFTWORK_CRDS:-}' is no folder with KubeRay's CRDs. Get them: git clone --depth 1 --branch v1.7.0 \
https://github.com/ray-project/kuberay && export GRAFTWORK_CRDS=\$PWD/kuberay/ray-operator/config/crd/bases"
for tool in etcd openssl; do
  command -v "$tool" >/dev/null || lack "no $tool here. Install: apt-get install etcd-server openssl"
done
bash "$(dirname "$0")/build_apiserver.sh" "$1" || lack "$1 could not be built. It needs root and: apt-get install mmdebstrap"
