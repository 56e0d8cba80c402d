//! Tokens of our own: the one of the settings, and those of a file that may change while the server runs.
//!
//! Only digests are kept and compared: how long that takes tells nothing about a token.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::Error;
use crate::config::yaml::{self, Node};
use crate::config::{self, nearest};
use crate::model::access::{Access, Principal, Scope};
use crate::model::time::Timestamp;
use crate::telemetry::now;

const FILE_MAX: u64 = 1 << 20;
/// A token that is shorter could be guessed.
const TOKEN_MIN: usize = 16;
const KEYS: [&str; 5] = ["token", "sha256", "scopes", "principal", "expires"];

/// The digest of a token.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Token([u8; 32]);

impl Token {
    fn of(text: &str) -> Self {
        Self(Sha256::digest(text.as_bytes()).into())
    }

    fn from_hex(text: &str) -> Option<Self> {
        let mut bytes = [0; 32];
        let digits = text.as_bytes();
        if digits.len() != 64 || !digits.iter().all(u8::is_ascii_hexdigit) {
            return None;
        }
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[at * 2..at * 2 + 2], 16).ok()?;
        }
        Some(Self(bytes))
    }

    fn equals(&self, other: &Self) -> bool {
        self.0.iter().zip(other.0).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
    }
}

/// Whoever was let in, and for how long.
#[derive(Debug, Clone)]
pub(super) struct Admitted {
    pub(super) access: Arc<Access>,
    /// Fires when the token does not count any more.
    pub(super) revoked: CancellationToken,
    /// When it ends by itself.
    pub(super) until: Option<Timestamp>,
}

/// A token of the file.
#[derive(Clone)]
struct Entry {
    digest: Token,
    admitted: Admitted,
}

/// The tokens that count now.
pub(super) struct Tokens {
    single: Option<(Token, Admitted)>,
    /// The one of the settings could be guessed.
    is_short: bool,
    file: Option<PathBuf>,
    kept: RwLock<Kept>,
}

#[derive(Default)]
struct Kept {
    entries: Arc<Vec<Entry>>,
    /// What was read last; none when there was nothing to read.
    text: Option<String>,
    /// What was wrong at the last look: it is told once.
    trouble: Option<String>,
}

impl Tokens {
    /// The tokens of the settings and of their files.
    pub(super) fn open(config: &config::Http) -> Result<Self, Error> {
        let operator = || Admitted { access: Arc::new(Access::OPERATOR), revoked: CancellationToken::new(), until: None };
        let single = single(config)?;
        let is_short = single.as_ref().is_some_and(|text| text.len() < TOKEN_MIN);
        let single = single.map(|text| (Token::of(&text), operator()));
        let tokens = Self { single, is_short, file: config.tokens_file.clone(), kept: RwLock::default() };
        if let Some(file) = &tokens.file {
            let text = read(file).map_err(|source| Error::TokenFile(file.clone(), source))?;
            let entries = parse(&text).map_err(|problem| problem.of(file))?;
            tokens.keep(Kept { entries: Arc::new(entries), text: Some(text), trouble: None });
        }
        Ok(tokens)
    }

    /// Whether there is any way in by a token.
    pub(super) fn any(&self) -> bool {
        self.single.is_some() || self.file.is_some()
    }

    /// Whether the token of the settings is too short for other machines to be let in by it.
    pub(super) fn is_short(&self) -> bool {
        self.is_short
    }

    /// Whose token this is. All are compared, whichever fits.
    pub(super) fn find(&self, text: &str) -> Option<Admitted> {
        let given = Token::of(text);
        let now = now();
        let mut found = None;
        if let Some((token, admitted)) = &self.single
            && token.equals(&given)
        {
            found = Some(admitted.clone());
        }
        let entries = self.kept.read().unwrap_or_else(PoisonError::into_inner).entries.clone();
        for entry in entries.iter() {
            if entry.digest.equals(&given) && entry.admitted.until.is_none_or(|until| now < until) {
                found = Some(entry.admitted.clone());
            }
        }
        found
    }

