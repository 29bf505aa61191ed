//! The dashboard: one document that holds its styles and scripts, so that the page loads nothing else.
//!
//! `src/dashboard/index.html` names their places with `<!-- style -->` and `<!-- script -->`. The content
//! security policy admits exactly these styles and scripts, by their hashes.

use std::sync::LazyLock;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use bytes::Bytes;
use ring::digest::{SHA256, digest};

const DOCUMENT: &str = include_str!("dashboard/index.html");

/// The styles and the scripts, in the order in which the document gets them.
const STYLES: &[&str] = &[
    include_str!("dashboard/vendor/uPlot.min.css"),
    include_str!("dashboard/style.css"),
    include_str!("dashboard/panels.css"),
    include_str!("dashboard/fleet.css"),
    include_str!("dashboard/details.css"),
];
const SCRIPTS: &[&str] = &[
    include_str!("dashboard/vendor/uPlot.iife.min.js"),
    include_str!("dashboard/dom.js"),
    include_str!("dashboard/store.js"),
    include_str!("dashboard/stream.js"),
    include_str!("dashboard/plots.js"),
    include_str!("dashboard/totals.js"),
    include_str!("dashboard/fleet.js"),
    include_str!("dashboard/upstream.js"),
    include_str!("dashboard/models.js"),
    include_str!("dashboard/decisions.js"),
    include_str!("dashboard/sessions.js"),
    include_str!("dashboard/traces.js"),
    include_str!("dashboard/actions.js"),
    include_str!("dashboard/app.js"),
];

const STYLE_MARK: &str = "<!-- style -->";
const SCRIPT_MARK: &str = "<!-- script -->";

/// The page as it is served.
pub(crate) static PAGE: LazyLock<DashboardPage> = LazyLock::new(DashboardPage::new);

/// The page, and the headers that depend on it.
#[derive(Debug)]
pub(crate) struct DashboardPage {
    pub html: Bytes,
    /// The value of `content-security-policy`.
    pub policy: String,
    /// The value of `etag`.
    pub etag: String,
}

// === impl DashboardPage ===

impl DashboardPage {
    fn new() -> Self {
        let html = DOCUMENT.replacen(STYLE_MARK, &elements("style", STYLES), 1).replacen(
            SCRIPT_MARK,
            &elements("script", SCRIPTS),
            1,
        );
        let policy = format!(
            "default-src 'none'; script-src {}; style-src {}; connect-src 'self'; img-src 'self' data:; \
             base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            hashes(SCRIPTS),
            hashes(STYLES),
        );
        let etag =
            format!("\"{}\"", URL_SAFE_NO_PAD.encode(&digest(&SHA256, html.as_bytes()).as_ref()[..12]));
        DashboardPage { html: html.into(), policy, etag }
    }
}

/// An element for each text.
fn elements(name: &str, texts: &[&str]) -> String {
    texts.iter().map(|text| format!("<{name}>{text}</{name}>")).collect()
}

/// The hashes of the texts, as a policy lists them.
fn hashes(texts: &[&str]) -> String {
    let hash = |text: &&str| format!("'sha256-{}'", STANDARD.encode(digest(&SHA256, text.as_bytes())));
    texts.iter().map(hash).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn html() -> String {
        String::from_utf8(PAGE.html.to_vec()).expect("the page is text")
    }

    #[test]
    fn the_document_holds_its_styles_and_scripts() {
        let html = html();
        for mark in [STYLE_MARK, SCRIPT_MARK] {
            assert_eq!((DOCUMENT.matches(mark).count(), html.contains(mark)), (1, false), "{mark}");
        }
        for text in STYLES.iter().chain(SCRIPTS) {
            assert!(html.contains(text));
        }
        assert_eq!(html.matches("<script").count(), SCRIPTS.len(), "each script has its hash");
        assert_eq!(html.matches("<style").count(), STYLES.len(), "each style has its hash");
    }

    #[test]
    fn no_text_ends_its_element_early() {
        for text in STYLES.iter().chain(SCRIPTS) {
            let text = text.to_ascii_lowercase();
            assert!(!text.contains("</style") && !text.contains("</script") && !text.contains("<!--"));
        }
    }

    #[test]
    fn the_page_names_no_other_host() {
        let html = html();
        for attribute in ["src=\"http", "href=\"http", "url(http", "@import"] {
            assert!(!html.contains(attribute), "{attribute}");
        }
    }

    #[test]
    fn a_hash_is_that_of_the_text() {
        // By `printf 'alert(1)' | openssl dgst -sha256 -binary | base64`.
        assert_eq!(hashes(&["alert(1)"]), "'sha256-bhHHL3z2vDgxUt0W3dWQOrprscmda2Y5pLsLg4GF+pI='");
    }
}
