use super::*;

fn def(text: &str) -> Def {
    parse("x.def", text.as_bytes(), &[], Unused::Refuse).unwrap()
}

fn one(text: &str) -> Stage {
    def(text).stages.remove(0)
}

fn error(text: &str) -> String {
    let parsed = parse("x.def", text.as_bytes(), &[], Unused::Refuse);
    format!("{:#}", parsed.unwrap_err())
}

#[test]
fn header_keys_are_read_in_any_case_with_comments_and_continuations() {
    let table: &[(&str, &str, &str)] = &[
        (
            "Bootstrap: docker\nFrom: alpine:3.20\n",
            "from",
            "alpine:3.20",
        ),
        ("BOOTSTRAP:docker\nfRoM:\talpine\n", "from", "alpine"),
        (
            "# c\n\nBootstrap: docker # here\nFrom: a # there\n",
            "from",
            "a",
        ),
        ("Bootstrap: docker\r\nFrom: a\r\n", "from", "a"),
        (
            "Bootstrap: yum\nInclude: a \\\n  b \\\n  c\n",
            "include",
            "a b c",
        ),
        (
            "Bootstrap: zypper\nOtherURL12: http://x/y\n",
            "otherurl12",
            "http://x/y",
        ),
        ("Bootstrap: docker\nFrom: a", "from", "a"),
        ("Bootstrap: docker\nFrom: a#b\n", "from", "a#b"),
        ("Bootstrap: yum\nSetOpt: a\\n\\\nb\n", "setopt", "a\nb"),
        ("  Bootstrap: docker\n  From: a\n", "from", "a"),
        ("\u{feff}Bootstrap: docker\nFrom: a\n", "from", "a"),
        (
            "Bootstrap: docker\nFrom: a\nIncludeCmd: yes\n",
            "includecmd",
            "yes",
        ),
        ("Bootstrap: yum\nInclude: a \\", "include", "a"),
    ];
    for (text, key, value) in table {
        assert_eq!(one(text).key(key), Some(*value), "{text:?}");
    }
}

#[test]
fn each_mistake_names_its_line_and_the_way_out() {
    let table: &[(&str, &str)] = &[
        ("", "x.def: no bootstrap specification found"),
        ("\n# nothing\n", "no bootstrap specification found"),
        ("From: a\n", "x.def:1: no bootstrap specification found"),
        (
            "Bootstrap: docker\nFrm: a\n",
            "x.def:2: invalid header keyword found: frm: known ones are",
        ),
        (
            "Bootstrap:\nFrom: a\n",
            "x.def:1: no bootstrap specification found",
        ),
        (
            "Bootstrap: docker\nhello\n",
            "x.def:2: \"hello\" is neither a header line",
        ),
        (
            "Bootstrap: scratch\n%bogus\n",
            "x.def:2: invalid section(s) specified: bogus",
        ),
        (
            "Bootstrap: scratch\n%post\n  a\n  %b\n",
            "x.def:4: invalid section(s) specified: b",
        ),
        (
            "Bootstrap: scratch\n%\n",
            "x.def:2: invalid section(s) specified: ",
        ),
        (
            "Bootstrap: scratch\n%apprun\n x\n",
            "x.def:2: %apprun has no application's name",
        ),
        (
            "Bootstrap: scratch\n%apprun ../x\n",
            "x.def:2: \"../x\" cannot be an application's name",
        ),
        (
            "Bootstrap: scratch\n%files to x\n",
            "x.def:2: %files to x: write %files",
        ),
        (
            "Bootstrap: scratch\n%files from x\n a\n",
            "%files from x: there is no such stage",
        ),
        (
            "Bootstrap: scratch\n%files\n \"a\n",
            "x.def:3: the quote \" is not closed",
        ),
        (
            "Bootstrap: scratch\n%post\n {{ x }}\n",
            "x.def:3: build var x is not defined",
        ),
        (
            "Bootstrap: scratch\n%arguments\n x\n",
            "x.def:3: %arguments: \"x\" is not NAME=VALUE",
        ),
        (
            "Bootstrap: scratch\n%arguments\nx={{ y }}\ny={{x}}\n%post\n{{x}}\n",
            "is defined by itself",
        ),
        (
            "Bootstrap: scratch\nStage: a\nBootstrap: scratch\nStage: a\n",
            "two stages have the name",
        ),
    ];
    for (text, wanted) in table {
        let error = error(text);
        assert!(error.contains(wanted), "{text:?}: {error}");
    }
    let nul = parse("x.def", b"Bootstrap: a\n\0", &[], Unused::Refuse).unwrap_err();
    assert!(nul.to_string().starts_with("x.def:2: a NUL byte"));
    let latin = parse("x.def", b"Bootstrap: a\n\n\xff", &[], Unused::Refuse).unwrap_err();
    assert!(latin.to_string().starts_with("x.def:3: not UTF-8"));
}

