//! Signals, terminals and job control, on a pseudo-terminal as a person has it.
#![allow(clippy::unwrap_used)]

mod common;

use std::process::{Child, Stdio};

use common::{Env, output, processes, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A container that says when it runs.
fn started(env: &Env, options: &[&str], image: &str, script: &str) -> Child {
    let mut child = env
        .command(
            ["exec"]
                .iter()
                .chain(options)
                .chain(&[image, "sh", "-c", script]),
        )
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut byte = [0];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut byte).unwrap();
    child
}

#[test]
fn signals_to_the_program_reach_the_payload() {
    let env = Env::new();
    let image = env.image();
    let image = image.to_str().unwrap();
    for options in [&[][..], &["--pid"]] {
        for (signal, name) in [
            (Signal::SIGTERM, "TERM"),
            (Signal::SIGINT, "INT"),
            (Signal::SIGHUP, "HUP"),
            (Signal::SIGUSR1, "USR1"),
        ] {
            let script = format!("trap 'exit 33' {name}; echo; while :; do sleep 0.05; done");
            let mut child = started(&env, options, image, &script);
            kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
            assert_eq!(child.wait().unwrap().code(), Some(33), "{options:?} {name}");
        }
    }
}

#[test]
fn killed_program_leaves_no_payload() {
    let env = Env::new();
    let image = env.image();
    let mark = format!("77.{}", std::process::id());
    for options in [&[][..], &["--pid"]] {
        let mut child = started(
            &env,
            options,
            image.to_str().unwrap(),
            &format!("echo; exec sleep {mark}"),
        );
        wait_until("the payload", || {
            processes()
                .iter()
                .any(|(_, line)| line == &format!("sleep {mark}"))
        });
        child.kill().unwrap();
        child.wait().unwrap();
        wait_until("the payload's end", || {
            !processes()
                .iter()
                .any(|(_, line)| line == &format!("sleep {mark}"))
        });
    }
    env.assert_nothing_left();
}

#[test]
fn ignored_hangup_stays_ignored() {
    let env = Env::new();
    let image = env.image();
    let line = format!(
        "nohup {} exec {} sh -c 'kill -HUP $$; echo alive'",
        env!("CARGO_BIN_EXE_capsid"),
        image.display()
    );
    let out = output(&mut env.command_as("/bin/sh".as_ref(), ["-c", &line]));
    assert_eq!(out.ok(), "alive");
}

#[test]
fn broken_pipe_ends_the_payload_quietly() {
    let env = Env::new();
    let image = env.image();
    let line = format!(
        "{} exec {} yes | head -n 1; echo ${{PIPESTATUS[0]}}",
        env!("CARGO_BIN_EXE_capsid"),
        image.display()
    );
    let out = output(&mut env.command_as("/bin/bash".as_ref(), ["-c", &line]));
    assert_eq!(out.ok(), "y\n141");
}

/// Drives a shell with job control on a pseudo-terminal; see the script.
fn on_a_terminal(env: &Env, image: &str, options: &str) {
    let script = env.path("drive.py");
    common::write(&script, PTY);
    let out = output(&mut env.command_as(
        "/usr/bin/python3".as_ref(),
        [
            script.to_str().unwrap(),
            env!("CARGO_BIN_EXE_capsid"),
            image,
            options,
        ],
    ));
    assert_eq!(out.ok(), "done");
}

#[test]
fn terminal_job_control_works() {
    let env = Env::new();
    let image = env.image();
    on_a_terminal(&env, image.to_str().unwrap(), "");
}

#[test]
fn terminal_job_control_works_behind_a_pid_namespace() {
    let env = Env::new();
    let image = env.image();
    on_a_terminal(&env, image.to_str().unwrap(), "--pid");
}

#[test]
fn interrupt_during_a_start_ends_it() {
    let env = Env::new();
    let image = env.image();
    let script = env.path("interrupt.py");
    common::write(&script, INTERRUPT);
    // Each time an image of its own: with the start of its server it takes longer.
    let copies = (0..30).map(|n| {
        let copy = env.path(&format!("{n}.sif"));
        std::fs::copy(&image, &copy).unwrap();
        copy.display().to_string()
    });
    let words = [
        script.display().to_string(),
        env!("CARGO_BIN_EXE_capsid").into(),
    ];
    let words: Vec<String> = words.into_iter().chain(copies).collect();
    let out = output(&mut env.command_as("/usr/bin/python3".as_ref(), &words));
    assert_eq!(out.ok(), "done");
}

