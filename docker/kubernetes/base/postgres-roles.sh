#!/bin/sh
# PostgreSQL's image runs this once, on an empty volume: a database and an owner each for Fairway
# and MLflow, so that neither reads the other's.
set -eu
for name in fairway mlflow; do
  psql --quiet --no-psqlrc --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres \
    --set name="$name" --set password="$(cat "/run/secrets/${name}_db_password")" <<'SQL'
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
REVOKE ALL ON DATABASE :"name" FROM PUBLIC;
SQL
done
