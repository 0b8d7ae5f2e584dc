#!/bin/sh
OCI_ENTRYPOINT=@ENTRYPOINT@
OCI_CMD=@CMD@

# SINGULARITY_NO_EVAL: the words as they are, as OCI runtimes pass them.
if [ -n "$SINGULARITY_NO_EVAL" ]; then
    if [ $# -eq 0 ]; then
        set -- @CMD_WORDS@
    fi
    set -- @ENTRYPOINT_WORDS@ "$@"
    if [ $# -eq 0 ]; then
        set -- /bin/sh
    fi
    exec "$@"
fi

# Else the shell evaluates them once more, the caller's words among them, as Singularity has always done.
CMDLINE_ARGS=""
for arg in "$@"; do
    CMDLINE_ARGS="${CMDLINE_ARGS} \"$arg\""
done
if [ $# -gt 0 ]; then
    SINGULARITY_OCI_RUN="${OCI_ENTRYPOINT} ${CMDLINE_ARGS}"
else
    SINGULARITY_OCI_RUN="${OCI_ENTRYPOINT} ${OCI_CMD}"
fi
eval "set -- ${SINGULARITY_OCI_RUN}"
if [ $# -eq 0 ]; then
    set -- /bin/sh
fi
exec "$@"
