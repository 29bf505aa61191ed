//! A client's session behind a wrapper that hands out what was already read of the body, and lets the
//! request be watched and its answer be held.
//!
//! Pingora sends a body that was read before the upstream was chosen only from its own retry buffer,
//! which holds 64 KiB and is dropped whole when one byte more arrives; a larger peeked body would hang or
//! be lost. The wrapper stands in the session's place, delegates everything, and differs in four things:
//! `get_retry_buffer` answers from the replay; the wait for the client ends too when the line says that the
//! request must end; an answer's first pieces wait here until they are known to be the client's, so that
//! another upstream can still be asked, or another answer go out in their place, to which pingora has no
//! other way but a failure, which ends the connection; and the client of a request whose work goes on in
//! the background may leave, which ends other requests. When the request is over the real session goes back,
//! so that the connection can be kept alive: the wrapper sends it home when it is dropped.
//!
//! The trait is not covered by pingora's promises, which is why its version is pinned and
//! `tests/bodies.rs` sends every kind of body through.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderMap, Response, header};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::Digest;
use pingora::protocols::http::custom::CustomMessageWrite;
use pingora::protocols::http::custom::server::Session as CustomSession;
use pingora::protocols::http::{HttpTask, ServerSession};
use pingora::protocols::l4::socket::SocketAddr;
use pingora::{Error, ErrorType, Result};
use tokio::sync::oneshot;

use super::STALLED;
use super::leave::Leave;
use super::line::Line;
use super::replay::Replay;

/// Where the real session comes back to.
pub struct Home(oneshot::Receiver<Box<ServerSession>>);

impl Home {
    /// Puts the real session back in its place.
    pub fn unwrap(mut self, place: &mut Box<ServerSession>) {
        let wrapper = std::mem::replace(place, placeholder());
        drop(wrapper);
        if let Ok(real) = self.0.try_recv() {
            *place = real;
        }
    }
}

/// What was read of the request.
pub struct Held {
    pub replay: Arc<Replay>,
    /// The body has no more bytes than the peeked ones.
    pub whole: bool,
    /// What it asks for is to be done whether or not the client waits for the answer.
    pub background: bool,
}

/// Puts a wrapper in the session's place.
pub fn wrap(place: &mut Box<ServerSession>, held: Held, line: Arc<Line>, leave: Arc<Leave>) -> Home {
    let Held { replay, whole, background } = held;
    let real = std::mem::replace(place, placeholder());
    let (way_home, home) = oneshot::channel();
    let empty = whole && replay.body().is_none_or(|body| body.is_empty());
    let session = Some((real, way_home));
    let (held, begun, silent, gone) = (Vec::new(), false, false, false);
    let wrapped =
        Wrapped { session, replay, line, leave, whole, empty, held, begun, background, silent, gone };
    **place = ServerSession::new_custom(Box::new(wrapped));
    Home(home)
}

/// Stands in a session's place for the moment in which the real one changes hands.
fn placeholder() -> Box<ServerSession> {
    Box::new(ServerSession::new_custom(Box::new(())))
}

/// `instead` under the head of the answer that was held, whose other fields it keeps.
fn in_place_of(held: Vec<HttpTask>, instead: &Response<Bytes>) -> Result<Vec<HttpTask>> {
    let heads = held.into_iter().filter_map(|task| match task {
        HttpTask::Header(head, _) => Some(head),
        _ => None,
    });
    let Some(mut head) = heads.last() else {
        return Err(Error::explain(ErrorType::InternalError, "an answer without a head"));
    };
    let (body, kind) = (instead.body(), instead.headers().get(header::CONTENT_TYPE));
    head.set_status(instead.status())?;
    head.remove_header(&header::TRANSFER_ENCODING);
    head.insert_header(header::CONTENT_LENGTH, body.len())?;
    if let Some(kind) = kind {
        head.insert_header(header::CONTENT_TYPE, kind)?;
    }
    Ok(vec![HttpTask::Header(head, false), HttpTask::Body(Some(body.clone()), true)])
}

