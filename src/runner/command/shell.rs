//! Arguments that a shell will read as its script.
//!
//! Where an agent's file says `sh -c "scan {task}"`, the client's text must not become part of the script. It goes into a variable,
//! and the script gets a reference to it, quoted as its place asks for.

use std::path::Path;

const SHELLS: [&str; 7] = ["sh", "bash", "dash", "ash", "zsh", "ksh", "mksh"];

/// Which of these arguments is a shell's script.
pub(super) fn script_at(command: &[String]) -> Option<usize> {
    let is_shell = |word: &String| Path::new(word).file_name().and_then(|name| name.to_str()).is_some_and(|name| SHELLS.contains(&name));
    let shell = command.iter().position(is_shell)?;
    let mut dash_c = false;
    for (at, word) in command.iter().enumerate().skip(shell + 1) {
        let option = word.len() > 1 && word.starts_with(['-', '+']);
        if !option {
            return dash_c.then_some(at);
        }
        dash_c |= !word.starts_with("--") && word.contains('c');
    }
    None
}

/// Follows a script's quotes.
pub(super) struct Quotes(Vec<Quote>);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Quote {
    Bare,
    Tick,
    Double,
    Single,
}

impl Quotes {
    /// A script's beginning.
    pub(super) fn new() -> Self {
        Self(vec![Quote::Bare])
    }

    /// Goes over a stretch of the script.
    pub(super) fn pass(&mut self, text: &str) {
        let mut chars = text.chars().peekable();
        while let Some(c) = chars.next() {
            let top = self.top();
            match (c, top) {
                ('\'', Quote::Single) | ('"', Quote::Double) | ('`', Quote::Tick) => self.pop(),
                (_, Quote::Single) => {}
                ('\\', _) => drop(chars.next()),
                ('\'', Quote::Bare | Quote::Tick) => self.0.push(Quote::Single),
                ('"', _) => self.0.push(Quote::Double),
                ('`', _) => self.0.push(Quote::Tick),
                ('$', Quote::Double) if chars.peek() == Some(&'(') => {
                    chars.next();
                    self.0.push(Quote::Bare);
                }
                ('(', Quote::Bare | Quote::Tick) => self.0.push(Quote::Bare),
                (')', Quote::Bare) => self.pop(),
                _ => {}
            }
        }
    }

    /// How to refer to a variable here, as one word.
    pub(super) fn reference(&self, variable: &str) -> String {
        match self.top() {
            Quote::Double => format!("${{{variable}}}"),
            Quote::Single => format!("'\"${{{variable}}}\"'"),
            Quote::Bare | Quote::Tick => format!("\"${{{variable}}}\""),
        }
    }

    fn top(&self) -> Quote {
        self.0.last().copied().unwrap_or(Quote::Bare)
    }

    fn pop(&mut self) {
        if self.0.len() > 1 {
            self.0.pop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shells_script_is_found() {
        let at = |words: &[&str]| script_at(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>());
        assert_eq!(at(&["sh", "-c", "x"]), Some(2));
        assert_eq!(at(&["/usr/bin/env", "bash", "-e", "-lc", "x", "y"]), Some(4));
        assert_eq!(at(&["sh", "x.sh", "-c", "y"]), None);
        assert_eq!(at(&["./scan.sh", "-c", "y"]), None);
        assert_eq!(at(&["grep", "-c", "y"]), None);
    }

    #[test]
    fn a_reference_is_quoted_as_its_place_asks_for() {
        let after = |text: &str| {
            let mut quotes = Quotes::new();
            quotes.pass(text);
            quotes.reference("X")
        };
        assert_eq!(after("echo "), "\"${X}\"");
        assert_eq!(after("echo \"a "), "${X}");
        assert_eq!(after("echo 'a "), "'\"${X}\"'");
        assert_eq!(after("echo \"$(cat "), "\"${X}\"");
        assert_eq!(after("echo \"$(cat 'x') "), "${X}");
        assert_eq!(after("echo \"it's "), "${X}");
        assert_eq!(after("echo it\\'s "), "\"${X}\"");
    }
}
