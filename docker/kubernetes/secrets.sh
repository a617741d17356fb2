#!/bin/sh
# Print the Secrets that the manifests refer to, with passwords made here and kept nowhere else:
#   docker/kubernetes/secrets.sh | kubectl create -f -
# `create` refuses to replace what is there: a database knows its passwords already.
set -eu
namespace=${1:-fairway}

random() {
  od -An -vtx1 -N32 /dev/urandom | tr -d ' \n'
}

cat <<YAML
apiVersion: v1
kind: Secret
metadata:
  name: postgres
  namespace: $namespace
type: Opaque
stringData:
  postgres_password: "$(random)"
  fairway_db_password: "$(random)"
  mlflow_db_password: "$(random)"
---
apiVersion: v1
kind: Secret
metadata:
  name: ray-token
  namespace: $namespace
type: Opaque
stringData:
  auth_token: "$(random)"
YAML
