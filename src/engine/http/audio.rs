//! `POST /v1/audio/transcriptions` and `/v1/audio/translations`: forms with a file.
//!
//! The fields may come in any order, also the model after the file. The transcription depends on the bytes
//! of the file alone.

use memchr::memmem;
use serde_json::json;
use xxhash_rust::xxh3::xxh3_64;

use super::error::ApiError;
use super::plan::AnswerPart;
use super::reply::{self, Reply};
use super::run::{EngineCall, GenerationRequest};
use super::token;

/// The largest file in bytes, as the default of `VLLM_MAX_AUDIO_CLIP_FILESIZE_MB`.
const MAX_FILE_BYTES: usize = 25 * 1_024 * 1_024;

/// Transcribes the file of a form.
pub(super) async fn transcribe(call: &EngineCall) -> Result<Reply, ApiError> {
    let fields = fields(call).unwrap_or_default();
    let text_of = |name: &str| {
        let field = fields.iter().find(|(known, _)| known == name)?;
        std::str::from_utf8(field.1).ok()
    };
    let Some((_, file)) = fields.iter().find(|(name, _)| name == "file") else {
        let problem = "{'type': 'missing', 'loc': 'body.file', 'msg': 'Field required', 'input': 'None'}";
        return Err(ApiError::schema(&[problem.to_owned()], Some("body.file")));
    };
    if file.len() > MAX_FILE_BYTES {
        return Err(ApiError::bad_request("Maximum file size exceeded"));
    }
    let (_, lora) = call.model(text_of("model"))?;
    let mut request = GenerationRequest { n: 1, use_cache: true, ..GenerationRequest::default() };
    request.prompt = token::encode(&format!("<|audio {:016x}|>", xxh3_64(file)));
    let mut job = call.start(request, lora.as_deref())?;
    job.generation.finish().await;
    let text = job.answers[0].text(AnswerPart::Text, job.generation.reported(0).0);
    if text_of("response_format") == Some("text") {
        return Ok(reply::text("text/plain; charset=utf-8", text));
    }
    Ok(reply::ok(&json!({"text": text})))
}

/// Returns the name and the content of each part of the form; `None` when the body is not a form.
fn fields(call: &EngineCall) -> Option<Vec<(String, &[u8])>> {
    let kind = call.header("content-type")?;
    let boundary = kind.strip_prefix("multipart/form-data")?.split_once("boundary=")?.1;
    let boundary = boundary.split(';').next()?.trim().trim_matches('"');
    let marker = format!("--{boundary}");
    let mut parts = Vec::new();
    let mut starts = memmem::find_iter(&call.body, marker.as_bytes());
    let mut start = starts.next()? + marker.len();
    for end in starts {
        let part = call.body.get(start..end)?;
        start = end + marker.len();
        let head_end = memmem::find(part, b"\r\n\r\n")?;
        let head = std::str::from_utf8(&part[..head_end]).ok()?;
        let name = head.split_once(" name=\"")?.1.split('"').next()?;
        let content = &part[head_end + 4..];
        parts.push((name.to_owned(), content.strip_suffix(b"\r\n").unwrap_or(content)));
    }
    Some(parts)
}
