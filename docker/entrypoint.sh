#!/bin/sh
# Run a command with the database's password out of a file, where PGPASSWORD_FILE names one.
# libpq reads it from the environment; from its own file it would take no secret that others
# in the container can read.
set -eu
umask 027
if [ -n "${PGPASSWORD_FILE:-}" ]; then
  if [ ! -r "$PGPASSWORD_FILE" ]; then
    echo "PGPASSWORD_FILE=$PGPASSWORD_FILE: not readable by user $(id -u); mount the secret" >&2
    exit 2
  fi
  PGPASSWORD=$(cat "$PGPASSWORD_FILE")
  export PGPASSWORD
fi
exec "$@"
