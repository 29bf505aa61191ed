//! `GET /v1/realtime`: a websocket that sends a greeting, echoes text and reports an unknown model.
//!
//! Implements as much of RFC 6455 as that needs: whole frames, masked by the client, of bounded length.

use std::io;
use std::sync::Arc;

use base64::engine::{Engine, general_purpose};
use http::{HeaderValue, Response, StatusCode, header};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::accepted::AcceptedConnection;
use super::clock;
use super::connection_state::BusyGuard;
use super::error::ApiError;
use super::reply::{self, Reply};
use super::run::EngineCall;
use super::shared::EngineShared;

/// The string that RFC 6455 appends to the client's key.
const HANDSHAKE_GUID: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
/// The longest accepted frame, in bytes.
const MAX_FRAME_BYTES: usize = 1_024 * 1_024;

const TEXT: u8 = 1;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

/// Accepts the upgrade; the conversation continues in a task of its own.
pub(super) fn open(call: &EngineCall, upgrade: OnUpgrade, busy: Arc<BusyGuard>) -> Result<Reply, ApiError> {
    let Some(key) = call.header("sec-websocket-key") else {
        return Err(ApiError::bad_request("Missing Sec-WebSocket-Key header"));
    };
    let accept = accept_key(key);
    let shared = Arc::clone(&call.shared);
    let mut open = AcceptedConnection::new(Arc::clone(&shared), Arc::default());
    tokio::spawn(async move {
        let _busy = busy;
        let Ok(upgraded) = upgrade.await else { return };
        tokio::select! {
            // An error means that the client has disconnected.
            _ = converse(upgraded, &shared) => {}
            () = open.ends() => {}
        }
    });
    let mut reply = Response::new(reply::boxed(bytes::Bytes::new()));
    *reply.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = reply.headers_mut();
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    if let Ok(accept) = HeaderValue::from_str(&accept) {
        headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    }
    headers.insert(header::SERVER, HeaderValue::from_static("uvicorn"));
    Ok(reply)
}

async fn converse(upgraded: Upgraded, shared: &EngineShared) -> io::Result<()> {
    let mut io = TokioIo::new(upgraded);
    let id = format!("sess-{}", shared.random_hex());
    let created = json!({"type": "session.created", "id": id, "created": clock::created()});
    write_frame(&mut io, TEXT, created.to_string().as_bytes()).await?;
    loop {
        let (kind, payload) = read_frame(&mut io).await?;
        match kind {
            TEXT => {
                let answer = answer(&payload, shared);
                write_frame(&mut io, TEXT, answer.as_deref().unwrap_or(&payload)).await?;
            }
            PING => write_frame(&mut io, PONG, &payload).await?,
            CLOSE => {
                write_frame(&mut io, CLOSE, &payload).await?;
                return io.shutdown().await;
            }
            _ => {}
        }
    }
}

/// Returns the answer to a message that is not echoed.
fn answer(payload: &[u8], shared: &EngineShared) -> Option<Vec<u8>> {
    let message: Value = serde_json::from_slice(payload).ok()?;
    let model = message["model"].as_str()?;
    if message["type"] != "session.update" || shared.options.resolve(Some(model)).is_some() {
        return None;
    }
    let error = format!("The model `{model}` does not exist.");
    let error = json!({"type": "error", "error": error, "code": "model_not_found"});
    Some(error.to_string().into_bytes())
}

async fn read_frame(io: &mut TokioIo<Upgraded>) -> io::Result<(u8, Vec<u8>)> {
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let mut head = [0; 2];
    io.read_exact(&mut head).await?;
    if head[0] & 0x80 == 0 || head[1] & 0x80 == 0 {
        return Err(invalid("only whole and masked frames are read"));
    }
    let length = match head[1] & 0x7F {
        126 => usize::from(io.read_u16().await?),
        127 => usize::try_from(io.read_u64().await?).unwrap_or(usize::MAX),
        short => usize::from(short),
    };
    if length > MAX_FRAME_BYTES {
        return Err(invalid("frame is too long"));
    }
    let mut mask = [0; 4];
    io.read_exact(&mut mask).await?;
    let mut payload = vec![0; length];
    io.read_exact(&mut payload).await?;
    for (at, byte) in payload.iter_mut().enumerate() {
        *byte ^= mask[at % 4];
    }
    Ok((head[0] & 0x0F, payload))
}

/// The `sec-websocket-accept` for a client's key.
fn accept_key(key: &str) -> String {
    let hash = digest(&SHA1_FOR_LEGACY_USE_ONLY, format!("{key}{HANDSHAKE_GUID}").as_bytes());
    general_purpose::STANDARD.encode(hash)
}

async fn write_frame(io: &mut TokioIo<Upgraded>, kind: u8, payload: &[u8]) -> io::Result<()> {
    let mut frame = vec![0x80 | kind];
    match payload.len() {
        short @ 0..126 => frame.push(short as u8),
        middle @ 126..65_536 => {
            frame.push(126);
            frame.extend((middle as u16).to_be_bytes());
        }
        long => {
            frame.push(127);
            frame.extend((long as u64).to_be_bytes());
        }
    }
    frame.extend(payload);
    io.write_all(&frame).await?;
    io.flush().await
}

#[cfg(test)]
mod tests {
    /// The example of RFC 6455.
    #[test]
    fn the_key_of_the_standards_example_is_accepted() {
        assert_eq!(super::accept_key("dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }
}
