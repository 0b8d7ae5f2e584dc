//! Programs that call `singularity` and `apptainer`, from PyPI, unchanged: cwltool, toil, Snakemake, spython.
//!
//! They are installed once into a virtual environment in the test user's home, by the versions below.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use common::{Env, Output, add_programs, home, output, script, write};

const PACKAGES: [&str; 4] = [
    "cwltool==3.3.20260925135507",
    "toil[cwl]==9.6.0",
    "snakemake==9.27.1",
    "spython==0.3.14",
];

/// The programs' directory.
fn programs() -> &'static Path {
    static PLACE: OnceLock<PathBuf> = OnceLock::new();
    PLACE.get_or_init(|| {
        let name: String = PACKAGES
            .concat()
            .replace(|c: char| !c.is_alphanumeric(), "");
        let place = home().join(format!(".cache/capsid-clients-{name}"));
        // Written last: what was interrupted is made again.
        let whole = place.join("whole");
        if !whole.exists() {
            let _ = fs::remove_dir_all(&place);
            fs::create_dir_all(&place).unwrap();
            output(
                Command::new("/usr/bin/python3")
                    .args(["-m", "venv"])
                    .arg(&place),
            )
            .ok();
            let mut install = Command::new(place.join("bin/pip"));
            install.args([
                "install",
                "--quiet",
                "--retries=10",
                "--no-input",
                "--disable-pip-version-check",
            ]);
            output(install.args(PACKAGES).env("HOME", home())).ok();
            write(&whole, "");
        }
        place.join("bin")
    })
}

/// A place for one client: the program under the peers' names first on PATH, and an image with bash.
struct Client {
    env: Env,
    image: PathBuf,
}

impl Client {
    fn new() -> Client {
        let env = Env::new();
        let tree = env.tree("tree");
        add_programs(&tree, &["/bin/bash"]);
        script(
            &tree.join(".singularity.d/runscript"),
            "#!/bin/sh\nexec \"$@\"\n",
        );
        let image = env.sif(&tree, "image.sif");
        for name in ["singularity", "apptainer"] {
            fs::create_dir_all(env.path("bin")).unwrap();
            symlink(env!("CARGO_BIN_EXE_capsid"), env.path("bin").join(name)).unwrap();
        }
        Client { env, image }
    }

    /// One of the programs, as in a login that has capsid under the peers' names.
    fn run(&self, program: &str, args: &[&str]) -> Output {
        let mut command = self.env.command_as(&programs().join(program), args);
        let path = format!(
            "{}:{}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            self.env.path("bin").display(),
            programs().display()
        );
        command
            .env("PATH", path)
            .env("CWL_SINGULARITY_CACHE", self.env.path("images"));
        output(&mut command)
    }

    fn write(&self, name: &str, text: &str) {
        write(&self.env.work().join(name), text);
    }

    fn read(&self, name: &str) -> String {
        let path = self.env.work().join(name);
        fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }
}

/// A tool with inputs that are staged below the working directory, read-only and writable, as files and as directories, and
/// outside of it; the same for each word.
const TOOL: &str = r#"cwlVersion: v1.2
class: CommandLineTool
requirements:
  DockerRequirement: { dockerPull: "box:1" }
  InitialWorkDirRequirement:
    listing:
      - { entryname: made/config.txt, entry: "word=$(inputs.word)\n" }
      - { entryname: renamed.txt, entry: $(inputs.staged), writable: true }
      - { entryname: deep/er/still.txt, entry: "still\n" }
      - { entryname: /etc/tool.conf, entry: "configured\n" }
      - $(inputs.folder)
inputs:
  word: { type: string, inputBinding: { position: 1 } }
  other: { type: File, inputBinding: { position: 2 } }
  staged: File
  folder: Directory
baseCommand:
  - sh
  - -ec
  - |
    mkdir $0
    cat made/config.txt renamed.txt deep/er/still.txt folder/inner /etc/tool.conf "$1" >$0/all
    echo more >>renamed.txt
    cp renamed.txt $0/
    echo "said $0"
outputs:
  all: { type: Directory, outputBinding: { glob: $(inputs.word) } }
  said: stdout
stdout: said-$(inputs.word).txt
"#;

const WORKFLOW: &str = r#"cwlVersion: v1.2
class: Workflow
requirements: { ScatterFeatureRequirement: {} }
inputs: { words: "string[]", staged: File, folder: Directory, other: File }
steps:
  each:
    run: tool.cwl
    scatter: word
    in: { word: words, staged: staged, folder: folder, other: other }
    out: [all, said]
outputs:
  all: { type: "Directory[]", outputSource: each/all }
  said: { type: "File[]", outputSource: each/said }
"#;

