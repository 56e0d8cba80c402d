//! Edits of TOML that leave every other line as it is, comments and line ends too.

use serde_json::{Map, Value};
use toml_edit::{Array, DocumentMut, InlineTable, Item, Table, TableLike};

use super::format::Trouble;
use super::node::Node;

/// The whole document.
pub(super) fn read(text: &str) -> Result<Value, Trouble> {
    Ok(value_of_table(parse(text)?.as_table()))
}

/// The text with a value at a path; tables on the way are made where they are missing.
pub(super) fn set(text: &str, path: &[&str], node: &Node) -> Result<String, Trouble> {
    let before = parse(text)?;
    let mut after = before.clone();
    let Some((last, way)) = path.split_last() else { return Ok(text.to_owned()) };
    let mut table: &mut dyn TableLike = after.as_table_mut();
    let mut inline = false;
    for key in way {
        if !table.contains_key(key) {
            let mut made = Table::new();
            made.set_implicit(true);
            table.insert(key, Item::Table(made));
        }
        let found = table.get_mut(key).ok_or_else(|| Trouble::NoTable { key: (*key).to_owned(), found: "nothing".into() })?;
        inline |= found.is_inline_table();
        let kind = found.type_name().to_owned();
        table = found.as_table_like_mut().ok_or_else(|| Trouble::NoTable { key: (*key).to_owned(), found: format!("a TOML {kind}") })?;
    }
    let item = match node {
        Node::Map(pairs) if !inline => {
            let mut made = Table::new();
            pairs.iter().for_each(|(key, value)| _ = made.insert(key, Item::Value(value_of_node(value))));
            match table.get(last).and_then(Item::as_table) {
                Some(old) => {
                    made.set_position(old.position());
                    *made.decor_mut() = old.decor().clone();
                }
                None if !text.trim().is_empty() => made.decor_mut().set_prefix("\n"),
                None => {}
            }
            Item::Table(made)
        }
        other => Item::Value(value_of_node(other)),
    };
    table.insert(last, item);
    Ok(relined(text, &before.to_string(), &after.to_string()))
}

/// The text without the value at a path; the same text when there is none.
pub(super) fn unset(text: &str, path: &[&str]) -> Result<String, Trouble> {
    let before = parse(text)?;
    let mut after = before.clone();
    let Some((last, way)) = path.split_last() else { return Ok(text.to_owned()) };
    let mut table: &mut dyn TableLike = after.as_table_mut();
    for key in way {
        match table.get_mut(key).and_then(Item::as_table_like_mut) {
            Some(found) => table = found,
            None => return Ok(text.to_owned()),
        }
    }
    if table.remove(last).is_none() {
        return Ok(text.to_owned());
    }
    Ok(relined(text, &before.to_string(), &after.to_string()))
}

fn parse(text: &str) -> Result<DocumentMut, Trouble> {
    text.parse::<DocumentMut>().map_err(|error| {
        let at = error.span().map_or(0, |span| span.start).min(text.len());
        let line = text.as_bytes()[..at].iter().filter(|byte| **byte == b'\n').count() + 1;
        Trouble::Broken { line, reason: error.message().to_owned() }
    })
}

/// Gives the lines that did not change back as they were: the crate writes every line end as `\n`, and one at the end.
fn relined(original: &str, before: &str, after: &str) -> String {
    let lines = |text: &str| text.split_inclusive('\n').map(str::to_owned).collect::<Vec<_>>();
    let (kept, before, after) = (lines(original), lines(before), lines(after));
    if kept.len() != before.len() {
        return after.concat();
    }
    let newline = if kept.first().is_some_and(|line| line.ends_with("\r\n")) { "\r\n" } else { "\n" };
    let head = before.iter().zip(&after).take_while(|(old, new)| old == new).count();
    let longest = before.len().min(after.len()) - head;
    let tail = before.iter().rev().zip(after.iter().rev()).take(longest).take_while(|(old, new)| old == new).count();
    let mut text = kept[..head].concat();
    if head > 0 && head + tail < after.len() && !text.ends_with('\n') {
        text.push_str(newline);
    }
    after[head..after.len() - tail].iter().for_each(|line| text.push_str(&line.replace('\n', newline)));
    text + &kept[kept.len() - tail..].concat()
}

fn value_of_node(node: &Node) -> toml_edit::Value {
    match node {
        Node::Text(text) => text.as_str().into(),
        Node::List(texts) => texts.iter().map(String::as_str).collect::<Array>().into(),
        Node::Map(pairs) => pairs.iter().map(|(key, value)| (key.as_str(), value_of_node(value))).collect::<InlineTable>().into(),
    }
}

fn value_of_table(table: &dyn TableLike) -> Value {
    Value::Object(table.iter().map(|(key, item)| (key.to_owned(), value_of_item(item))).collect::<Map<_, _>>())
}

fn value_of_item(item: &Item) -> Value {
    match item {
        Item::None => Value::Null,
        Item::Table(table) => value_of_table(table),
        Item::ArrayOfTables(tables) => tables.iter().map(|table| value_of_table(table)).collect(),
        Item::Value(value) => value_of(value),
    }
}

fn value_of(value: &toml_edit::Value) -> Value {
    use toml_edit::Value as V;
    match value {
        V::String(text) => Value::from(text.value().as_str()),
        V::Integer(number) => Value::from(*number.value()),
        V::Float(number) => Value::from(number.value().to_string()),
        V::Boolean(truth) => Value::from(*truth.value()),
        V::Datetime(moment) => Value::from(moment.value().to_string()),
        V::Array(values) => values.iter().map(value_of).collect(),
        V::InlineTable(table) => value_of_table(table),
    }
}