struct Wrapped {
    /// Present until the drop.
    session: Option<(Box<ServerSession>, oneshot::Sender<Box<ServerSession>>)>,
    replay: Arc<Replay>,
    line: Arc<Line>,
    leave: Arc<Leave>,
    /// Pieces of the answer that wait until they are known to be the client's.
    held: Vec<HttpTask>,
    /// Some of the answer has gone to the client.
    begun: bool,
    /// All of the body has come: a stream that its client has reset no longer says so.
    whole: bool,
    /// The body turned out to have no bytes, though its head could not tell.
    empty: bool,
    /// The client's leave is no reason to end the request.
    background: bool,
    /// It says nothing any more; it may still listen.
    silent: bool,
    /// Nor does it listen.
    gone: bool,
}

impl Wrapped {
    fn real(&self) -> &ServerSession {
        &self.session.as_ref().expect("the session leaves only in drop").0
    }

    fn real_mut(&mut self) -> &mut ServerSession {
        &mut self.session.as_mut().expect("the session leaves only in drop").0
    }

    /// The client of a request that goes on without it is leaving: its connection is of no use any more.
    fn lose(&mut self, gone: bool) {
        (self.silent, self.gone) = (true, gone);
        self.line.left();
        self.real_mut().set_keepalive(None);
    }
}

impl Drop for Wrapped {
    fn drop(&mut self) {
        if let Some((real, way_home)) = self.session.take() {
            // Nobody waits when the request itself was dropped: the session, and with it the
            // connection, ends here then.
            drop(way_home.send(real));
        }
    }
}

#[async_trait]
impl CustomSession for Wrapped {
    fn req_header(&self) -> &RequestHeader {
        self.real().req_header()
    }

    fn req_header_mut(&mut self) -> &mut RequestHeader {
        self.real_mut().req_header_mut()
    }

    async fn read_body_bytes(&mut self) -> Result<Option<Bytes>> {
        self.real_mut().read_request_body().await
    }

    async fn drain_request_body(&mut self) -> Result<()> {
        self.real_mut().drain_request_body().await
    }

    async fn write_response_header(&mut self, head: Box<ResponseHeader>, _end: bool) -> Result<()> {
        self.real_mut().write_response_header(head).await
    }

    async fn write_response_header_ref(&mut self, head: &ResponseHeader, _end: bool) -> Result<()> {
        self.real_mut().write_response_header_ref(head).await
    }

    async fn write_body(&mut self, data: Bytes, end: bool) -> Result<()> {
        self.real_mut().write_response_body(data, end).await
    }

    async fn write_trailers(&mut self, trailers: HeaderMap) -> Result<()> {
        self.real_mut().write_response_trailers(trailers).await
    }

    async fn response_duplex_vec(&mut self, tasks: Vec<HttpTask>) -> Result<bool> {
        let mut all = std::mem::take(&mut self.held);
        for task in tasks {
            match task {
                // Nothing has gone out: the failure alone decides what the client gets.
                HttpTask::Failed(error) if !self.begun => return Err(error),
                task => all.push(task),
            }
        }
        let ends = all.iter().any(HttpTask::is_end);
        if self.line.holds() && !ends && !self.begun {
            self.held = all;
            return Ok(false);
        }
        if !self.begun && !all.is_empty() {
            // From here on no attempt can follow, and not before: an engine may die right behind its first
            // event.
            self.begun = true;
            self.replay.release();
            if let Some(instead) = self.line.instead() {
                all = in_place_of(all, instead)?;
            }
        }
        let mut over = false;
        // One by one: written together, events would be merged into one chunk.
        for task in all {
            // Pingora itself does not ask a wrapper whether the connection is kept.
            let last = self.leave.is_closing() || self.real().req_header().version == http::Version::HTTP_10;
            if last && matches!(task, HttpTask::Header(..)) {
                self.real_mut().set_keepalive(None);
            }
            let ends = task.is_end();
            if !self.gone {
                match self.real_mut().response_duplex_vec(vec![task]).await {
                    Ok(ended) => over = ended,
                    Err(_) if self.background => self.lose(true),
                    Err(error) => return Err(error),
                }
            }
            over |= self.gone && ends;
        }
        // While a client took its time nothing could be read from the upstream.
        self.line.moved();
        Ok(over)
    }

