#!/bin/sh
# Capsid's part of Slurm's TaskEpilog (the job's user): at the end of the batch script, services of all nodes get time to stop.
set -uf
[ -z "${SLURM_STEP_ID:-}" ] || exit 0
case ${SLURM_JOB_ID:-x} in *[!0-9]* | '') exit 0 ;; esac
[ -d /run/capsid ] || exit 0
CAPSID=/usr/local/bin/capsid
PATIENCE=20
/usr/bin/timeout $((PATIENCE + 5)) "$CAPSID" job stop --at-end --timeout "$PATIENCE" >/dev/null 2>&1
exit 0