fn workflow(runner: &str, args: &[&str]) {
    let client = Client::new();
    fs::create_dir(client.env.path("images")).unwrap();
    symlink(&client.image, client.env.path("images/box:1.sif")).unwrap();
    client.write("tool.cwl", TOOL);
    client.write("flow.cwl", WORKFLOW);
    client.write("staged.txt", "staged\n");
    client.write("other.txt", "other\n");
    client.write("folder/inner", "inner\n");
    client.write(
        "job.yml",
        "words: [one, two]\nstaged: {class: File, path: staged.txt}\nother: {class: File, path: other.txt}\n\
         folder: {class: Directory, path: folder}\n",
    );
    let out = client.run(
        runner,
        &[
            args,
            &[
                "--singularity",
                "--outdir",
                "results",
                "flow.cwl",
                "job.yml",
            ],
        ]
        .concat(),
    );
    assert_eq!(out.status, 0, "{out}");
    for word in ["one", "two"] {
        let expected = format!("word={word}\nstaged\nstill\ninner\nconfigured\nother\n");
        assert_eq!(
            client.read(&format!("results/{word}/all")),
            expected,
            "{out}"
        );
        assert_eq!(
            client.read(&format!("results/{word}/renamed.txt")),
            "staged\nmore\n"
        );
        assert_eq!(
            client.read(&format!("results/said-{word}.txt")),
            format!("said {word}\n")
        );
    }
    assert_eq!(
        client.read("staged.txt"),
        "staged\n",
        "the input is as it was"
    );
}

#[test]
fn cwltool_runs_a_scattered_tool_with_staged_inputs() {
    workflow("cwltool", &[]);
}

#[test]
fn toil_runs_a_scattered_tool_with_staged_inputs() {
    workflow("toil-cwl-runner", &["--jobStore", "store"]);
}

#[test]
fn snakemake_runs_rules_in_containers() {
    let client = Client::new();
    client.write(
        "Snakefile",
        &format!(
            r#"
container: "{}"
rule all:
    input: "joined.txt"
rule word:
    output: "words/{{w}}.txt"
    shell: "echo {{wildcards.w}} $APPTAINER_NAME >{{output}}"
rule joined:
    input: expand("words/{{w}}.txt", w=["one", "two", "three"])
    output: "joined.txt"
    shell: "cat {{input}} /extra/more >{{output}}"
rule fails:
    output: "never.txt"
    shell: "touch {{output}}; exit 3"
"#,
            client.image.display()
        ),
    );
    client.write("extra/more", "more\n");
    let bind = format!(
        "--bind {}:/extra",
        client.env.work().join("extra").display()
    );
    let out = client.run(
        "snakemake",
        &[
            "--cores",
            "2",
            "--sdm",
            "apptainer",
            "--apptainer-args",
            &bind,
        ],
    );
    assert_eq!(out.status, 0, "{out}");
    assert_eq!(
        client.read("joined.txt"),
        "one image.sif\ntwo image.sif\nthree image.sif\nmore\n",
        "{out}"
    );
    let out = client.run(
        "snakemake",
        &["--cores", "1", "--sdm", "apptainer", "fails"],
    );
    assert_ne!(out.status, 0, "{out}");
    assert!(!client.env.work().join("never.txt").exists(), "{out}");
}

#[test]
fn spython_builds_runs_inspects_and_has_instances() {
    let client = Client::new();
    client.write(
        "x.def",
        &format!(
            "Bootstrap: localimage\nFrom: {}\n%post\n    echo built >/opt/built\n%labels\n    Maker me\n%runscript\n    echo ran \"$@\"\n",
            client.image.display()
        ),
    );
    client.write(
        "session.py",
        r#"
from spython.main import Client
import os
assert Client.version().startswith("apptainer version 1.5"), Client.version()
image = Client.build(recipe="x.def", image="built.sif", sudo=False)
assert image and os.path.exists("built.sif"), image
assert Client.execute("built.sif", ["cat", "/opt/built"]).strip() == "built"
assert Client.run("built.sif", ["a", "b c"]).strip() == "ran a b c"
failed = Client.execute("built.sif", ["sh", "-c", "exit 3"], return_result=True)
assert failed["return_code"] == 3, failed
inspected = Client.inspect("built.sif")
assert inspected["attributes"]["labels"]["Maker"] == "me", inspected
instance = Client.instance("built.sif", name="spython-session")
assert [i.name for i in Client.instances(quiet=True)].count("spython-session") == 1
assert Client.execute(instance, ["cat", "/opt/built"]).strip() == "built"
instance.stop()
assert not [i for i in (Client.instances(quiet=True) or []) if i.name == "spython-session"]
print("fine")
"#,
    );
    let out = client.run("python3", &["session.py"]);
    assert_eq!(out.status, 0, "{out}");
    assert!(out.stdout.ends_with("fine\n"), "{out}");
}
