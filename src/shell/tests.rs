//! The same scripts in this shell and in the machine's `/bin/sh`: the same variables.

use std::process::Command;

use super::*;

struct Machine;

impl Files for Machine {
    fn test(&self, test: u8, path: &[u8]) -> Option<bool> {
        let path = std::path::Path::new(std::str::from_utf8(path).ok()?);
        match test {
            b'e' => Some(path.exists()),
            b'd' => Some(path.is_dir()),
            b'f' => Some(path.is_file()),
            b'L' => Some(path.is_symlink()),
            _ => None,
        }
    }
    fn read(&self, _: &[u8]) -> Option<Vec<u8>> {
        None
    }
    fn names(&self, directory: &[u8]) -> Option<Vec<Vec<u8>>> {
        let path = std::path::Path::new(std::str::from_utf8(directory).ok()?);
        let names = std::fs::read_dir(path).into_iter().flatten().flatten();
        Some(
            names
                .map(|e| e.file_name().into_string().unwrap().into_bytes())
                .collect(),
        )
    }
}

const START: [(&str, &str); 4] = [
    ("PATH", "/usr/bin:/bin"),
    ("HOME", "/home/x"),
    ("EMPTY", ""),
    ("HOST", "a  b*"),
];

fn here(script: &str) -> Result<Vec<String>, Unsupported> {
    let mut state = State {
        params: vec![b"one".to_vec(), b"two words".to_vec()],
        ..State::default()
    };
    for (name, value) in START {
        state.export(name.as_bytes(), value.as_bytes());
    }
    run(script.as_bytes(), &mut state, &Machine)?;
    let mut lines = vec![format!(
        "out={} err={}",
        String::from_utf8_lossy(&state.out),
        String::from_utf8_lossy(&state.err)
    )];
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let vars = state.handed_on();
    lines.extend(vars.map(|(name, value)| format!("{}={}", text(&name), text(&value))));
    Ok(lines)
}

