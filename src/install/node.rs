//! What an entry holds: texts, lists of texts, and maps that keep their order.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A value of an entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Node {
    /// A text.
    Text(String),
    /// Texts in their order.
    List(Vec<String>),
    /// Keys and their values, in the order in which they are written.
    Map(Vec<(String, Node)>),
}

impl Node {
    /// A map.
    pub fn map<const N: usize>(pairs: [(&str, Node); N]) -> Self {
        Self::Map(pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
    }

    /// A text.
    pub fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }

    /// The pairs of a map; none of anything else.
    pub fn pairs(&self) -> &[(String, Node)] {
        match self {
            Self::Map(pairs) => pairs,
            Self::Text(_) | Self::List(_) => &[],
        }
    }

    /// Under these keys, the first outermost.
    pub(super) fn below(self, path: &[&str]) -> Self {
        path.iter().rev().fold(self, |inner, key| Self::Map(vec![((*key).to_owned(), inner)]))
    }

    /// The same without an order.
    pub fn to_value(&self) -> Value {
        match self {
            Self::Text(text) => Value::from(text.as_str()),
            Self::List(texts) => Value::from(texts.as_slice()),
            Self::Map(pairs) => Value::Object(pairs.iter().map(|(key, value)| (key.clone(), value.to_value())).collect()),
        }
    }
}