#[test]
fn bodies_stay_as_they_are() {
    let stage = one(
        "Bootstrap: scratch\n%post -c /bin/bash\n\tdate +%Y\n  # %x {{no}}\n\n%Environment\n  A='{{.B}}'\n%help\nBootstrap is a word\n",
    );
    assert_eq!(stage.post.text, "\tdate +%Y\n  # %x {{no}}\n\n");
    assert_eq!(stage.post.args, "-c /bin/bash");
    assert_eq!(stage.environment.text, "  A='{{.B}}'\n");
    assert_eq!(stage.help.text, "Bootstrap is a word\n");
}

#[test]
fn repeated_sections_are_one() {
    let stage = one("Bootstrap: scratch\n%post\na\n%labels\nA b\n%POST\nb\n  %labels\nC d  e\nE\n");
    assert_eq!(stage.post.text, "a\nb\n");
    let labels = [("A", "b"), ("C", "d  e"), ("E", "")];
    assert_eq!(
        stage.labels,
        labels.map(|(k, v)| (k.to_owned(), v.to_owned()))
    );
}

#[test]
fn lines_of_files_are_words_with_quotes() {
    let table: &[(&str, &[&str])] = &[
        ("a b", &["a", "b"]),
        ("  a\tb  ", &["a", "b"]),
        ("\"a b\" 'c d'", &["a b", "c d"]),
        ("a\\ b c", &["a b", "c"]),
        ("a\"b c\"d", &["ab cd"]),
        ("a\\n*", &["a\\n*"]),
        ("", &[]),
    ];
    for (line, wanted) in table {
        assert_eq!(words(line).unwrap(), *wanted, "{line:?}");
    }
    let def = def("Bootstrap: scratch\n%files\n# c\n a /b # c\n c\n d e f\n");
    let pair = |a: &str, b: Option<&str>| (a.to_owned(), b.map(str::to_owned));
    let wanted = [pair("a", Some("/b")), pair("c", None), pair("d", Some("e"))];
    assert_eq!(def.stages[0].files[0].pairs, wanted);
    assert_eq!(def.warnings.len(), 1, "{:?}", def.warnings);
}

#[test]
fn stages_begin_at_bootstrap_lines() {
    let def = def(
        "# top\nBootstrap: docker\nFrom: a\nStage: one\n%post\nx\nbootstrap: scratch\nStage: two\n%files from one\n/a\n",
    );
    assert_eq!(def.stages.len(), 2);
    assert_eq!(def.stages[0].post.text, "x\n");
    assert_eq!(def.stages[1].files[0].from.as_deref(), Some("one"));
    assert!(
        error("Bootstrap: scratch\n%post\na\nBootstrap: scratch\nNo: x\n").starts_with("x.def:5:")
    );
}

#[test]
fn arguments_have_their_ranks() {
    let text = "Bootstrap: docker\nFrom: a:{{ TAG }}\n%arguments\n# c\nTAG=1\nBOTH={{TAG}}-{{ NAME }}\nNAME=n\nNONE={{ nobody }}\n%post\n{{BOTH}}\n# {{ unknown }}\n";
    let args = [("TAG".to_owned(), "2".to_owned())];
    let def = parse("x", text.as_bytes(), &args, Unused::Refuse).unwrap();
    assert_eq!(def.stages[0].key("from"), Some("a:2"));
    assert_eq!(def.stages[0].post.text, "2-n\n# {{ unknown }}\n");
    let args = [("nosuch".to_owned(), "2".to_owned())];
    let error = parse("x", text.as_bytes(), &args, Unused::Refuse).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("unused build args: nosuch. Use option --warn-unused")
    );
    let def = parse("x", text.as_bytes(), &args, Unused::Warn).unwrap();
    assert_eq!(def.warnings, ["unused build args: nosuch"]);
}

#[test]
fn header_line_without_a_value_is_none() {
    for value in ["", " ", "{{ NONE }}", " # nothing"] {
        let text = format!("Bootstrap: docker\nFrom: a\nFingerprints:{value}\n%arguments\nNONE=\n");
        assert_eq!(one(&text).key("fingerprints"), None, "{value:?}");
    }
    assert_eq!(one("Bootstrap: scratch\nFrom:\n").key("from"), None);
    let json = br#"{"header":{"bootstrap":"scratch","fingerprints":""}}"#;
    let stage = parse_json("x", json).unwrap().stages.remove(0);
    assert_eq!(stage.key("fingerprints"), None);
}