    fn proxy_tasks_enabled(&self) -> bool {
        self.real().supports_proxy_task_api()
    }

    fn set_proxy_tasks_enabled(&mut self, enabled: bool) {
        self.real_mut().set_proxy_tasks_enabled(enabled);
    }

    fn send_proxy_task(&mut self, task: HttpTask) {
        self.real_mut().send_downstream_proxy_task(task);
    }

    fn has_pending_proxy_tasks(&self) -> bool {
        self.real().has_pending_downstream_proxy_tasks()
    }

    async fn write_proxy_tasks(&mut self) -> Result<bool> {
        self.real_mut().write_downstream_proxy_tasks().await
    }

    fn set_read_timeout(&mut self, timeout: Option<Duration>) {
        self.real_mut().set_read_timeout(timeout);
    }

    fn get_read_timeout(&self) -> Option<Duration> {
        self.real().get_read_timeout()
    }

    fn set_write_timeout(&mut self, timeout: Option<Duration>) {
        self.real_mut().set_write_timeout(timeout);
    }

    fn get_write_timeout(&self) -> Option<Duration> {
        self.real().get_write_timeout()
    }

    fn set_total_drain_timeout(&mut self, timeout: Option<Duration>) {
        self.real_mut().set_total_drain_timeout(timeout);
    }

    fn get_total_drain_timeout(&self) -> Option<Duration> {
        self.real().get_total_drain_timeout()
    }

    fn request_summary(&self) -> String {
        self.real().request_summary()
    }

    fn response_written(&self) -> Option<&ResponseHeader> {
        self.real().response_written()
    }

    async fn shutdown(&mut self, _code: u32, _context: &str) {
        self.real_mut().shutdown().await;
    }

    fn is_body_done(&mut self) -> bool {
        self.whole || self.real_mut().is_body_done()
    }

    async fn finish(&mut self) -> Result<()> {
        if self.gone {
            return Ok(());
        }
        self.real_mut().finish_body().await.map(|_| ())
    }

    fn is_body_empty(&mut self) -> bool {
        self.empty || self.real_mut().is_body_empty()
    }

    async fn read_body_or_idle(&mut self, no_body_expected: bool) -> Result<Option<Bytes>> {
        let (line, replay) = (self.line.clone(), self.replay.clone());
        let read = async {
            if self.silent {
                return std::future::pending().await;
            }
            let piece = self.real_mut().read_body_or_idle(no_body_expected).await;
            if no_body_expected && self.background {
                self.lose(false);
                return std::future::pending().await;
            }
            let piece = piece?;
            if let Some(piece) = &piece {
                replay.push(piece);
                line.uploading();
            }
            Ok(piece)
        };
        let stalled = async {
            match no_body_expected {
                // HTTP/2 has no limit of its own for the next piece of a body.
                false => tokio::time::sleep(STALLED).await,
                true => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            piece = read => piece,
            _ = line.must_end() => Err(Error::new(ErrorType::Custom("ended"))),
            () = stalled => Err(Error::new_down(ErrorType::ReadTimedout)),
        }
    }

    fn body_bytes_sent(&self) -> usize {
        self.real().body_bytes_sent()
    }

    fn body_bytes_read(&self) -> usize {
        self.real().body_bytes_read()
    }

    fn digest(&self) -> Option<&Digest> {
        self.real().digest()
    }

    fn digest_mut(&mut self) -> Option<&mut Digest> {
        self.real_mut().digest_mut()
    }

    fn client_addr(&self) -> Option<&SocketAddr> {
        self.real().client_addr()
    }

    fn server_addr(&self) -> Option<&SocketAddr> {
        self.real().server_addr()
    }

    fn pseudo_raw_h1_request_header(&self) -> Bytes {
        self.real().to_h1_raw()
    }

    /// Called before each attempt: what was held of an answer was another one's.
    fn enable_retry_buffering(&mut self) {
        self.held.clear();
    }

    /// Pingora's own rules for trying again are not used: `proxy` decides.
    fn retry_buffer_truncated(&self) -> bool {
        true
    }

    fn get_retry_buffer(&self) -> Option<Bytes> {
        if self.empty { None } else { self.replay.body() }
    }

    async fn finish_custom(&mut self) -> Result<()> {
        Ok(())
    }

    fn take_custom_message_reader(
        &mut self,
    ) -> Option<Box<dyn futures_util::Stream<Item = Result<Bytes>> + Unpin + Send + Sync + 'static>> {
        None
    }

