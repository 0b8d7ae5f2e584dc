#!/bin/sh
# Activates the application that was asked for.
if [ -n "${SINGULARITY_APPNAME:-}" ]; then
    export SINGULARITY_APPNAME
    SCIF_APPS=/scif/apps
    SCIF_APPROOT="$SCIF_APPS/$SINGULARITY_APPNAME"
    if [ ! -d "$SCIF_APPROOT" ]; then
        echo "Could not locate the container application: $SINGULARITY_APPNAME"
        exit 1
    fi
    PATH="$SCIF_APPROOT:$PATH"
    if [ -d "$SCIF_APPROOT/bin" ]; then
        PATH="$SCIF_APPROOT/bin:$PATH"
    fi
    if [ -d "$SCIF_APPROOT/lib" ]; then
        LD_LIBRARY_PATH="$SCIF_APPROOT/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
        export LD_LIBRARY_PATH
    fi
    export PATH SCIF_APPS SCIF_APPROOT
    if [ -f "$SCIF_APPROOT/scif/env/01-base.sh" ]; then
        . "$SCIF_APPROOT/scif/env/01-base.sh"
    fi
    if [ -f "$SCIF_APPROOT/scif/env/90-environment.sh" ]; then
        . "$SCIF_APPROOT/scif/env/90-environment.sh"
    fi
fi