#[test]
fn value_is_text_and_opens_nothing() {
    let hostile = [
        "1\n%setup\n touch x",
        "%setup",
        "\n%pre\nx",
        "1\nBootstrap: scratch\n%setup\nx",
        "{{ OTHER }}",
        "# no comment",
        "a: b\nFingerprints: x",
        "%",
    ];
    let places = [
        "Bootstrap: docker\nFrom: {{ V }}\n",
        "Bootstrap: docker\nFrom: a\n%labels\nA {{ V }}\n",
        "Bootstrap: docker\nFrom: a\n%labels\n{{V}}\n",
        "Bootstrap: docker\nFrom: a\n%post\n{{ V }}\n%help\nh\n",
        "Bootstrap: docker\nFrom: a\n%post {{ V }}\nx\n",
        "Bootstrap: docker\nFrom: a\n%runscript\n echo {{ V }} b\n",
        "Bootstrap: docker\nFrom: a\n%appinstall x\n{{ V }}\n",
    ];
    for value in hostile {
        for text in places {
            let args = [("V".to_owned(), value.to_owned())];
            let def = parse("x", text.as_bytes(), &args, Unused::Refuse).unwrap();
            let what = format!("{text:?} with {value:?}");
            assert_eq!(def.stages.len(), 1, "{what}");
            let stage = &def.stages[0];
            assert!(stage.setup.is_empty() && stage.pre.is_empty(), "{what}");
            let from = if text.contains("From: a") {
                "a"
            } else {
                value.trim()
            };
            assert_eq!(stage.key("from"), Some(from), "{what}");
            assert_eq!(stage.header.len(), 2, "{what}");
        }
    }
    let args = [("V".to_owned(), "a\n%b\n{{ V }}".to_owned())];
    let text = b"Bootstrap: scratch\n%post\n echo {{ V }} c\n d\n";
    let def = parse("x", text, &args, Unused::Refuse).unwrap();
    assert_eq!(def.stages[0].post.text, " echo a\n%b\n{{ V }} c\n d\n");
    assert_eq!(
        def.stages[0].text,
        "Bootstrap: scratch\n%post\n echo a\n%b\n{{ V }} c\n d\n"
    );
}

#[test]
fn defaults_that_double_do_not_fill_the_memory() {
    let mut text = String::from("Bootstrap: scratch\n%arguments\na0=xxxxxxxxxxxxxxxx\n");
    for i in 1..30 {
        text.push_str(&format!("a{i}={{{{a{}}}}}{{{{a{}}}}}\n", i - 1, i - 1));
    }
    text.push_str("%post\n{{a29}}\n");
    assert!(error(&text).contains("grows beyond 64 MiB"));
}

#[test]
fn applications_keep_their_order_and_parts() {
    let stage = one(
        "Bootstrap: scratch\n%apprun b\nrun\n%appinstall a\ni\n%appinstall b\nj\n%appfiles a\nf g\n%applabels a\nK v\n%appenv a\ne\n%apphelp a\nh\n%apptest b\nt\n%appstart b\ns\n",
    );
    let names: Vec<&str> = stage.apps.iter().map(|a| a.name.as_str()).collect();
    assert_eq!(names, ["b", "a"]);
    assert_eq!(stage.apps[0].install, "j\n");
    assert_eq!(stage.apps[0].run.as_ref().unwrap().text, "run\n");
    assert_eq!(
        stage.apps[1].files,
        [("f".to_owned(), Some("g".to_owned()))]
    );
    assert_eq!(stage.apps[1].labels.as_ref().unwrap()[0].1, "v");
}

#[test]
fn json_gives_the_same_as_text() {
    let json = br##"{"header":{"Bootstrap":"scratch","stage":"s"},"imageData":{"labels":{"A":"b"},"imageScripts":{
        "runScript":{"script":"echo\n"},"test":{"script":"true\n"}}},"buildData":{"files":[{"args":"","files":[
        {"source":"a","destination":"/b"}]}],"buildScripts":{"post":{"args":"-c /bin/bash","script":"x\n"}}},
        "customData":{"apprun foo":"run\n"},"raw":"","appOrder":["foo"]}"##;
    let json = parse_json("x.json", json).unwrap().stages.remove(0);
    let text = one(
        "Bootstrap: scratch\nStage: s\n%labels\nA b\n%runscript\necho\n%test\ntrue\n%files\na /b\n%post -c /bin/bash\nx\n%apprun foo\nrun\n",
    );
    assert_eq!(
        Stage {
            text: String::new(),
            ..json
        },
        Stage {
            text: String::new(),
            ..text
        }
    );
    for bad in [
        "",
        "[]",
        "{}",
        "[1]",
        "{\"header\":{\"x\":\"y\"}}",
        "{\"header\":3}",
    ] {
        assert!(parse_json("x", bad.as_bytes()).is_err(), "{bad}");
    }
}

#[test]
fn large_definitions_are_read_quickly() {
    let mut text = String::from("Bootstrap: scratch\n%post\n");
    for i in 0..100_000 {
        text.push_str(&format!("echo {i} {{{{\n"));
    }
    assert_eq!(one(&text).post.text.lines().count(), 100_000);
}
