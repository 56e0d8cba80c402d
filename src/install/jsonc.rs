//! Edits of JSON, with or without comments, that leave every other byte as it is.
//!
//! What is inserted follows the indentation, line ends and trailing commas of the place it comes to; what is taken out takes its own
//! line with it. It knows nothing of clients and files.

use jsonc_parser::ast::{Object, ObjectProp, Value as Ast};
use jsonc_parser::common::Ranged;
use jsonc_parser::{CollectOptions, ParseOptions, parse_to_ast};
use serde_json::Value;

use super::format::Trouble;
use super::node::Node;

/// Whether comments and trailing commas are allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    Strict,
    WithComments,
}

/// The whole document; none where there is nothing but space and comments.
pub(super) fn read(text: &str, dialect: Dialect) -> Result<Option<Value>, Trouble> {
    let tree = parse(text, dialect)?;
    Ok(tree.map(Value::from))
}

/// Whether a path leads through objects, each key of which stands there once, as far as it goes.
pub(super) fn check(text: &str, dialect: Dialect, path: &[&str]) -> Result<(), Trouble> {
    let Some(tree) = parse(text, dialect)? else { return Ok(()) };
    let mut object = object_of(&tree, "the file")?;
    for key in path {
        match find(object, key)? {
            Some(index) => object = object_of(&object.properties[index].value, key)?,
            None => break,
        }
    }
    Ok(())
}

/// The text with a value at a path; objects on the way are made where they are missing.
pub(super) fn set(text: &str, dialect: Dialect, path: &[&str], node: &Node) -> Result<String, Trouble> {
    let Some(tree) = parse(text, dialect)? else { return Ok(fresh(text, &node.clone().below(path))) };
    let layout = Layout::of(text, &tree);
    let mut object = object_of(&tree, "the file")?;
    for (depth, key) in path.iter().enumerate() {
        let below = &path[depth + 1..];
        match find(object, key)? {
            None => return Ok(insert(text, object, key, &node.clone().below(below), &layout)),
            Some(index) if below.is_empty() => {
                let value = &object.properties[index].value;
                let rendered = render(node, &layout.at(text, object), indent_of_line(text, value.start()));
                return Ok([&text[..value.start()], &rendered, &text[value.end()..]].concat());
            }
            Some(index) => object = object_of(&object.properties[index].value, key)?,
        }
    }
    Ok(text.to_owned())
}

/// The text without the value at a path; the same text when there is none.
pub(super) fn unset(text: &str, dialect: Dialect, path: &[&str]) -> Result<String, Trouble> {
    let Some(tree) = parse(text, dialect)? else { return Ok(text.to_owned()) };
    let mut object = object_of(&tree, "the file")?;
    for (depth, key) in path.iter().enumerate() {
        match find(object, key)? {
            None => break,
            Some(index) if depth + 1 == path.len() => return Ok(cut(text, object, index)),
            Some(index) => object = object_of(&object.properties[index].value, key)?,
        }
    }
    Ok(text.to_owned())
}

fn parse(text: &str, dialect: Dialect) -> Result<Option<Ast<'_>>, Trouble> {
    let lenient = dialect == Dialect::WithComments;
    let options = ParseOptions {
        allow_comments: lenient,
        allow_trailing_commas: lenient,
        allow_loose_object_property_names: false,
        allow_missing_commas: false,
        allow_single_quoted_strings: false,
        allow_hexadecimal_numbers: false,
        allow_unary_plus_numbers: false,
        allow_bare_decimal_point_numbers: false,
        allow_non_finite_numbers: false,
        allow_extended_string_escapes: false,
    };
    let parsed = parse_to_ast(text, &CollectOptions::default(), &options);
    let parsed = parsed.map_err(|error| Trouble::Broken { line: error.line_display(), reason: error.kind().to_string() })?;
    Ok(parsed.value)
}

fn object_of<'a, 'b>(value: &'b Ast<'a>, key: &str) -> Result<&'b Object<'a>, Trouble> {
    let found = match value {
        Ast::Object(object) => return Ok(object),
        Ast::Array(_) => "a list",
        Ast::StringLit(_) => "a text",
        Ast::NumberLit(_) => "a number",
        Ast::BooleanLit(_) => "a truth value",
        Ast::NullKeyword(_) => "null",
    };
    Err(Trouble::NoTable { key: key.to_owned(), found: found.to_owned() })
}