fn there(shell: &str, script: &str) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("script");
    std::fs::write(&file, script).unwrap();
    let line = format!(
        ". {} ; /usr/bin/env -0 > {}/env",
        file.display(),
        dir.path().display()
    );
    let out = Command::new(shell)
        .args(["-c", &line, "sh", "one", "two words"])
        .env_clear()
        .envs(START)
        .output()
        .unwrap();
    let text = std::fs::read_to_string(dir.path().join("env")).unwrap();
    let mut vars: Vec<String> = text
        .split_terminator('\0')
        .filter(|l| {
            !["PWD=", "SHLVL=", "_=", "OLDPWD="]
                .iter()
                .any(|n| l.starts_with(n))
        })
        .map(str::to_owned)
        .collect();
    vars.sort();
    let mut lines = vec![format!(
        "out={} err={}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    )];
    lines.extend(vars);
    lines
}

const SCRIPTS: &[&str] = &[
    "A=1\nexport A B=2 C",
    "export PATH=/opt/bin:$PATH",
    "export A=\"it's $HOME\" B='$HOME' C=a\\ b D=\\$x",
    "export A=${X:-default} B=${X-default} C=${EMPTY:-e} D=${EMPTY-e} E=${HOME:+set} F=${X:+set}",
    "export OCI=\"${OCI:-\"oci value\"}\"",
    "export Q=\"${Q:-\"it's \\\\\\\"q\\\\\\\" \\\\$HOME\"}\"",
    "export A=\"${X:-a b}\" B=\"${X:-'s'}\" C=${X:-'s  t'} D=${X:-$HOME/x}",
    ": ${NEW:=value}\nexport NEW",
    "export L=${#HOME} P=${PATH%%:*} S=${PATH##*:} M=${HOME#/home/} E=${PATH%:*}",
    "if [ -z \"${X:-}\" ]; then A=empty; else A=full; fi; export A",
    "if test -n \"$HOME\" && [ \"$HOME\" = /home/x ]; then export A=yes; elif false; then export A=no; fi",
    "if [ -d /etc ]; then export D=1; fi; if [ ! -f /etc ]; then export F=1; fi",
    "[ -z \"$X\" ] || export A=1\n[ -n \"$X\" ] || export B=1",
    "for i in a \"b c\" $HOST2 d; do R=\"$R[$i]\"; done; export R",
    "for i; do R=\"$R[$i]\"; done; export R",
    "for i in \"$@\"; do R=\"$R[$i]\"; done; export R N=$#",
    "S=\"a b  c\"\nfor i in $S; do R=\"$R[$i]\"; done; export R",
    "case \"$HOME\" in /root) A=1;; /home/*|/usr/*) A=2;; *) A=3;; esac; export A",
    "case x in (y) export A=1 ;; x) export A=2 ;; esac",
    "export A=1 # comment\n# whole line\n\nexport B=a#b",
    "export A=one\\\ntwo",
    "export LD=\"${LD:+$LD:}/lib\"",
    "unset HOME; export A=${HOME-gone}",
    "A=1; export A; unset A",
    "! false && export A=1; ! true || export B=2",
    "{ export A=1; export B=2; }; export C=3",
    "echo hello  \"two  words\" $EMPTY x; export A=1",
    "echo quiet >/dev/null 2>&1; export A=1",
    "export A=1; return 0; export A=2",
    "if false; then :; fi; export S=$?",
    "false; export S=$?",
    "export A=\"$HOST\" B=$HOST",
    "A=\"x\"y'z'; export A",
    "export A=$ B=\"$\" C=\"a\\b\" D=\"\\\"\"",
    "export N=$(( 1",
    "test 3 -gt 2 && export A=gt; [ 1 -eq 2 ] || export B=ne",
    "if [ \"$HOME\" != \"/\" ]\nthen\n  export A=1\nfi\n",
    "export A=\"line one\nline two\"",
    "export EQ=a=b=c",
    "test -n \"${X:-}\" || export A=1; [ -n \"${HOME:+}\" ] || export B=1",
    "true && { export A=1\n}\n",
    "A=#foo; export A B=#bar",
    "false; A=$?; export A",
    "A=old; export A=1 B=$A",
    "if false; then :; else A=$?; fi; export A",
    "false; case x in x) A=$?;; esac; export A",
    "false; for i in 1; do A=$?; done; export A",
    "false; case x in x) ;; esac; export A=$?",
    "false; for i in; do :; done; export A=$?",
    "A=\\\n  B=2; export A B",
    "export A=1 A=2",
    "A=1 B=$A; export A B",
    "export A=${X-\"a b\"}\"c\" B=${X:-a'}'b} C=\"${X:-a\\}b}\"",
    "A='x y'; export B=$A$A C=\"$A\"",
    "for i in $@; do R=\"$R[$i]\"; done; export R",
    "for i in \"x$@y\"; do R=\"$R[$i]\"; done; export R",
    "for i in \"$*\" $*; do R=\"$R[$i]\"; done; export R",
    "for i in ${1+\"$@\"}; do R=\"$R[$i]\"; done; export R",
    "for i in \"\" a '' $EMPTY $EMPTY\"\"; do R=\"$R[$i]\"; done; export R",
    "export A=${EMPTY:=\"n\"}; export EMPTY",
    "case a in a|b) A=1;; esac; case 'a*' in \"a*\") B=1;; esac; case abc in a*c) C=1;; esac; export A B C",
    "case '' in '') export A=e;; esac; case abc in *b) export B=1;; a?c) export C=1;; esac",
    "true || export A=1 && export B=2; false && export C=1 || export D=2",
    "test '' || export A=1; test x && export B=1; [ ! ] && export C=1; [ -n ] && export D=1",
    "[ \"$X\" = '' ] && export A=1; [ ! a = b ] && export B=1",
    "if true; then if false; then :; else export A=2; fi fi; export B=1",
    "{ { export A=1; } }; : ${X:=x}; export X",
    "export A=\"\\a\\\"\\$\\`\\\\\" B=\\\"q\\\" C=\\'",
    "export A=${HOME}x${1}y$2 N=$# S=$?",
    "P=/usr/bin:/bin:/sbin; export A=${P%%:*} B=${P#*:} C=${P##*?} D=${P%\"in\"} E=${P%'in'}",
    "for f in /et? /etc/host* /no/such*; do R=\"$R[$f]\"; done; export R",
    "for f in /*/passwd \"/et?\" /et\\?; do R=\"$R[$f]\"; done; export R",
    "W='/et? x'; for f in $W \"$W\"; do R=\"$R[$f]\"; done; A=/et?; export R A",
    "echo a >&2; echo b 1>&2; echo c; export A=1",
    "S='/etc/no-dot*'; export A=$S; export B=/{etc}/x",
    "Aa=1 Aab=2; export A=$Aa\\\nb B=${A\\\na} C='x\\\ny' D=\"x\\\ny\" # c\\\nexport E=1",
    "exp\\\nort A=1 &\\\n& ex\\\nport B=\\\n2",
    "unset HOME; export HOME=/x; unset NEW; NEW=1; export NEW",
];

/// What other shells find an error, and bash does not.
const OF_BASH: &[&str] = &[
    "A=(one 'two words' $HOME); export B=${A[1]} C=$A D=${#A[@]} E=\"${A[*]}\" F=\"${A[@]}\"",
    "A=(x y); A+=(z); A[5]=w; A[0]+=1; export B=\"${A[*]}\" C=${#A[*]} D=${A[3]-none} E=${A[5]}",
    "A=(a 'b c' '' d); for i in \"${A[@]}\"; do R=\"$R[$i]\"; done; export R",
    "A=(a 'b c' '' d); for i in ${A[@]} ${A[*]}; do R=\"$R[$i]\"; done; export R",
    "A=(\n  one # a comment\n  two\n)\nexport B=${A[1]} A",
    "export A=x; A=(1 2); export B=${A[1]}",
    "A=x; A+=y; A+=; export A; PATH+=:/opt/bin; B+=new; export B",
    "A=x; A+=(y); export B=${A[0]}${A[1]}; C[2]=z; export D=${C-unset}${#C[@]}${C[2]}",
    "if [[ -n $HOME && ! -z \"$PATH\" ]]; then export A=1; fi; [[ $HOST == a* ]] && export B=1",
    "[[ $HOME = /home/* || -d /nowhere ]] && export A=1; [[ \"x\" != 'x' ]] || export B=2",
    "[[ ( -d /etc ) && 3 -gt 2 ]] && export A=1; [[ $EMPTY ]] || export B=1; [[ -v HOME ]] && export C=1",
    "[[ \"a*\" == \"a*\" ]] && export A=1; [[ abc == \"a*\" ]] || export B=1; [[ ! a == b ]] && export C=1",
    "export A=${HOME/x/y} B=${PATH//bin/lib} C=${PATH/#?usr/} D=${PATH/%bin/x} E=${PATH//:*} F=${HOME//o}",
    "X=Hello; export A=${X^^} B=${X,,} C=${X,} D=${X:1:3} E=${X:2} F=${X:9} G=${X:0:99} Y=abc; export H=${Y^}",
];

#[test]
fn variables_are_those_of_a_real_shell() {
    for script in SCRIPTS {
        match here(script) {
            Ok(lines) => assert_eq!(lines, there("/bin/sh", script), "{script}"),
            Err(error) => assert!(script.contains("$(("), "{script}: {error}"),
        }
    }
    for script in OF_BASH {
        assert_eq!(
            here(script).unwrap(),
            there("/bin/bash", script),
            "{script}"
        );
    }
}

/// Scripts that nobody wrote: what is put together from these words either is not known here, or is what real shells
/// make of it. Those of POSIX mean the same to all shells.
#[test]
fn scripts_of_chance_are_those_of_real_shells() {
    const COMMANDS: [&str; 24] = [
        "A=1",
        "export A",
        "export B=$A",
        "A=\"$A x\"",
        "unset A",
        "false",
        "true",
        ":",
        "! true",
        "B=${A:-y}",
        "C=${A#1}",
        "[ -n \"$A\" ]",
        "[ -z \"$B\" ]",
        "export C=${B%x}$?",
        "echo $A$B",
        "test \"$A\" = 1",
        "D='a  b'",
        "E=$D",
        "export E D",
        "F=${F:=z}",
        "export F=\"$F$F\"",
        "{ A=2; export A; }",
        "G=$#",
        "export G=${G}g",
    ];
    const JOINTS: [&str; 6] = ["; ", "\n", " && ", " || ", "; ", "\n"];
    let mut seed = 0x2545_f491_u32;
    let mut next = |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 17;
        seed ^= seed << 5;
        seed as usize % below
    };
    let mut known = 0;
    for _ in 0..120 {
        let mut script = String::new();
        for _ in 0..3 + next(6) {
            let command = COMMANDS[next(COMMANDS.len())];
            script += &match next(5) {
                0 => format!(
                    "if {command}; then {}; else {}; fi",
                    COMMANDS[next(24)],
                    COMMANDS[next(24)]
                ),
                1 => format!("for i in $D \"$A\" q; do {command}; R=\"$R[$i]\"; done; export R"),
                2 => format!(
                    "case \"$A\" in 1*) {command} ;; '') export H=1 ;; *) {} ;; esac",
                    COMMANDS[next(24)]
                ),
                _ => command.to_owned(),
            };
            script += JOINTS[next(JOINTS.len())];
        }
        script += "export LAST=$?";
        if let Ok(lines) = here(&script) {
            known += 1;
            assert_eq!(lines, there("/bin/sh", &script), "{script}");
            assert_eq!(lines, there("/bin/bash", &script), "{script}");
        }
    }
    assert!(known > 60, "{known} of them were known");
}