    /// Reads the file again, if it has changed. What cannot be read leaves the tokens as they were, and one that is gone or empty takes
    /// them away, unless it is so for one look only: whoever writes it may not be done.
    pub(super) fn refresh(&self) {
        let Some(file) = &self.file else { return };
        let text = match read(file) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => {
                if self.is_news(Some(error.to_string())) {
                    tracing::error!(file = %file.display(), %error, "the tokens cannot be read again: those of before count on");
                }
                return;
            }
        };
        if self.kept.read().unwrap_or_else(PoisonError::into_inner).text == text {
            self.is_news(None);
            return;
        }
        let is_bare = text.as_deref().is_none_or(|text| text.trim().is_empty());
        if is_bare && self.is_news(Some("there is nothing in it".into())) {
            tracing::warn!(file = %file.display(), "the file of tokens is gone or empty: those of before count for one more look");
            return;
        }
        let entries = match text.as_deref().map(parse).transpose() {
            Ok(entries) => entries.unwrap_or_default(),
            Err(problem) => {
                let mut kept = self.kept.write().unwrap_or_else(PoisonError::into_inner);
                (kept.text, kept.trouble) = (text, None);
                drop(kept);
                tracing::error!("{}: the tokens of before count on", problem.of(file));
                return;
            }
        };
        if text.is_none() {
            tracing::warn!(file = %file.display(), "the file of tokens is gone: none of them counts any more");
        }
        self.keep(Kept { entries: Arc::new(entries), text, trouble: None });
    }

    /// Keeps what is wrong with the file; whether that was not so at the look before.
    fn is_news(&self, trouble: Option<String>) -> bool {
        let mut kept = self.kept.write().unwrap_or_else(PoisonError::into_inner);
        let is_news = kept.trouble != trouble;
        kept.trouble = trouble;
        is_news
    }

    /// Puts other tokens in the place of those of before; whoever came by one that is gone or has changed is let go.
    fn keep(&self, mut new: Kept) {
        let mut kept = self.kept.write().unwrap_or_else(PoisonError::into_inner);
        let mut entries: Vec<Entry> = new.entries.to_vec();
        for old in kept.entries.iter() {
            let same = |new: &&mut Entry| {
                new.digest == old.digest && new.admitted.access == old.admitted.access && new.admitted.until == old.admitted.until
            };
            match entries.iter_mut().find(same) {
                Some(stays) => stays.admitted = old.admitted.clone(),
                None => old.admitted.revoked.cancel(),
            }
        }
        if kept.text.is_some() {
            tracing::info!(tokens = entries.len(), "read the file of tokens again");
        }
        new.entries = Arc::new(entries);
        *kept = new;
    }
}

/// The one token whose bearer is whoever runs the door.
fn single(config: &config::Http) -> Result<Option<String>, Error> {
    let text = match (&config.token, &config.token_file) {
        // The settings have read the file already; naming both is an error there.
        (Some(token), _) => token.expose().trim().to_owned(),
        (None, Some(path)) => {
            let text = std::fs::read_to_string(path).map_err(|source| Error::TokenFile(path.clone(), source))?;
            let first = text.lines().next().unwrap_or_default().trim().to_owned();
            if first.is_empty() {
                return Err(Error::Token(format!("the token file {} is empty: its first line must be the token", path.display())));
            }
            first
        }
        (None, None) => return Ok(None),
    };
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(Error::Token(
            "the HTTP token is empty or has characters that no header can carry: use letters, digits and punctuation".into(),
        ));
    }
    Ok(Some(text))
}

