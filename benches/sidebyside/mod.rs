//! Cases that `benches/compare` measures, under criterion: one place knows how a thing is measured, and what is missing.

use std::io::{BufRead as _, BufReader, Lines, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use criterion::Criterion;

struct Script {
    child: Child,
    asks: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Script {
    fn line(&mut self) -> String {
        let line = self.answers.next().expect("benches/compare answers");
        line.expect("benches/compare writes text")
    }

    fn ask(&mut self, line: &str) {
        writeln!(self.asks, "{line}").expect("benches/compare listens");
    }
}

/// Measures all cases of `what` (`start` or `read`); those that cannot be are named on standard error.
pub fn measure(c: &mut Criterion, what: &str) {
    let mut child = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/compare"))
        .arg("serve")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("benches/compare needs python3");
    let mut script = Script {
        asks: child.stdin.take().expect("a pipe"),
        answers: BufReader::new(child.stdout.take().expect("a pipe")).lines(),
        child,
    };
    script.ask(what);
    let mut cases = Vec::new();
    loop {
        match script.line() {
            end if end.is_empty() => break,
            case => cases.push(case),
        }
    }
    let mut group = c.benchmark_group(what);
    group.sample_size(10);
    group.warm_up_time(Duration::from_millis(200));
    group.measurement_time(Duration::from_secs(1));
    group.sampling_mode(criterion::SamplingMode::Flat);
    for case in cases {
        group.bench_function(&case, |b| {
            b.iter_custom(|count| {
                script.ask(&format!("{case}\t{count}"));
                Duration::from_secs_f64(script.line().parse().expect("seconds"))
            });
        });
    }
    group.finish();
    let Script {
        mut child, asks, ..
    } = script;
    drop(asks);
    assert!(child.wait().expect("it ends").success());
}