    fn restore_custom_message_reader(
        &mut self,
        _reader: Box<dyn futures_util::Stream<Item = Result<Bytes>> + Unpin + Send + Sync + 'static>,
    ) -> Result<()> {
        Ok(())
    }

    fn take_custom_message_writer(&mut self) -> Option<Box<dyn CustomMessageWrite>> {
        None
    }

    fn restore_custom_message_writer(&mut self, _writer: Box<dyn CustomMessageWrite>) -> Result<()> {
        Ok(())
    }

    fn is_upgrade_req(&self) -> bool {
        self.real().is_upgrade_req()
    }

    fn was_upgraded(&self) -> bool {
        self.real().was_upgraded()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncWriteExt, DuplexStream};

    use super::super::line::Ended;
    use super::super::line::tests::line;
    use super::super::memory::Memory;
    use super::*;
    use crate::config::types::Timeouts;

    /// A session whose client has sent `head`, in a wrapper; the line is that of a request that was just
    /// sent.
    async fn wrapped(head: &str, background: bool) -> (DuplexStream, Box<ServerSession>, Home, Arc<Line>) {
        let (mut client, here) = tokio::io::duplex(1024);
        let mut place = Box::new(ServerSession::new_http1(Box::new(here)));
        client.write_all(head.as_bytes()).await.unwrap();
        place.read_request().await.unwrap();
        let replay = Replay::new(Bytes::new(), Memory::new(0).reservation(), 0);
        let (held, line) = (Held { replay, whole: true, background }, line(Timeouts::default()));
        let home = wrap(&mut place, held, line.clone(), Arc::default());
        line.attempt(0);
        (client, place, home, line)
    }

    /// Its lease stayed for as long as the engine hung, which may be for ever.
    #[tokio::test(start_paused = true)]
    async fn a_job_whose_client_has_left_is_not_waited_for_without_end() {
        for background in [true, false] {
            let (client, mut place, home, line) =
                wrapped("GET / HTTP/1.1\r\nhost: a\r\n\r\n", background).await;
            drop(client);
            let begun = tokio::time::Instant::now();
            let day = Duration::from_secs(24 * 3600);
            let came = tokio::time::timeout(day, place.read_body_or_idle(true)).await.expect("it ends");
            assert!(!matches!(came, Ok(Some(_))));
            // Any other request ends at once.
            let wanted = if background { (Some(Ended::Left), 600) } else { (None, 0) };
            assert_eq!((line.ended(), begun.elapsed().as_secs()), wanted);
            home.unwrap(&mut place);
        }
    }

    /// A job was lost when its client reset the stream right behind the body: h2 no longer said then that the
    /// body had ended.
    #[tokio::test]
    async fn a_body_that_has_come_stays_whole_whatever_its_connection_says_later() {
        let head = "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n";
        let (_client, mut place, home, _line) = wrapped(head, true).await;
        assert!(place.is_body_done());
        home.unwrap(&mut place);
        assert!(!place.is_body_done(), "nobody has read it from the connection");
    }
}