#[test]
fn what_is_not_known_is_left_to_a_real_shell() {
    for script in [
        "export A=$(date)",
        "A=`date`",
        "ls",
        "a | b",
        "sleep 1 &",
        "f() { :; }",
        "while true; do :; done",
        "[[ a =~ b ]]",
        "[[ a < b ]]",
        "[[ x -eq 1 ]]",
        "[[ -n x",
        "A=(1 2",
        "A=([1]=x)",
        "A[i]=1",
        "A=(1); export B=${A[i]} C=${A[-1]}",
        "A=(1); export B=${A[@]/1/2}",
        "X=a; export A=${X/a/\"b\"} B=${X/a/&}",
        "! return 1",
        "! exit 1",
        "export A=$[1+1]",
        "unset PATH; PATH=x",
        "for f in /etc/.*; do :; done",
        "false && fi",
        "if false; then done; fi",
        "if false; then time; fi",
        "false || }",
        "IFS=:",
        "eval x",
        "export A=~/x",
        "cat <<E\nE",
        "A=1 env",
        "(A=1)",
        "set -e",
        "if",
        "\"",
        "${",
        "echo 'a\\n'",
        "x() { :; }; x",
        "trap : EXIT",
        "cd /",
        ". file",
        "[ a -o b ]",
        "export",
        "export N=${#@}",
        "{ export A=1; } export B=2",
        "if true; then fi",
        "for i in {a,b}; do :; done",
        "export A={1..3}",
        "export A=/tmp/$UID",
        "export A=\"$IFS\"",
        "U=n\u{e9}; export A=${#U}",
        "U=n\u{e9}; export A=${U%?}",
        "echo a >&2 2>/dev/null",
        "for f in /et[c]; do :; done",
        "export $'A'",
    ] {
        assert!(here(script).is_err(), "{script}");
    }
}

