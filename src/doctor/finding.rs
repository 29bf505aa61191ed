//! One thing that is wrong, and what mends it.

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Severity {
    /// Requests fail, or an upstream or Redis is of no use.
    Error,
    /// Requests succeed, and are slower, or routed worse, than they could be.
    Warning,
    /// Worth knowing.
    Note,
}

/// One thing that is wrong with a set-up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    pub severity: Severity,
    /// A fixed name, for programs.
    pub code: &'static str,
    /// The name of the upstream, or what else the finding concerns.
    pub subject: String,
    /// The observation.
    pub seen: String,
    /// The flag of vLLM or the setting that mends it.
    pub remedy: String,
}

// === impl Severity ===

impl Severity {
    /// The name in reports.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Severity::Error => "error",
            Severity::Warning => "warning",
            Severity::Note => "note",
        }
    }
}

// === impl Finding ===

impl Finding {
    /// A finding of this severity.
    pub(crate) fn new(
        severity: Severity,
        code: &'static str,
        subject: &str,
        seen: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Finding { severity, code, subject: subject.into(), seen: seen.into(), remedy: remedy.into() }
    }

    pub(crate) fn error(code: &'static str, subject: &str, seen: impl Into<String>, remedy: &str) -> Self {
        Finding::new(Severity::Error, code, subject, seen, remedy)
    }

    pub(crate) fn warning(code: &'static str, subject: &str, seen: impl Into<String>, remedy: &str) -> Self {
        Finding::new(Severity::Warning, code, subject, seen, remedy)
    }

    pub(crate) fn note(code: &'static str, subject: &str, seen: impl Into<String>, remedy: &str) -> Self {
        Finding::new(Severity::Note, code, subject, seen, remedy)
    }
}
