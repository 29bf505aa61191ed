//! Parses what the API server sends: pages of a list, lines of a watch, and refusals. Pure.
//!
//! A watch is an answer without end: each line is one event, `{"type": "ADDED", "object": {…}}`. A page and a
//! line are parsed as a whole or rejected as a whole: a list that lacks an object would remove its engines.

use std::time::Duration;

use serde::Deserialize;

use super::slices::EndpointSlice;

/// The longest text of a refusal in a message of our own.
const MAX_REFUSAL_CHARS: usize = 300;

/// The status of a request that a `resourceVersion` or a `continue` is too old for.
pub(super) const GONE_STATUS: u16 = 410;

/// A page of the list of slices.
#[derive(Debug, Deserialize)]
pub(super) struct SlicePage {
    pub(super) metadata: PageMetadata,
    items: Option<Vec<EndpointSlice>>,
}

/// The metadata of a page.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PageMetadata {
    #[serde(default)]
    pub(super) resource_version: String,
    /// The key of the next page.
    #[serde(default)]
    r#continue: String,
}

/// One line of a watch.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", content = "object")]
pub(super) enum SliceEvent {
    #[serde(rename = "ADDED", alias = "MODIFIED")]
    Put(EndpointSlice),
    #[serde(rename = "DELETED")]
    Delete(EndpointSlice),
    /// Moves the `resourceVersion`.
    #[serde(rename = "BOOKMARK")]
    Bookmark(WatchBookmark),
    /// Ends the watch.
    #[serde(rename = "ERROR")]
    Failed(ApiStatus),
}

/// The object of a bookmark, which has a version and no name.
#[derive(Debug, Deserialize)]
pub(super) struct WatchBookmark {
    metadata: BookmarkMetadata,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct BookmarkMetadata {
    #[serde(default)]
    resource_version: String,
}

/// The object in which the API server says why a request failed.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ApiStatus {
    pub(super) code: u16,
    reason: String,
    message: String,
}

/// Collects the bytes of a watch into lines.
#[derive(Debug, Default)]
pub(super) struct LineBuffer {
    bytes: Vec<u8>,
}

/// Parses a page of a list.
pub(super) fn page(body: &[u8]) -> Result<SlicePage, String> {
    serde_json::from_slice(body).map_err(|error| format!("the list of slices is invalid: {error}"))
}

/// Parses a line of a watch.
pub(super) fn event(line: &[u8]) -> Result<SliceEvent, String> {
    serde_json::from_slice(line).map_err(|error| format!("an event of the watch is invalid: {error}"))
}

/// Returns the time that a refused client is to wait, if the server names one in seconds.
pub(super) fn retry_after(value: &str) -> Option<Duration> {
    value.trim().parse().ok().map(Duration::from_secs)
}

// === impl SlicePage ===

impl SlicePage {
    /// Returns the slices and the key of the next page, if there is one.
    pub(super) fn into_parts(self) -> (Vec<EndpointSlice>, Option<String>) {
        let next = Some(self.metadata.r#continue).filter(|key| !key.is_empty());
        (self.items.unwrap_or_default(), next)
    }
}

// === impl SliceEvent ===

impl SliceEvent {
    /// Returns the version that the event moves the watch to, or `""`.
    pub(super) fn resource_version(&self) -> &str {
        match self {
            SliceEvent::Put(slice) | SliceEvent::Delete(slice) => &slice.metadata.resource_version,
            SliceEvent::Bookmark(bookmark) => &bookmark.metadata.resource_version,
            SliceEvent::Failed(_) => "",
        }
    }
}

// === impl ApiStatus ===

impl ApiStatus {
    /// Parses the body of a refusal. A body that is no status, such as a proxy's page, is the message.
    pub(super) fn parse(code: u16, body: &[u8]) -> Self {
        let parsed: Option<ApiStatus> = serde_json::from_slice(body).ok();
        let status = parsed.filter(|status| !status.message.is_empty() || !status.reason.is_empty());
        let text =
            || ApiStatus { message: String::from_utf8_lossy(body).trim().into(), ..ApiStatus::default() };
        ApiStatus { code, ..status.unwrap_or_else(text) }
    }

    /// Says what was refused, and for a refusal of permission which rule is missing.
    pub(super) fn explain(&self, namespace: &str) -> String {
        let said: String = self.message.chars().take(MAX_REFUSAL_CHARS).collect();
        let said = if said.is_empty() { self.reason.clone() } else { said };
        let remedy = match self.code {
            401 => "; the API server rejects the credentials: check the token or the kubeconfig".into(),
            403 => format!(
                "; grant the service account a role in namespace {namespace} with \
                 apiGroups [discovery.k8s.io], resources [endpointslices], verbs [get, list, watch]"
            ),
            404 => {
                "; check the address of the API server and its version, which must be 1.21 or later".into()
            }
            _ => String::new(),
        };
        format!("status {}: {said}{remedy}", self.code)
    }
}

// === impl LineBuffer ===

impl LineBuffer {
    /// Adds bytes of the watch. Returns the lines that are complete, without empty ones, or an error when the
    /// line that is not complete has more than `max_bytes`.
    pub(super) fn push(&mut self, bytes: &[u8], max_bytes: usize) -> Result<Vec<Vec<u8>>, String> {
        let mut lines = Vec::new();
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            if self.bytes.len() + piece.len() > max_bytes {
                return Err(format!("an event of the watch has more than {max_bytes} bytes"));
            }
            self.bytes.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut self.bytes);
                lines.extend(Some(line).filter(|line| !line.trim_ascii().is_empty()));
            }
        }
        Ok(lines)
    }
}

#[cfg(test)]
mod tests;
