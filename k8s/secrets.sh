#!/usr/bin/env bash
# Prints the Secrets that k8s/ and the profiles name, with values drawn now: k8s/secrets.sh prod | kubectl create -f -
# (kind: with those of its S3 server.)
# `create` refuses where they are there already, so a running MLflow keeps its password. Nothing is written to a disk.
set -euo pipefail
overlay=${1:-}
case "$overlay" in kind | prod) ;; *) echo "usage: k8s/secrets.sh kind|prod" >&2; exit 2 ;; esac
draw() { head -c 32 /dev/urandom | od -An -vtx1 | tr -d ' \n'; }
database=$(draw) session=$(draw) person=$(draw) ray=$(draw)
cat <<EOF
apiVersion: v1
kind: Secret
metadata: {name: crab-ray-token, namespace: crab}
stringData: {auth_token: "$ray"}
---
apiVersion: v1
kind: Secret
metadata: {name: crab-mlflow, namespace: crab}
stringData: {user: crab, password: "$person"}
---
apiVersion: v1
kind: Secret
metadata: {name: crab-mlflow-server, namespace: crab}
stringData:
  database_password: "$database"
  database_uri: "postgresql+psycopg2://mlflow:$database@crab-postgres.crab.svc:5432/mlflow"
  session_key: "$session"
  auth.ini: |
    [mlflow]
    default_permission = READ
    database_uri = postgresql+psycopg2://mlflow:$database@crab-postgres.crab.svc:5432/mlflow
    admin_username = crab
    admin_password = $person
    authorization_function = mlflow.server.auth:authenticate_request_basic_auth
EOF

if [ "$overlay" = kind ]; then
  access=$(draw) secret=$(draw)
  cat <<EOF
---
apiVersion: v1
kind: Secret
metadata: {name: crab-s3, namespace: crab}
stringData:
  access_key: "$access"
  secret_key: "$secret"
  s3.json: |
    {"identities": [{"name": "crab", "actions": ["Admin", "Read", "Write", "List", "Tagging"],
                     "credentials": [{"accessKey": "$access", "secretKey": "$secret"}]}]}
EOF
fi
