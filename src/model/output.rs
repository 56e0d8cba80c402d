//! What an agent gave back: small enough to stand in a message, or a blob named by its digest.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What kind of text a result is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Media {
    /// Plain text.
    Text,
    /// One JSON document.
    Json,
}

impl Media {
    /// The media type of a resource that holds it.
    pub const fn mime(self) -> &'static str {
        match self {
            Self::Text => "text/plain",
            Self::Json => "application/json",
        }
    }
}

/// A blob's address: its SHA-256 in lower-case hex, its size and what it holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobRef {
    /// SHA-256, 64 lower-case hex digits.
    pub sha256: String,
    /// Size in bytes.
    pub size: u64,
    /// What it holds.
    pub media: Media,
}

/// The result of a work.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// A JSON value; a string is plain text.
    Inline(Value),
    /// A result too large for a message.
    Blob(BlobRef),
}

impl Output {
    /// What kind of text it is.
    pub fn media(&self) -> Media {
        match self {
            Self::Inline(Value::String(_)) => Media::Text,
            Self::Inline(_) => Media::Json,
            Self::Blob(blob) => blob.media,
        }
    }

    /// The bytes of an inline result: a string's own text, or compact JSON.
    pub fn inline_text(value: &Value) -> String {
        match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        }
    }
}
