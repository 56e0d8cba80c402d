//! The YAML between the two `---` lines at the top of a file, and the body below it.

use super::Flaw;
use crate::config::yaml::{self, Content, Node};

/// A file, taken apart.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct FrontMatter<'a> {
    /// The keys; lines count from the top of the file.
    pub(super) tree: Node,
    /// What stands below.
    pub(super) body: &'a str,
    /// The line on which the body begins.
    pub(super) body_line: usize,
}

fn is_fence(line: &str) -> bool {
    line.trim_end() == "---"
}

/// Whether a text begins with front matter.
pub(super) fn begins(text: &str) -> bool {
    text.lines().next().is_some_and(is_fence)
}

/// Takes a file apart.
pub(super) fn split(text: &str) -> Result<FrontMatter<'_>, Flaw> {
    if !begins(text) {
        return Err(Flaw::at(
            1,
            "front matter is missing: the first line is ---, then come keys like name and description, then --- again",
        ));
    }
    let mut offset = 0;
    let mut yaml = None;
    for (n, line) in text.split_inclusive('\n').enumerate() {
        if n > 0 && is_fence(line) {
            yaml = Some((n, offset, offset + line.len()));
            break;
        }
        offset += line.len();
    }
    let (lines, end, body) = yaml.ok_or_else(|| Flaw::at(1, "front matter is not closed: a second --- line is missing"))?;
    // The fence goes and its line stays, so that lines count from the top of the file.
    let start = text.find('\n').unwrap_or(0);
    let tree = yaml::parse(&text[start..end]).map_err(|error| Flaw { line: error.line, reason: error.reason })?;
    if !matches!(tree.content, Content::Map(_)) && !tree.is_null() {
        return Err(Flaw::at(tree.line.max(2), "front matter is not a mapping: it has keys like name: and description:"));
    }
    Ok(FrontMatter { tree, body: &text[body..], body_line: lines + 2 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_count_from_the_top_of_the_file() {
        let file = split("---\r\nname: x\r\n\r\nlimits:\r\n  timeout: 5m\r\n---\r\nbody\r\n").unwrap();
        assert_eq!(file.tree.get("limits").unwrap().get("timeout").unwrap().line, 5);
        assert_eq!((file.body, file.body_line), ("body\r\n", 7));
    }

    #[test]
    fn broken_fences_are_named() {
        assert!(split("# title\n").unwrap_err().reason.starts_with("front matter is missing"));
        assert!(split("").unwrap_err().reason.starts_with("front matter is missing"));
        assert!(split("---\nname: x\n").unwrap_err().reason.starts_with("front matter is not closed"));
        assert!(split("---\n- x\n---\n").unwrap_err().reason.starts_with("front matter is not a mapping"));
        assert_eq!(split("---\nname: x\nbad: [1\n---\n").unwrap_err().line.map(|line| line >= 3), Some(true));
        assert!(split("---\n---").unwrap().tree.is_null());
    }
}