/// The index of a key; a key that stands there twice has no one place.
fn find(object: &Object<'_>, key: &str) -> Result<Option<usize>, Trouble> {
    let mut found = object.properties.iter().enumerate().filter(|(_, property)| property.name.as_str() == key).map(|(index, _)| index);
    match (found.next(), found.next()) {
        (first, None) => Ok(first),
        (_, Some(_)) => Err(Trouble::Twice { key: key.to_owned() }),
    }
}

/// How what is new is laid out.
#[derive(Debug, Clone, Copy)]
enum Layout<'t> {
    Lines { newline: &'t str, unit: &'t str },
    Flat { gap: &'t str },
}

impl<'t> Layout<'t> {
    /// The layout of a document.
    fn of(text: &'t str, tree: &Ast<'_>) -> Self {
        let newline = if text.find('\n').is_some_and(|at| text[..at].ends_with('\r')) { "\r\n" } else { "\n" };
        let first = tree.as_object().and_then(|object| object.properties.first());
        let outer = indent_of_line(text, tree.start());
        let unit = first.map(|property| indent_of_line(text, property.start())).map(|unit| unit.strip_prefix(outer).unwrap_or(unit));
        let unit = unit.filter(|unit| !unit.is_empty());
        match first {
            Some(property) if !text.trim().contains('\n') => Self::Flat { gap: gap_of(text, property) },
            _ => Self::Lines { newline, unit: unit.unwrap_or("  ") },
        }
    }

    /// The layout of what stands in an object: one that has all in one line keeps it so.
    fn at(self, text: &'t str, object: &Object<'_>) -> Self {
        match object.properties.first() {
            Some(first) if !text[object.start()..first.start()].contains('\n') => Self::Flat { gap: gap_of(text, first) },
            _ => self,
        }
    }
}

/// What stands between a colon and its value where all is in one line.
fn gap_of<'t>(text: &str, property: &ObjectProp<'_>) -> &'t str {
    if text[..property.value.start()].ends_with(' ') { " " } else { "" }
}

fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

fn render(node: &Node, layout: &Layout<'_>, indent: &str) -> String {
    let gap = match layout {
        Layout::Lines { .. } => " ",
        Layout::Flat { gap } => gap,
    };
    match (node, layout) {
        (Node::Text(text), _) => quoted(text),
        (Node::List(texts), _) => format!("[{}]", texts.iter().map(|text| quoted(text)).collect::<Vec<_>>().join(&format!(",{gap}"))),
        (Node::Map(pairs), Layout::Lines { newline, unit }) if !pairs.is_empty() => {
            let inner = format!("{indent}{unit}");
            let pair = |(key, value): &(String, Node)| format!("{newline}{inner}{}: {}", quoted(key), render(value, layout, &inner));
            format!("{{{}{newline}{indent}}}", pairs.iter().map(pair).collect::<Vec<_>>().join(","))
        }
        (Node::Map(pairs), _) => {
            let pair = |(key, value): &(String, Node)| format!("{}:{gap}{}", quoted(key), render(value, layout, indent));
            format!("{{{}}}", pairs.iter().map(pair).collect::<Vec<_>>().join(&format!(",{gap}")))
        }
    }
}

/// A document that holds nothing else but the comments that were there.
fn fresh(text: &str, node: &Node) -> String {
    let rendered = render(node, &Layout::Lines { newline: "\n", unit: "  " }, "");
    let end = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    [text, end, &rendered, "\n"].concat()
}

fn insert(text: &str, object: &Object<'_>, key: &str, node: &Node, document: &Layout<'_>) -> String {
    let layout = document.at(text, object);
    let close = object.end() - 1;
    let Some(last) = object.properties.last() else {
        return insert_first(text, object, key, node, document);
    };
    let comma = after_trivia(text, last.end());
    let has_comma = text[comma..].starts_with(',');
    let (added, at) = match layout {
        Layout::Lines { newline, .. } => {
            let indent = indent_of_line(text, last.start());
            let from = if has_comma { comma + 1 } else { last.end() };
            let added = format!("{newline}{indent}{}: {}", quoted(key), render(node, &layout, indent));
            (added, end_of_remark(text, from, close))
        }
        Layout::Flat { gap } => {
            let added = format!("{gap}{}:{gap}{}", quoted(key), render(node, &layout, ""));
            (added, if has_comma { comma + 1 } else { last.end() })
        }
    };
    match has_comma {
        true => [&text[..at], &added, ",", &text[at..]].concat(),
        false => [&text[..last.end()], ",", &text[last.end()..at], &added, &text[at..]].concat(),
    }
}

