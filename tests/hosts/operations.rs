//! What is tried on every host. A step is a script: what fails in it is the cell's outcome.

/// One row of the table.
pub struct Operation {
    pub name: &'static str,
    pub steps: &'static [Step],
}

/// Who runs a script of an operation.
pub enum Step {
    /// The user, in a login of its own.
    User(&'static str),
    /// Root, meanwhile: what the machine does.
    Root(&'static str),
}

use Step::{Root, User};

/// What each script of the user's may use: `is` compares what a command printed.
pub const PRELUDE: &str = r#"
export PATH=/mnt/share/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin W=/srv/work
cd $W
is() { # EXPECTED COMMAND...
    local want=$1 got; shift
    got=$("$@") || return
    [ "$got" = "$want" ] || { echo "expected: $want, got: $got" >&2; return 1; }
}
"#;

const fn user(name: &'static str, steps: &'static [Step]) -> Operation {
    Operation { name, steps }
}

/// All of them. An operation leaves nothing that the next one meets.
pub const OPERATIONS: &[Operation] = &[
    user("exec", &[User("is hi apptainer exec $IMG echo hi")]),
    user(
        "status",
        &[User(
            "s=0; apptainer exec $IMG sh -c 'exit 7' || s=$?; case $s in 255) exit 255;; esac; [ $s = 7 ]",
        )],
    ),
    user(
        "run",
        &[User(
            r#"s=0; out=$(apptainer run $IMG a b) || s=$?; [ $s != 255 ] || exit 255; [ $s = 3 ]; [[ $out == *"args: a b"* ]]"#,
        )],
    ),
    user(
        "shell",
        &[User("is there apptainer shell $IMG <<<'echo there'")],
    ),
    user(
        "who",
        &[User(
            r#"is "$(id -u)" apptainer exec $IMG id -u; is "$(id -g)" apptainer exec $IMG id -g"#,
        )],
    ),
    user(
        "containall",
        &[User("is hi apptainer exec --containall $IMG echo hi")],
    ),
    user(
        "contain",
        &[User(
            "is hi apptainer exec --contain --cleanenv --ipc $IMG echo hi; is '' apptainer exec --contain $IMG ls /tmp",
        )],
    ),
    user(
        "pid",
        &[User(
            "is 1 apptainer exec --pid $IMG sh -c 'ls -d /proc/1 | wc -l'",
        )],
    ),
    user(
        "net-none",
        &[User(
            "is 1 apptainer exec --net --network none $IMG sh -c 'grep -c : /proc/net/dev'",
        )],
    ),
    user(
        "cwd",
        &[User(
            "cd $W; echo here >mark; is here apptainer exec $IMG cat mark; rm mark",
        )],
    ),
    user(
        "home-mount",
        &[User(
            "[ ! -v APPTAINER_NO_HOME ] || exit 0; cd $W; home=$(getent passwd $(id -u) | cut -d: -f6); if [ -w \"$home\" ]; then is hi apptainer exec $IMG sh -c 'echo hi >~/written; cat ~/written'; is hi cat $home/written; rm $home/written; else apptainer exec $IMG true; fi",
        )],
    ),
    user(
        "home",
        &[User(
            "[ ! -v APPTAINER_NO_HOME ] || unset APPTAINER_NO_HOME; mkdir -p $W/h; is hi apptainer exec --home $W/h:/x $IMG sh -c 'cd; echo hi >f; pwd >&2; cat f'; is hi cat $W/h/f; rm -r $W/h",
        )],
    ),
    user(
        "no-home",
        &[User("is hi apptainer exec --no-home $IMG echo hi")],
    ),
    user(
        "bind-directory",
        &[User(
            "is 'of the host' apptainer exec -B /srv/data:/d $IMG cat /d/file",
        )],
    ),
    user(
        "bind-file",
        &[User(
            "is 'of the host' apptainer exec -B /srv/data/file:/new/f:ro $IMG cat /new/f",
        )],
    ),
    user(
        "bind-link",
        &[User(
            "is 'of the host' apptainer exec -B /opt/link:/d $IMG cat /d/file; is 'of the host' apptainer exec -B /srv/work/../data/file:/f $IMG cat /f",
        )],
    ),
    user(
        "bind-below-bind",
        &[User(
            "mkdir -p $W/a $W/b; touch $W/b/f; is f apptainer exec -B $W/b:/x/made/here -B $W/a:/x $IMG ls /x/made/here; rm -r $W/a $W/b",
        )],
    ),
    user(
        "bind-mount",
        &[User(
            "is 'of the host' apptainer exec --mount type=bind,source=/srv/data/file,target=/home/in.txt,readonly $IMG cat /home/in.txt",
        )],
    ),
    user(
        "staged-input",
        &[User(
            "unset APPTAINER_NO_HOME; mkdir $W/o; is 'of the host' apptainer exec -c --home $W/o:/x --mount type=bind,source=/srv/data/file,target=/x/in.txt,readonly --pwd /x $IMG cat in.txt; rm -r $W/o",
        )],
    ),
    user(
        "resolv-conf",
        &[User(
            r#"is "$(cat /etc/resolv.conf)" apptainer exec $IMG cat /etc/resolv.conf"#,
        )],
    ),
    user(
        "localtime",
        &[User(
            r#"is "$(date -d @0 +%H)" apptainer exec $IMG date -d @0 +%H"#,
        )],
    ),
    user(
        "overlay",
        &[User(
            "mkdir $W/ov; apptainer exec --overlay $W/ov $IMG sh -c 'echo new >/opt/new'; is new apptainer exec --overlay $W/ov $IMG cat /opt/new; rm -rf $W/ov",
        )],
    ),
    user(
        "writable-tmpfs",
        &[User(
            "is new apptainer exec --writable-tmpfs $IMG sh -c 'echo new >/opt/new; cat /opt/new'",
        )],
    ),
    user(
        "fakeroot",
        &[User("is 0 apptainer exec --fakeroot $IMG id -u")],
    ),
    user(
        "fakeroot-one-id",
        &[User(
            "cd $W; is 0 apptainer exec --fakeroot --ignore-subuid $IMG sh -c 'touch t && chown 5:6 t && rm t && id -u'",
        )],
    ),
    user(
        "fakeroot-account",
        &[User(
            "is 1 apptainer exec --fakeroot --writable-tmpfs $IMG sh -c 'cp /etc/passwd /etc/passwd+ && echo bob:x:9:9::/:/bin/sh >>/etc/passwd+ && mv /etc/passwd+ /etc/passwd && grep -c ^bob: /etc/passwd'",
        )],
    ),
    user(
        "sandbox",
        &[User(
            "apptainer -s build --sandbox $W/sb $IMG; is hi apptainer exec $W/sb echo hi; apptainer exec --writable $W/sb touch /opt/w; [ -e $W/sb/opt/w ]; chmod -R u+w $W/sb; rm -rf $W/sb",
        )],
    ),
    user(
        "build",
        &[User(
            "printf 'Bootstrap: localimage\\nFrom: %s\\n%%post\\n echo built >/opt/made\\n' $IMG >$W/d.def; apptainer -s build -F $W/o.sif $W/d.def; is built apptainer exec $W/o.sif cat /opt/made; rm -f $W/o.sif $W/d.def",
        )],
    ),
    user(
        "pull",
        &[User(
            "apptainer -s pull --disable-cache $W/p.sif $URL; is hi apptainer exec $W/p.sif echo hi; rm -f $W/p.sif",
        )],
    ),
    user(
        "inspect",
        &[User("apptainer inspect --json $IMG | grep -q attributes")],
    ),
    user(
        "cache-list",
        &[User("apptainer cache list | grep -q 'container file'")],
    ),
    user(
        "test-x",
        &[User(
            "is no apptainer exec $IMG sh -c 'test -x /opt/hello.txt && echo yes || echo no'",
        )],
    ),
    user(
        "server-holds-nothing",
        &[
            User("apptainer exec $IMG true"),
            Root(
                "for pid in $(pgrep capsid-image); do mounts=$(cat /proc/$pid/mountinfo 2>/dev/null) || continue; cwd=$(readlink /proc/$pid/cwd) || continue; [ $(wc -l <<<\"$mounts\") -le 2 ]; [ $cwd = / ]; done",
            ),
        ],
    ),
    user(
        "instance",
        &[User(
            "apptainer instance start --pid-file $W/pf $IMG web-$HOST; [ -s $W/pf ]; is 1 sh -c \"apptainer instance list | grep -c ^web-$HOST\"; \
         is in apptainer exec instance://web-$HOST echo in; apptainer instance stop web-$HOST; is '' apptainer instance list -q 2>/dev/null || is 0 sh -c \"apptainer instance list | grep -c ^web-$HOST || true\"; rm -f $W/pf",
        )],
    ),
    user(
        "instance-dead",
        &[User(
            "apptainer instance start $IMG kd-$HOST; kill -9 $(apptainer instance list --json kd-$HOST | sed -n 's/.*\"pid\": \\([0-9]*\\).*/\\1/p'); \
         for i in $(seq 100); do n=$(apptainer instance list | grep -c ^kd-$HOST || true); [ $n = 0 ] && break; sleep .05; done; [ $n = 0 ]; \
         apptainer instance start $IMG kd-$HOST; apptainer instance stop kd-$HOST",
        )],
    ),
    user(
        "instance-logout",
        &[
            User("apptainer instance start $IMG out-$HOST"),
            Root("umount -l /run/user/$HOST_UID 2>/dev/null || true"),
            User("is in apptainer exec instance://out-$HOST echo in"),
            Root(
                "if [ -d /run/user/$HOST_UID ]; then mount -t tmpfs -o mode=700,uid=$HOST_UID,gid=$HOST_UID run /run/user/$HOST_UID; fi",
            ),
            User(
                "is in apptainer exec instance://out-$HOST echo in; ! apptainer instance start $IMG out-$HOST 2>/dev/null; apptainer instance stop out-$HOST; is 0 sh -c 'apptainer instance list | grep -c ^out-$HOST || true'",
            ),
        ],
    ),
    user(
        "instance-cron",
        &[
            User("apptainer instance start $IMG cron-$HOST"),
            User(
                "unset XDG_RUNTIME_DIR HOME TMPDIR USER LOGNAME; is in apptainer exec instance://cron-$HOST echo in; apptainer instance stop cron-$HOST",
            ),
        ],
    ),
    user(
        "instance-cleaned",
        &[
            User("apptainer instance start $IMG old-$HOST"),
            Root("find /tmp /var/tmp -mindepth 1 -xdev -delete 2>/dev/null || true"),
            User(
                "is in apptainer exec instance://old-$HOST echo in; apptainer instance stop old-$HOST",
            ),
        ],
    ),
];