#[test]
fn nothing_runs_for_ever() {
    assert!(run(&b"{ ".repeat(10_000), &mut State::default(), &NoFiles).is_err());
    let doubling = "A=xxxxxxxx\n".to_owned() + &"A=$A$A\n".repeat(60);
    assert!(run(doubling.as_bytes(), &mut State::default(), &NoFiles).is_err());
    let long = format!("A={}\n", "x".repeat(500_000));
    let loud = long.clone() + &"echo $A\n".repeat(1000);
    assert!(run(loud.as_bytes(), &mut State::default(), &NoFiles).is_err());
    let cut = long + "A=${A%y*}\n";
    assert!(run(cut.as_bytes(), &mut State::default(), &NoFiles).is_err());
    let nested = (0..7).fold(":".to_owned(), |body, _| {
        format!("for i in 1 2 3 4 5 6 7 8 9 10; do {body}; done")
    });
    assert!(run(nested.as_bytes(), &mut State::default(), &NoFiles).is_err());
}

#[test]
fn text_is_expanded_as_within_double_quotes() {
    let mut state = State::default();
    state.export(b"HOME", b"/home/x");
    let mut get = |text: &str| {
        expand(text.as_bytes(), &mut state).map(|v| String::from_utf8_lossy(&v).into_owned())
    };
    assert_eq!(get("it's \"$HOME\""), Ok("it's \"/home/x\"".into()));
    assert_eq!(get("\\$HOME ${X:-y}"), Ok("$HOME y".into()));
    assert_eq!(get("plain 'text' *"), Ok("plain 'text' *".into()));
    assert!(get("$(date)").is_err());
}
