//! `POST /tokenize` and `/detokenize`.

use serde_json::json;

use super::error::ApiError;
use super::input::Input;
use super::render;
use super::reply::{self, Reply};
use super::run::EngineCall;
use super::token;

/// Returns the tokens of a text, or of a chat as its template renders it.
pub(super) fn tokenize(call: &EngineCall) -> Result<Reply, ApiError> {
    let mut input = call.input()?;
    if input.get("messages").is_none() {
        input.require("prompt");
    }
    input.list("messages");
    let prompt = input.string("prompt");
    let strings = input.boolean("return_token_strs").unwrap_or(false);
    let input = checked(call, input)?;
    let tokens = match prompt {
        Some(prompt) => token::encode(&prompt),
        None => render::chat(&input.body),
    };
    let strings = strings.then(|| tokens.iter().map(|&id| token::written(id)).collect::<Vec<_>>());
    Ok(reply::ok(&json!({
        "count": tokens.len(),
        "max_model_len": call.shared.options.max_model_len,
        "tokens": tokens,
        "token_strs": strings,
    })))
}

/// Answers `POST /detokenize`.
pub(super) fn detokenize(call: &EngineCall) -> Result<Reply, ApiError> {
    let mut input = call.input()?;
    input.require("tokens");
    input.list("tokens");
    let input = checked(call, input)?;
    let tokens = input.body["tokens"].as_array().into_iter().flatten();
    let tokens: Option<Vec<u32>> =
        tokens.map(|token| token.as_u64().and_then(|token| u32::try_from(token).ok())).collect();
    let tokens = tokens.ok_or_else(|| ApiError::bad_request("tokens must be token ids"))?;
    Ok(reply::ok(&json!({"prompt": token::decode(&tokens)})))
}

/// Checks the input; the error for an unknown model lists no aliases on these routes.
fn checked(call: &EngineCall, mut input: Input) -> Result<Input, ApiError> {
    let model = input.string("model");
    let input = input.checked()?;
    call.model(model.as_deref()).map_err(|error| {
        let message = format!("The model `{}` does not exist.", model.as_deref().unwrap_or_default());
        ApiError { message, ..error }
    })?;
    Ok(input)
}
