#!/bin/sh
# Capsid's part of Slurm's Epilog (root): ends what is left of the job, and removes /run/capsid/job-ID. Can be repeated.
# Exits 0 whatever happens; with STRICT=1 it exits 1, which drains the node, when something could not be removed.
set -uf
PATH=/usr/sbin:/usr/bin:/sbin:/bin
CAPSID=/usr/local/bin/capsid
STRICT=0
cd /
case ${SLURM_JOB_ID:-x} in *[!0-9]* | '') exit 0 ;; esac
/usr/bin/timeout -k 2 25 /usr/bin/env -i "$CAPSID" job end --job "$SLURM_JOB_ID" </dev/null >/dev/null 2>&1 && exit 0
exit "$STRICT"