/// A ^C, each time a millisecond later.
const INTERRUPT: &str = r#"
import os, pty, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_DFL)
program, *images = sys.argv[1:]
for delay_ms, image in enumerate(images):
    pid, fd = pty.fork()
    if pid == 0:
        os.execv(program, [program, "exec", "--pid", image, "sleep", "20"])
    # Before that a ^C is nobody's.
    while os.tcgetpgrp(fd) != pid:
        time.sleep(0.0002)
    time.sleep(delay_ms / 1000)
    begin = time.monotonic()
    os.write(fd, b"\x03")
    try:
        while os.read(fd, 4096):
            pass
    except OSError:
        pass # the terminal has no other side any more
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(fd)
    if time.monotonic() - begin > 15 or code not in (130, -signal.SIGINT):
        sys.exit("^C after %d ms: %d" % (delay_ms, code))
print("done")
"#;

const PTY: &str = r#"
import os, pty, sys, time, select, struct, fcntl, termios
program, image, options = sys.argv[1:]
pid, fd = pty.fork()
if pid == 0:
    os.environ["PS1"] = "$ "
    os.execv("/bin/bash", ["bash", "--norc", "-i"])
seen = ""
def expect(text, seconds=15):
    global seen
    end = time.time() + seconds
    while text not in seen:
        ready, _, _ = select.select([fd], [], [], max(0, end - time.time()))
        if not ready:
            sys.exit("waited for %r in vain, saw %r" % (text, seen))
        seen += os.read(fd, 4096).decode(errors="replace")
    seen = seen.split(text, 1)[1]
def send(text):
    os.write(fd, text.encode())
run = "%s exec %s %s " % (program, options, image)
expect("$ ")
# Ctrl-C ends the payload, and the shell sees why
send(run + "sh -c 'echo rea\"\"dy; exec sleep 100'\n"); expect("ready"); send("\x03"); send("echo status=$?=\n"); expect("status=130=")
# Ctrl-Z stops it, fg goes on
send(run + "sh -c 'echo rea\"\"dy; sleep 8; echo fin\"\"ished'\n"); expect("ready")
send("\x1a"); expect("Stopped"); send("fg\n"); expect("finished")
send("echo status=$?=\n"); expect("status=0=")
# the terminal is the caller's, and its size changes arrive
send(run + "sh -c 'tty; trap \"echo wi\"\"nch; exit\" WINCH; echo rea\"\"dy; while :; do sleep 0.1; done'\n")
expect("/dev/pts/"); expect("ready")
fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 99, 0, 0)); expect("winch")
send("exit\n")
os.waitpid(pid, 0)
print("done")
"#;

#[test]
fn terminal_cannot_be_typed_into() {
    let env = Env::new();
    let tree = env.tree("tree");
    let source = env.path("sti.c");
    common::write(
        &source,
        "#include <sys/ioctl.h>\n#include <sys/syscall.h>\n#include <errno.h>\n#include <unistd.h>\n\
         int main(void) { char c = 'x'; int bad = 0;\n\
         unsigned long numbers[] = {0x5412, 0x5412 | 1ul << 32, 0x541C, 0x541C | 1ul << 33};\n\
         long calls[] = {SYS_ioctl,\n\
         #ifdef __x86_64__\n\
         514, 0x40000000 | 514, 0x40000000 | SYS_ioctl,\n\
         #endif\n\
         };\n\
         for (unsigned c = 0; c < sizeof calls / sizeof *calls; c++)\n\
         for (int i = 0; i < 4; i++) { long r = syscall(calls[c], 0, numbers[i], &c); bad |= !(r == -1 && errno == EPERM); }\n\
         bad |= syscall(SYS_ioctl, -1, 0x5401, &c) != -1 || errno != EBADF;\n\
         return bad; }\n",
    );
    output(
        std::process::Command::new("gcc")
            .args(["-static", "-o"])
            .arg(tree.join("bin/sti"))
            .arg(&source),
    )
    .ok();
    let image = env.sif(&tree, "image.sif");
    env.run(["exec", image.to_str().unwrap(), "sti"]).ok();
}

#[test]
fn closed_standard_descriptors_are_no_trouble() {
    let env = Env::new();
    let image = env.image();
    let line = format!(
        "{} exec {} sh -c 'exit 5' <&- >&- 2>&-; echo $?",
        env!("CARGO_BIN_EXE_capsid"),
        image.display()
    );
    let out = output(&mut env.command_as("/bin/sh".as_ref(), ["-c", &line]));
    assert_eq!(out.ok(), "5");
}

#[test]
fn descriptors_of_the_caller_pass_but_directories_do_not() {
    let env = Env::new();
    let image = env.image();
    let line = format!(
        "exec 7</etc/hostname 8</etc; {} exec $0 {} sh -c 'ls /proc/$$/fd; true'",
        env!("CARGO_BIN_EXE_capsid"),
        image.display()
    );
    let run = |options: &str| {
        output(&mut env.command_as("/bin/bash".as_ref(), ["-c", &line.replace("$0", options)]))
    };
    assert_eq!(run("").ok(), "0\n1\n2\n7");
    assert_eq!(run("--containall").ok(), "0\n1\n2");
}
