#!/bin/sh
# Capsid's part of Slurm's Epilog (root): ends what is left of the job, and removes /run/capsid/job-ID. Can be repeated.
# Exits 0 whatever happens; with STRICT=1 it exits 1, which drains the node, when something could not be removed.
set -uf
PATH=/usr/sbin:/usr/bin:/sbin:/bin
CAPSID=/usr/local/bin/capsid
STRICT=0
cd /
# With PrologFlags=RunInJob, slurmstepd before 26.05 starts this as the job's user where another thread of it has given up root
# for a moment. slurm.conf names this script twice then: the next call comes after that, and as root.
if [ "$(/usr/bin/id -u)" != 0 ]; then
    /usr/bin/sleep 1
    exit 0
fi
case ${SLURM_JOB_ID:-x} in *[!0-9]* | '') exit 0 ;; esac
/usr/bin/timeout -k 2 25 /usr/bin/env -i "$CAPSID" job end --job "$SLURM_JOB_ID" </dev/null >/dev/null 2>&1 && exit 0
exit "$STRICT"
