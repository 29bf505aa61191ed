//! What the translation of an answer takes from its request.

/// The facts of a request that the translation of its answer needs.
#[derive(Clone, Debug, Default)]
pub struct TranslationContext {
    /// The name that the client gave, and what it stands for.
    pub model: Option<String>,
    pub to: Option<String>,
    /// In seconds since 1970.
    pub now: u64,
    /// Makes the ids.
    pub seed: u128,
    /// Token ids and log-probabilities are put on the last item or block.
    pub token_ids: bool,
    /// The route added the log-probabilities: the client does not get them.
    pub hides_logprobs: bool,
}
