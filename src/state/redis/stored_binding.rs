//! The value of a binding's key: the upstream's name, and behind a space its number in hexadecimal digits,
//! if there is one: `gpu-1 7a3f1`.
//!
//! Older balancers write the name alone, as names have no spaces. The appended number makes it an unknown
//! name for them: they query the upstreams.

/// The upstream of a session or a response, as some balancer has stored it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredBinding {
    pub upstream: String,
    /// See `exchange::BindingUpdate`.
    pub number: u64,
}

// === impl StoredBinding ===

impl StoredBinding {
    /// Formats the value.
    pub fn write(upstream: &str, number: u64) -> String {
        match number {
            0 => upstream.to_string(),
            number => format!("{upstream} {number:x}"),
        }
    }

    /// Parses the value.
    pub fn read(written: String) -> Self {
        let split = written.rsplit_once(' ');
        let numbered = split.and_then(|(name, digits)| Some((name, u64::from_str_radix(digits, 16).ok()?)));
        match numbered {
            Some((name, number)) => StoredBinding { upstream: name.to_string(), number },
            None => StoredBinding { upstream: written, number: 0 },
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_older_and_unexpected_values() {
        for (text, upstream, number) in [
            ("gpu-1", "gpu-1", 0),
            ("gpu-1 7a3f1", "gpu-1", 0x7a3f1),
            ("[::1]:80 1", "[::1]:80", 1),
            ("", "", 0),
            ("gpu-1 ", "gpu-1 ", 0),
            ("gpu-1 fast", "gpu-1 fast", 0),
            ("gpu-1 10000000000000000", "gpu-1 10000000000000000", 0),
        ] {
            assert_eq!(
                StoredBinding::read(text.into()),
                StoredBinding { upstream: upstream.into(), number },
                "{text:?}"
            );
        }
        assert_eq!(StoredBinding::write("gpu-1", 0), "gpu-1", "older balancers know the name");
    }

    proptest! {
        #[test]
        fn reads_what_was_written(upstream in "[a-z0-9._:/-]{1,20}", number in any::<u64>()) {
            let read = StoredBinding::read(StoredBinding::write(&upstream, number));
            prop_assert_eq!(read, StoredBinding { upstream, number });
        }
    }
}
