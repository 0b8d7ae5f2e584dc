//! Commands to effects on the state.

use super::expand::{fits, has_braces, unsupported};
use super::parse::{self, AndOr, Assignment, Command, Join, List, Output, Simple, Stage, Value};
use super::{End, Files, State, Unsupported, Var, is_name};

/// Commands that a script may run; real ones need a few hundred.
const MAX_STEPS: u32 = 100_000;
/// Scripts within scripts.
const MAX_DEPTH: u32 = 32;

pub(super) struct Machine<'a> {
    pub(super) state: &'a mut State,
    pub(super) files: &'a dyn Files,
    /// Bytes that all expansions have made.
    pub(super) made: usize,
    steps: u32,
    depth: u32,
}

/// Why a list is left before its end.
enum Flow {
    Next,
    Return,
    Exit(u8),
}

type Run<T> = Result<T, Unsupported>;

impl<'a> Machine<'a> {
    pub(super) fn new(state: &'a mut State, files: &'a dyn Files) -> Machine<'a> {
        Machine {
            state,
            files,
            made: 0,
            steps: 0,
            depth: 0,
        }
    }

    pub(super) fn script(&mut self, list: &List) -> Run<End> {
        Ok(match self.list(list)? {
            Flow::Next | Flow::Return => End::Done,
            Flow::Exit(status) => End::Exit(status),
        })
    }

    fn list(&mut self, list: &List) -> Run<Flow> {
        for AndOr { first, rest } in list {
            match self.stage(first)? {
                Flow::Next => {}
                end => return Ok(end),
            }
            for (join, stage) in rest {
                if (*join == Join::And) == (self.state.status == 0) {
                    match self.stage(stage)? {
                        Flow::Next => {}
                        end => return Ok(end),
                    }
                }
            }
        }
        Ok(Flow::Next)
    }

    fn stage(&mut self, stage: &Stage) -> Run<Flow> {
        let flow = self.command(&stage.command)?;
        if stage.negated && !matches!(flow, Flow::Next) {
            // Some turn the status of a return or an exit around, some do not.
            return Err(unsupported(0, "the end of a script turned around"));
        }
        if stage.negated {
            self.state.status = u8::from(self.state.status == 0);
        }
        Ok(flow)
    }

    fn command(&mut self, command: &Command) -> Run<Flow> {
        match command {
            Command::Simple(simple) => self.simple(simple),
            Command::Group(list) => self.list(list),
            Command::Test { cond, line } => {
                self.state.status = u8::from(!self.holds(cond, *line)?);
                Ok(Flow::Next)
            }
            Command::If { arms, otherwise } => {
                for (condition, body) in arms {
                    match self.list(condition)? {
                        Flow::Next => {}
                        end => return Ok(end),
                    }
                    if self.state.status == 0 {
                        return self.list(body);
                    }
                }
                self.body(otherwise)
            }
            Command::For {
                name,
                words,
                body,
                line,
            } => {
                let values = match words {
                    Some(words) => self.fields(words, *line)?,
                    None => self.state.params.clone(),
                };
                if values.is_empty() {
                    self.state.status = 0;
                }
                for value in values {
                    self.step(*line)?;
                    self.assign(name, value, *line)?;
                    match self.list(body)? {
                        Flow::Next => {}
                        end => return Ok(end),
                    }
                }
                Ok(Flow::Next)
            }
            Command::Case { word, arms, line } => {
                let text = self.joined(word, *line)?;
                for (patterns, body) in arms {
                    for pattern in patterns {
                        if fits(&self.pattern(pattern, *line)?, &text, *line)? {
                            return self.body(body);
                        }
                    }
                }
                self.state.status = 0;
                Ok(Flow::Next)
            }
        }
    }

    /// What may be empty, and then is true.
    fn body(&mut self, list: &List) -> Run<Flow> {
        if list.is_empty() {
            self.state.status = 0;
        }
        self.list(list)
    }

    pub(super) fn step(&mut self, line: u32) -> Run<()> {
        self.steps += 1;
        if self.steps > MAX_STEPS {
            Err(unsupported(line, "a script that runs too long"))
        } else {
            Ok(())
        }
    }

    pub(super) fn assign(&mut self, name: &[u8], value: Vec<u8>, line: u32) -> Run<()> {
        // Both change how everything after them is read.
        if name == b"IFS" || name == b"POSIXLY_CORRECT" {
            return Err(unsupported(line, "a change of IFS"));
        }
        let var = self.state.vars.entry(name.to_vec()).or_default();
        if var.unset {
            return Err(unsupported(line, "setting what was exported and unset"));
        }
        (var.value, var.assigned) = (Some(value), true);
        Ok(())
    }

    /// An assignment of any form.
    fn set(&mut self, assignment: &Assignment, line: u32) -> Run<()> {
        let name = assignment.name.as_slice();
        let before = self.state.get(name).map(<[u8]>::to_vec);
        match (&assignment.value, assignment.index) {
            (Value::One(word), None) => {
                let mut value = match assignment.append {
                    true => before.unwrap_or_default(),
                    false => Vec::new(),
                };
                value.extend(self.joined(word, line)?);
                self.assign(name, value, line)
            }
            (Value::One(word), Some(index)) => {
                let value = self.joined(word, line)?;
                // Number 0 is also the variable itself.
                self.assign(name, before.clone().unwrap_or_default(), line)?;
                let var = self.state.vars.entry(name.to_vec()).or_default();
                var.value = before;
                let more = var.more.get_or_insert_default();
                let element = match index {
                    0 => var.value.get_or_insert_default(),
                    n => more.entry(n).or_default(),
                };
                if !assignment.append {
                    element.clear();
                }
                element.extend(value);
                Ok(())
            }
            (Value::List(words), _) => {
                let values = self.fields(words, line)?;
                self.assign(name, before.clone().unwrap_or_default(), line)?;
                let var = self.state.vars.entry(name.to_vec()).or_default();
                let mut more = var.more.take().unwrap_or_default();
                if !assignment.append {
                    more.clear();
                }
                (var.value, var.more) = (before.filter(|_| assignment.append), Some(more));
                for value in values {
                    match (&var.value, &mut var.more) {
                        (Some(_), Some(more)) => {
                            let last = more.last_key_value().map_or(0, |(n, _)| *n);
                            more.insert(last + 1, value);
                        }
                        _ => var.value = Some(value),
                    }
                }
                Ok(())
            }
        }
    }

    fn simple(&mut self, simple: &Simple) -> Run<Flow> {
        self.step(simple.line)?;
        let before = self.state.out.len();
        let flow = self.run(simple)?;
        match simple.output {
            Output::Kept => {}
            Output::Dropped => self.state.out.truncate(before),
            Output::Moved => {
                let moved = self.state.out.split_off(before);
                self.state.err.extend(moved);
            }
        }
        Ok(flow)
    }

    fn run(&mut self, simple: &Simple) -> Run<Flow> {
        let line = simple.line;
        let declares = matches!(simple.words.first().map(Vec::as_slice), Some([parse::Part::Text(t)]) if t == b"export");
        if declares && simple.assignments.is_empty() {
            return self.export(simple);
        }
        let words = self.fields(&simple.words, line)?;
        let Some(name) = words.first() else {
            for assignment in &simple.assignments {
                self.set(assignment, line)?;
            }
            self.state.status = 0;
            return Ok(Flow::Next);
        };
        if !simple.assignments.is_empty() {
            return Err(unsupported(line, "variables for one command"));
        }
        let args = &words[1..];
        self.state.status = match name.as_slice() {
            b":" | b"true" => 0,
            b"false" => 1,
            b"test" => self.test(args, line)?,
            b"[" => match args.split_last() {
                Some((end, args)) if end == b"]" => self.test(args, line)?,
                _ => return Err(unsupported(line, "[ without ]")),
            },
            b"echo" => self.echo(args, line)?,
            b"unset" => self.unset(args, line)?,
            b"." | b"source" => return self.source(args, line),
            b"return" => {
                self.state.status = self.status(args, line)?;
                return Ok(Flow::Return);
            }
            b"exit" => return Ok(Flow::Exit(self.status(args, line)?)),
            other => return Err(unsupported(line, &String::from_utf8_lossy(other))),
        };
        Ok(Flow::Next)
    }

    fn status(&self, args: &[Vec<u8>], line: u32) -> Run<u8> {
        match args {
            [] => Ok(self.state.status),
            [number] => std::str::from_utf8(number)
                .ok()
                .and_then(|n| n.parse().ok())
                .ok_or_else(|| unsupported(line, "a status")),
            _ => Err(unsupported(line, "a status")),
        }
    }

    /// `export NAME=VALUE` does not split the value, as in an assignment (POSIX.1-2024).
    fn export(&mut self, simple: &Simple) -> Run<Flow> {
        let line = simple.line;
        let mut texts = Vec::new();
        for word in &simple.words[1..] {
            if has_braces(word) {
                return Err(unsupported(line, "a list in braces"));
            }
            texts.push(self.joined(word, line)?);
        }
        if texts.is_empty() {
            return Err(unsupported(line, "export of nothing"));
        }
        // Only now: none of the values sees another one.
        for text in texts {
            let (name, value) = match text.iter().position(|b| *b == b'=') {
                Some(sign) => (&text[..sign], Some(text[sign + 1..].to_vec())),
                None => (text.as_slice(), None),
            };
            if !is_name(name) {
                return Err(unsupported(line, "export of something that is no name"));
            }
            let var = self.state.vars.entry(name.to_vec()).or_default();
            (var.exported, var.unset) = (true, false);
            if let Some(value) = value {
                self.assign(name, value, line)?;
            }
        }
        self.state.status = 0;
        Ok(Flow::Next)
    }

    fn unset(&mut self, args: &[Vec<u8>], line: u32) -> Run<u8> {
        let args = match args.split_first() {
            Some((option, rest)) if option == b"-v" => rest,
            _ => args,
        };
        for name in args {
            if !is_name(name) {
                return Err(unsupported(line, "unset of something that is no name"));
            }
            if self
                .state
                .vars
                .remove(name)
                .is_some_and(|v| v.exported || v.unset)
            {
                let gone = Var {
                    unset: true,
                    ..Var::default()
                };
                self.state.vars.insert(name.clone(), gone);
            }
        }
        Ok(0)
    }

    fn echo(&mut self, args: &[Vec<u8>], line: u32) -> Run<u8> {
        let (newline, args) = match args.split_first() {
            Some((option, rest)) if option == b"-n" => (false, rest),
            _ => (true, args),
        };
        // Shells differ in what they make of these.
        if args.iter().any(|a| a.contains(&b'\\'))
            || args.first().is_some_and(|a| a.starts_with(b"-"))
        {
            return Err(unsupported(line, "echo of a backslash or an option"));
        }
        self.state.out.extend(args.join(&b' '));
        self.state.out.extend(newline.then_some(b'\n'));
        Ok(0)
    }

    fn source(&mut self, args: &[Vec<u8>], line: u32) -> Run<Flow> {
        // Without a slash the file would be searched for on PATH.
        let Some(path) = args.first().filter(|p| p.contains(&b'/')) else {
            return Err(unsupported(line, "sourcing a file of PATH"));
        };
        let what = |why: &str| {
            unsupported(
                line,
                &format!("sourcing {}: {why}", String::from_utf8_lossy(path)),
            )
        };
        if self.depth >= MAX_DEPTH {
            return Err(what("nested too deeply"));
        }
        let text = self
            .files
            .read(path)
            .ok_or_else(|| what("it cannot be read"))?;
        let list = parse::script(&text).map_err(|error| what(&error.to_string()))?;
        self.depth += 1;
        let flow = self.body(&list).map_err(|error| what(&error.to_string()))?;
        self.depth -= 1;
        Ok(match flow {
            Flow::Return => Flow::Next,
            other => other,
        })
    }

    fn test(&self, args: &[Vec<u8>], line: u32) -> Run<u8> {
        let words: Vec<&[u8]> = args.iter().map(Vec::as_slice).collect();
        let truth = match words.as_slice() {
            [] => false,
            [word] => !word.is_empty(),
            [b"!", word] => word.is_empty(),
            [op, word] => self.unary(op, word, line)?,
            [left, op, right] if is_binary(op) => binary(left, op, right, line)?,
            [b"!", op, word] => !self.unary(op, word, line)?,
            [b"!", left, op, right] if is_binary(op) => !binary(left, op, right, line)?,
            _ => return Err(unsupported(line, "a test of many words")),
        };
        Ok(u8::from(!truth))
    }

    pub(super) fn unary(&self, op: &[u8], word: &[u8], line: u32) -> Run<bool> {
        match op {
            b"-n" => Ok(!word.is_empty()),
            b"-z" => Ok(word.is_empty()),
            [
                b'-',
                letter @ (b'e' | b'f' | b'd' | b'r' | b'w' | b'x' | b's' | b'h' | b'L'),
            ] => self
                .files
                .test(*letter, word)
                .ok_or_else(|| unsupported(line, "a test of a file")),
            _ => Err(unsupported(line, "a test")),
        }
    }
}

fn is_binary(op: &[u8]) -> bool {
    matches!(
        op,
        b"=" | b"==" | b"!=" | b"-eq" | b"-ne" | b"-lt" | b"-le" | b"-gt" | b"-ge"
    )
}

pub(super) fn binary(left: &[u8], op: &[u8], right: &[u8], line: u32) -> Run<bool> {
    let number = |text: &[u8]| {
        let text = std::str::from_utf8(text).map(str::trim);
        text.ok()
            .and_then(|t| t.parse::<i64>().ok())
            .ok_or_else(|| unsupported(line, "a number"))
    };
    Ok(match op {
        b"=" | b"==" => left == right,
        b"!=" => left != right,
        b"-eq" => number(left)? == number(right)?,
        b"-ne" => number(left)? != number(right)?,
        b"-lt" => number(left)? < number(right)?,
        b"-le" => number(left)? <= number(right)?,
        b"-gt" => number(left)? > number(right)?,
        _ => number(left)? >= number(right)?,
    })
}
