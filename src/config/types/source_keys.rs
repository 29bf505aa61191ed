//! The keys that an item of `upstreams` with a source may have.

/// The keys that name a source. Of several in one item the first counts.
pub const SOURCE_KINDS: [&str; 4] = ["gym", "dns", "kubernetes", "file"];

/// The keys of an item with a source that belong to a source alone.
pub(super) const SOURCE_KEYS: [&str; 6] = ["gym", "dns", "kubernetes", "file", "every", "resolver"];

const FROM_MODEL_SERVER: &str = "comes from the model server: leave it out";
const IN_FILE: &str = "is a setting of the file's own items: leave it out";

/// Returns why an item with the source `kind` cannot have `key`; `None` where it can.
pub fn why_not_of_source(kind: &str, key: &str) -> Option<String> {
    if key == kind {
        return None;
    }
    if key == "url" || SOURCE_KINDS.contains(&key) {
        return Some(format!("stands beside {kind}: an item has one of them"));
    }
    let why = match (kind, key) {
        ("file", "every") => return None,
        ("file", _) => IN_FILE,
        (_, "name") => "an upstream that is discovered has its host and port for a name: leave it out",
        ("gym", "models" | "api_key" | "api_key_env") => FROM_MODEL_SERVER,
        ("kubernetes", "every") => {
            "is for sources that are asked again, and this one is watched: leave it out"
        }
        ("gym" | "kubernetes", "resolver") => "is for dns: leave it out",
        _ => return None,
    };
    Some(why.into())
}
