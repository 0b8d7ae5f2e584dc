#!/bin/sh
# Capsid's part of Slurm's Prolog (root): makes /run/capsid/job-ID for the job and starts its supervisor as the user.
# Exits 0 whatever happens: a job without services is better than a drained node. Trouble: syslog, /run/capsid/trouble.
set -uf
PATH=/usr/sbin:/usr/bin:/sbin:/bin
CAPSID=/usr/local/bin/capsid
cd /
for n in "${SLURM_JOB_ID:-x}" "${SLURM_JOB_UID:-x}" "${SLURM_JOB_GID:-x}"; do
    case $n in *[!0-9]* | '') exit 0 ;; esac
done
[ "$SLURM_JOB_UID" != 0 ] || exit 0 # root has no services
trouble() { # where capsid itself cannot say it
    /usr/bin/logger -p daemon.warning -t capsid "job $SLURM_JOB_ID: $1" 2>/dev/null
    /usr/bin/mkdir -m 755 /run/capsid 2>/dev/null
    [ ! -O /run/capsid ] || [ -L /run/capsid ] || echo "$(/usr/bin/date +%s) job $SLURM_JOB_ID: $1" >>/run/capsid/trouble
}
# The comment and the directory are the user's words: data for the supervisor, which reads them as the user.
/usr/bin/timeout -k 2 20 /usr/bin/env -i SLURM_CONF="${SLURM_CONF:-/etc/slurm/slurm.conf}" \
    SLURM_JOB_NODELIST="${SLURM_NODELIST:-${SLURM_JOB_NODELIST:-}}" SLURMD_NODENAME="${SLURMD_NODENAME:-}" \
    CAPSID_JOB_COMMENT="${SLURM_JOB_COMMENT:-}" CAPSID_JOB_SERVICES="${SPANK_CAPSID_SERVICES:-}" \
    CAPSID_JOB_DIRECTORY="${SLURM_JOB_WORK_DIR:-}" \
    "$CAPSID" job begin --job "$SLURM_JOB_ID" --uid "$SLURM_JOB_UID" --gid "$SLURM_JOB_GID" </dev/null >/dev/null 2>&1
case $? in
    0 | 255) ;; # what it cannot do it says itself
    124 | 137) trouble "the Prolog's capsid job begin took too long" ;;
    126 | 127) trouble "the Prolog cannot execute $CAPSID: there are no services" ;;
    *) trouble "the Prolog's capsid job begin failed: there are no services" ;;
esac 2>/dev/null
exit 0
