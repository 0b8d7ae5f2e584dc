#!/bin/sh
# Capsid's part of Slurm's TaskProlog (the job's user): tells tasks where the services of their job are.
set -uf
case ${SLURM_JOB_ID:-x} in *[!0-9]* | '') exit 0 ;; esac
CAPSID=/usr/local/bin/capsid
if [ "${SLURM_RESTART_COUNT:-0}" != 0 ] && [ ! -d "/run/capsid/job-$SLURM_JOB_ID" ] && [ -d /run/capsid ] &&
    [ -z "${SLURM_STEP_ID:-}" ] && [ "$(/usr/bin/id -u)" != 0 ]; then
    # No Prolog of ours ran for this job: Slurm 22.05 leaves it out when a requeued job starts soon after it ended.
    # Supervisors in a step of the job do as well. `squeue` tells the comment, which only a Prolog is given.
    CAPSID_JOB_COMMENT=$(/usr/bin/timeout 5 squeue -h -j "$SLURM_JOB_ID" -o %k 2>/dev/null </dev/null) CAPSID_JOB_DIRECTORY=$PWD \
        /usr/bin/timeout 20 "$CAPSID" job services </dev/null >/dev/null 2>&1
fi
[ -d "/run/capsid/job-$SLURM_JOB_ID/capsid" ] || [ -z "${SLURM_STEP_ID:-}" ] || exit 0
told=
[ -n "${SLURM_STEP_ID:-}" ] || told=--task-prolog # once in the job's output
/usr/bin/timeout 40 "$CAPSID" job env $told 2>/dev/null
exit 0
