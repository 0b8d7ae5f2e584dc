#!/bin/sh
# For runtimes that start the image's own action scripts. @ACTION@ is replaced when this is written.
for script in /.singularity.d/env/*.sh; do
    if [ -f "$script" ]; then
        . "$script"
    fi
done
@ACTION@