fn read(file: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    std::fs::File::open(file)?.take(FILE_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > FILE_MAX {
        return Err(std::io::Error::other(format!("it is larger than {FILE_MAX} bytes")));
    }
    Ok(text)
}

/// What is wrong with a file of tokens, and where.
#[derive(Debug)]
struct Problem {
    line: usize,
    reason: String,
}

impl Problem {
    fn of(self, file: &Path) -> Error {
        Error::Token(format!("{}:{}: {}", file.display(), self.line, self.reason))
    }
}

fn parse(text: &str) -> Result<Vec<Entry>, Problem> {
    let tree = yaml::parse(text).map_err(|error| Problem { line: error.line.unwrap_or(1), reason: error.reason })?;
    if tree.entries().is_empty() && !tree.is_null() {
        return Err(Problem { line: tree.line, reason: "expected names, each with a token or its sha256 below it".into() });
    }
    let mut entries: Vec<Entry> = Vec::new();
    for named in tree.entries() {
        let entry = entry(&named.key, named.line, &named.node)?;
        if entries.iter().any(|other| other.digest == entry.digest) {
            return Err(Problem { line: named.line, reason: format!("{} has the same token as another name", named.key) });
        }
        entries.push(entry);
    }
    Ok(entries)
}

fn entry(name: &str, line: usize, node: &Node) -> Result<Entry, Problem> {
    let at = |line: usize, reason: String| Problem { line, reason: format!("{name}: {reason}") };
    if let Some(unknown) = node.entries().iter().find(|entry| !KEYS.contains(&entry.key.as_str())) {
        let nearest = nearest(&unknown.key, KEYS).unwrap_or_default();
        return Err(at(unknown.line, format!("unknown key {:?}: the nearest known key is {nearest:?}", unknown.key)));
    }
    let digest = match (node.get("token"), node.get("sha256")) {
        (Some(token), None) => {
            // What stands there is a secret, also when it is wrong.
            let fits = |text: &&str| text.len() >= TOKEN_MIN && text.bytes().all(|byte| byte.is_ascii_graphic());
            let text = token.text().filter(fits);
            text.map(Token::of)
                .ok_or_else(|| at(token.line, format!("token is a text of at least {TOKEN_MIN} visible ASCII characters, in quotes")))?
        }
        (None, Some(digest)) => digest
            .text()
            .and_then(|text| Token::from_hex(text.trim()))
            .ok_or_else(|| at(digest.line, "sha256 is the token's digest, 64 hex digits (printf %s TOKEN | sha256sum)".into()))?,
        _ => return Err(at(line, "give either token or sha256".into())),
    };
    let mut scope = None;
    let scopes = match node.get("scopes").map(|node| (node.line, node.to_json())) {
        None => vec![(line, Scope::Assign.as_str().to_owned())],
        Some((line, serde_json::Value::String(text))) => {
            text.split([' ', ',']).filter(|word| !word.is_empty()).map(|word| (line, word.to_owned())).collect()
        }
        Some((line, serde_json::Value::Array(words))) => {
            words.iter().map(|word| (line, word.as_str().map_or_else(|| word.to_string(), str::to_owned))).collect()
        }
        Some((line, other)) => return Err(at(line, format!("scopes is a list of read, assign and admin, not {other}"))),
    };
    for (line, word) in scopes {
        scope = scope.max(Some(word.parse::<Scope>().map_err(|reason| at(line, reason))?));
    }
    let shown = match node.get("principal") {
        None => name,
        Some(given) => given.text().ok_or_else(|| at(given.line, "principal is a name".into()))?,
    };
    let principal = Principal::of_token(shown.trim()).ok_or_else(|| at(line, format!("{shown:?} is no name for a principal")))?;
    let until = match node.get("expires") {
        None => None,
        Some(given) => Some(
            given
                .text()
                .and_then(|text| text.parse().ok())
                .ok_or_else(|| at(given.line, "expires is a time like 2027-01-31T00:00:00Z".into()))?,
        ),
    };
    let access = Arc::new(Access { principal: Some(principal), scope });
    Ok(Entry { digest, admitted: Admitted { access, revoked: CancellationToken::new(), until } })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::hex::hex;

    const LONG: &str = "0123456789abcdef0123456789abcdef";

    fn tokens(text: &str) -> (tempfile::TempDir, Tokens) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tokens.yaml");
        std::fs::write(&file, text).unwrap();
        let tokens = Tokens::open(&config::Http { tokens_file: Some(file), ..Default::default() }).unwrap();
        (dir, tokens)
    }

    #[test]
    fn a_token_matches_itself_only() {
        let config = config::Http { token: Some(config::Secret::new("a-secret")), ..Default::default() };
        let tokens = Tokens::open(&config).unwrap();
        assert_eq!(*tokens.find("a-secret").unwrap().access, Access::OPERATOR);
        for other in ["", "a-secre", "a-secret2", "A-secret"] {
            assert!(tokens.find(other).is_none(), "{other:?}");
        }
    }

    #[test]
    fn tokens_have_names_and_scopes_and_may_stand_there_as_digests() {
        let digest = hex(&Sha256::digest("another-long-token"));
        let text = format!(
            "ci: {{token: {LONG}}}\nops:\n  sha256: {digest}\n  scopes: [read, admin]\n  principal: people\nweb: {{token: {LONG}x, scopes: read}}\n"
        );
        let (_dir, tokens) = tokens(&text);
        let found = |token: &str| tokens.find(token).map(|found| (found.access.principal.clone().unwrap().to_string(), found.access.scope));
        assert_eq!(found(LONG), Some(("token:ci".into(), Some(Scope::Assign))));
        assert_eq!(found("another-long-token"), Some(("token:people".into(), Some(Scope::Admin))));
        assert_eq!(found(&format!("{LONG}x")), Some(("token:web".into(), Some(Scope::Read))));
        assert_eq!(found(&digest), None, "a digest is no token");
    }

    #[test]
    fn a_token_ends_when_its_line_does_and_others_stay() {
        let (dir, tokens) = tokens(&format!("a: {{token: {LONG}a}}\nb: {{token: {LONG}b}}\n"));
        let file = dir.path().join("tokens.yaml");
        let (a, b) = (tokens.find(&format!("{LONG}a")).unwrap(), tokens.find(&format!("{LONG}b")).unwrap());
        std::fs::write(&file, format!("b: {{token: {LONG}b}}\nc: {{token: {LONG}c}}\n")).unwrap();
        tokens.refresh();
        assert!(tokens.find(&format!("{LONG}a")).is_none() && tokens.find(&format!("{LONG}c")).is_some());
        assert!(a.revoked.is_cancelled() && !b.revoked.is_cancelled());

        std::fs::write(&file, "b: {tken: x}\n").unwrap();
        tokens.refresh();
        assert!(tokens.find(&format!("{LONG}b")).is_some(), "a broken file takes nobody's token away");
        std::fs::write(&file, format!("b: {{token: {LONG}b, scopes: read}}\n")).unwrap();
        tokens.refresh();
        assert!(b.revoked.is_cancelled(), "other scopes are another token");
        for empty in [true, false] {
            let found = || tokens.find(&format!("{LONG}b")).is_some();
            match empty {
                true => std::fs::write(&file, "").unwrap(),
                false => std::fs::remove_file(&file).unwrap(),
            }
            tokens.refresh();
            assert!(found(), "whoever writes it may not be done");
            std::fs::write(&file, format!("b: {{token: {LONG}b}}\n")).unwrap();
            tokens.refresh();
            assert!(found());
        }
        std::fs::remove_file(&file).unwrap();
        tokens.refresh();
        tokens.refresh();
        assert!(tokens.find(&format!("{LONG}b")).is_none());
    }

    #[test]
    fn an_expired_token_does_not_count() {
        let (_dir, tokens) = tokens(&format!("a: {{token: {LONG}, expires: \"2001-01-01T00:00:00Z\"}}\n"));
        assert!(tokens.find(LONG).is_none());
    }

    #[test]
    fn what_is_wrong_names_the_line_and_hides_the_token() {
        for (text, said) in [
            ("- a\n", "expected names"),
            ("a: {token: short-secret}\n", "at least 16"),
            ("a:\n  sha256: 12\n", ":2: a: sha256"),
            ("a: {}\n", "either token or sha256"),
            (&format!("a: {{token: {LONG}, sha256: x}}\n"), "either token or sha256"),
            (&format!("a:\n  token: {LONG}\n  scope: read\n"), ":3: a: unknown key \"scope\": the nearest known key is \"scopes\""),
            (&format!("a: {{token: {LONG}, scopes: [write]}}\n"), "no scope"),
            (&format!("a: {{token: {LONG}, expires: tomorrow}}\n"), "expires is a time"),
            (&format!("a: {{token: {LONG}}}\nb: {{token: {LONG}}}\n"), ":2: b has the same token"),
            (&format!("a: {{token: {LONG}}}\na: {{token: {LONG}1}}\n"), ":2:"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let file = dir.path().join("tokens.yaml");
            std::fs::write(&file, text).unwrap();
            let error = Tokens::open(&config::Http { tokens_file: Some(file), ..Default::default() }).err().unwrap().to_string();
            assert!(error.contains(said) && error.contains("tokens.yaml:"), "{text}: {error}");
            assert!(!error.contains(LONG) && !error.contains("short-secret"), "{error}");
        }
    }
}
