//! The values that a meter has read of an answer.

/// An error that a stream reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamError {
    /// The HTTP status, if the interface reports one.
    pub code: Option<u16>,
}

/// The values read so far.
#[derive(Debug, Default)]
pub(super) struct MeterReadings {
    pub counts: UsageCounts,
    pub id: Option<Box<str>>,
    pub failure: Option<StreamError>,
}

/// The numbers of a usage under their names in the interfaces.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct UsageCounts {
    pub prompt: Option<u64>,
    pub input: Option<u64>,
    pub cache_read: Option<u64>,
    pub cache_creation: Option<u64>,
    pub cached: Option<u64>,
    pub output: Option<u64>,
    pub reasoning: Option<u64>,
}

// === impl MeterReadings ===

impl MeterReadings {
    /// Records an error; its status may follow.
    pub(super) fn fail(&mut self) {
        self.failure.get_or_insert_default();
    }
}

// === impl StreamError ===

impl StreamError {
    /// The status of the error, as if it had ended the request before the answer began.
    pub fn status(self) -> u16 {
        self.code.unwrap_or(500)
    }
}

// === impl UsageCounts ===

impl UsageCounts {
    /// Replaces the numbers that `later` has.
    pub(super) fn update(&mut self, later: &UsageCounts) {
        self.prompt = later.prompt.or(self.prompt);
        self.input = later.input.or(self.input);
        self.cache_read = later.cache_read.or(self.cache_read);
        self.cache_creation = later.cache_creation.or(self.cache_creation);
        self.cached = later.cached.or(self.cached);
        self.output = later.output.or(self.output);
        self.reasoning = later.reasoning.or(self.reasoning);
    }
}