/// Into an object that has nothing but space and comments.
fn insert_first(text: &str, object: &Object<'_>, key: &str, node: &Node, layout: &Layout<'_>) -> String {
    let (open, close) = (object.start() + 1, object.end() - 1);
    let at = open + text[open..close].trim_end().len();
    match layout {
        Layout::Flat { gap } => {
            let added = format!("{}:{gap}{}", quoted(key), render(node, layout, ""));
            [&text[..at], &added, &text[at..]].concat()
        }
        Layout::Lines { newline, unit } => {
            let outer = indent_of_line(text, object.start());
            let indent = format!("{outer}{unit}");
            let added = format!("{newline}{indent}{}: {}", quoted(key), render(node, layout, &indent));
            let end = if text[at..close].contains('\n') { String::new() } else { format!("{newline}{outer}") };
            [&text[..at], &added, &end, &text[at..]].concat()
        }
    }
}

/// Takes a property out, with its comma, its line, and what is remarked behind it on that line.
fn cut(text: &str, object: &Object<'_>, index: usize) -> String {
    let property = &object.properties[index];
    let (open, close) = (object.start() + 1, object.end() - 1);
    let comma = after_trivia(text, property.end());
    let has_comma = text[comma..].starts_with(',');
    let end = if has_comma { comma + 1 } else { property.end() };
    let remark = end_of_remark(text, end, close);
    let rest = &text[remark..];
    let ends_line = rest.trim_start_matches([' ', '\t', '\r']).starts_with('\n') || rest.trim_start().len() == text[close..].len();
    let line = text[..property.start()].rfind('\n').map_or(0, |at| at + 1).max(open);
    let own_line = line > open && text[line..property.start()].trim().is_empty();
    let (start, end) = match (own_line, ends_line) {
        (true, true) => {
            let before = text[..line - 1].trim_end_matches('\r').len();
            (before, remark + rest.len() - rest.trim_start_matches([' ', '\t']).len())
        }
        (_, false) => (property.start(), end + text[end..].len() - text[end..].trim_start_matches([' ', '\t']).len()),
        (false, true) => (text[..property.start()].trim_end_matches([' ', '\t']).len().max(open), end),
    };
    // A last one without a comma leaves none behind it.
    let orphan = match index.checked_sub(1).map(|index| &object.properties[index]) {
        Some(previous) if !has_comma => Some(after_trivia(text, previous.end())),
        _ => None,
    };
    let head = match orphan {
        Some(orphan) if text[orphan..].starts_with(',') => [&text[..orphan], &text[orphan + 1..start.max(orphan + 1)]].concat(),
        _ => text[..start].to_owned(),
    };
    let tail = &text[end..];
    let is_empty = object.properties.len() == 1 && head[open..].trim().is_empty() && text[end..close].trim().is_empty();
    if is_empty { [&text[..open], &text[close..]].concat() } else { head + tail }
}

/// The indentation of the line that a place is in.
fn indent_of_line(text: &str, at: usize) -> &str {
    let line = &text[text[..at].rfind('\n').map_or(0, |newline| newline + 1)..];
    &line[..line.len() - line.trim_start_matches([' ', '\t']).len()]
}

/// The first place from here on that is neither space nor comment.
fn after_trivia(text: &str, mut at: usize) -> usize {
    loop {
        at += text[at..].len() - text[at..].trim_start().len();
        match comment_at(text, at) {
            Some(end) => at = end,
            None => return at,
        }
    }
}

/// The end of the comments that follow on the same line, or the place itself.
fn end_of_remark(text: &str, from: usize, close: usize) -> usize {
    let mut end = from;
    loop {
        let next = end + text[end..].len() - text[end..].trim_start_matches([' ', '\t']).len();
        match comment_at(text, next) {
            Some(after) if after <= close && !text[next..after].contains('\n') => end = after,
            _ => return end,
        }
    }
}

/// The end of the comment that begins here.
fn comment_at(text: &str, at: usize) -> Option<usize> {
    let rest = &text[at..];
    if rest.starts_with("//") {
        let line = rest.find('\n').map_or(rest, |end| &rest[..end]);
        return Some(at + line.trim_end_matches('\r').len());
    }
    rest.strip_prefix("/*").map(|inside| at + 2 + inside.find("*/").map_or(inside.len(), |end| end + 2))
}
