# Stands in for PostgreSQL's own image where no registry is in reach: Debian's server behind the
# part of that image's entrypoint that compose.yaml uses. Its socket is in /tmp, since podman puts a
# tmpfs of its own over /run where the root is read-only.
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
RUN groupadd --gid 999 postgres \
    && useradd --no-log-init --uid 999 --gid 999 --home-dir /var/lib/postgresql postgres \
    && apt-get update \
    && apt-get install -y --no-install-recommends "postgresql-15=15.*" \
    && rm -rf /var/lib/apt/lists/* /var/lib/postgresql/* \
    && install -d -o 999 -g 999 -m 0700 /var/lib/postgresql/data
COPY postgres-entrypoint.sh /usr/local/bin/postgres-entrypoint.sh
ENV PATH=/usr/lib/postgresql/15/bin:$PATH \
    PGDATA=/var/lib/postgresql/data \
    PGHOST=/tmp
USER 999:999
ENTRYPOINT ["postgres-entrypoint.sh"]
