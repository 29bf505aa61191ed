//! The clients: a closed loop over kept connections, streams that are read as they come, streams that
//! are silent. Every answer is checked for its status and read to its end; one that fails ends the bench.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::meter::{self, Meter, Sample};
use super::prompt::{self, Answer};

/// Nothing here may take longer.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often the memory of a proxy is looked at, and how often it must be the same to be the answer:
/// an allocator gives back what it does not need within two seconds or so.
const LOOK: Duration = Duration::from_millis(500);
pub const SAME: usize = 6;
const LOOKS: usize = 24;

pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

fn io(what: &'static str) -> impl Fn(std::io::Error) -> String {
    move |error| format!("{what}: {error}")
}

impl Connection {
    pub async fn open(port: u16) -> Result<Self, String> {
        let stream = TcpStream::connect(("127.0.0.1", port)).await.map_err(io("connecting"))?;
        stream.set_nodelay(true).map_err(io("connecting"))?;
        Ok(Connection { stream, buffer: vec![0; 16 << 10] })
    }

    /// Sends a request and reads a head; returns where it ends, how much was read, and the length.
    async fn ask(&mut self, request: &[u8]) -> Result<(usize, usize, Option<usize>), String> {
        self.stream.write_all(request).await.map_err(io("sending"))?;
        let mut filled = 0;
        loop {
            match self.stream.read(&mut self.buffer[filled..]).await.map_err(io("reading"))? {
                0 => return Err("the connection ended before the answer".into()),
                read => filled += read,
            }
            let Some(end) = memchr::memmem::find(&self.buffer[..filled], b"\r\n\r\n") else { continue };
            let head = String::from_utf8_lossy(&self.buffer[..end]).to_ascii_lowercase();
            if !head.starts_with("http/1.1 200") {
                return Err(format!("not 200: {}", head.lines().next().unwrap_or_default()));
            }
            let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
            return Ok((end + 4, filled, length.and_then(|length| length.trim().parse().ok())));
        }
    }

    /// One request with its whole answer.
    async fn exchange(&mut self, request: &[u8]) -> Result<(), String> {
        let (end, mut filled, length) = self.ask(request).await?;
        let Some(length) = length else { return self.rest_of_stream(end, filled).await };
        let whole = end + length;
        while filled < whole {
            match self.stream.read(&mut self.buffer).await.map_err(io("reading"))? {
                0 => return Err("the connection ended inside the answer".into()),
                read => filled += read,
            }
        }
        Ok(())
    }

    /// One request for a stream that ends; returns when the first event was there.
    pub async fn stream(&mut self, request: &[u8]) -> Result<Instant, String> {
        let (end, mut filled, _) = self.ask(request).await?;
        while memchr::memmem::find(&self.buffer[end..filled], b"\n\n").is_none() {
            match self.stream.read(&mut self.buffer[filled..]).await.map_err(io("reading"))? {
                0 => return Err("the connection ended before the first event".into()),
                read => filled += read,
            }
        }
        let first = Instant::now();
        self.rest_of_stream(end, filled).await.map(|()| first)
    }

    /// Reads a stream, of which so much is there, up to its end; all of it fits into the buffer.
    async fn rest_of_stream(&mut self, from: usize, mut filled: usize) -> Result<(), String> {
        while !self.buffer[from..filled].ends_with(LAST_CHUNK) {
            match self.stream.read(&mut self.buffer[filled..]).await.map_err(io("reading"))? {
                0 => return Err("the connection or the buffer ended inside the stream".into()),
                read => filled += read,
            }
        }
        Ok(())
    }
}

/// What ends a body in chunks.
const LAST_CHUNK: &[u8] = b"\r\n0\r\n\r\n";

/// Waits until a request for a completion is answered: some routers are healthy before they have upstreams.
pub async fn wait(port: u16) -> Result<(), String> {
    let requests = prompt::requests(500, "sim", Answer::Whole);
    let asking = async {
        loop {
            if let Ok(mut connection) = Connection::open(port).await
                && connection.exchange(&requests[0]).await.is_ok()
            {
                return;
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, asking).await.map_err(|_| format!("nobody is ready on port {port}"))
}

pub async fn in_time<T>(work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    timeout(PATIENCE, work).await.map_err(|_| "not done in time".to_string())?
}

/// `count` requests over the connections, each of which sends its next one when its answer is whole.
async fn round(
    connections: Vec<Connection>,
    requests: &Arc<Vec<Vec<u8>>>,
    count: usize,
) -> Result<Vec<Connection>, String> {
    let begun = Arc::new(AtomicUsize::new(0));
    let mut tasks = JoinSet::new();
    for mut connection in connections {
        let (begun, requests) = (begun.clone(), requests.clone());
        tasks.spawn(async move {
            loop {
                let number = begun.fetch_add(1, Relaxed);
                if number >= count {
                    return Ok::<_, String>(connection);
                }
                connection.exchange(&requests[number % requests.len()]).await?;
            }
        });
    }
    collect(tasks).await
}

pub async fn collect<T: 'static>(mut tasks: JoinSet<Result<T, String>>) -> Result<Vec<T>, String> {
    let mut all = Vec::new();
    while let Some(done) = tasks.join_next().await {
        all.push(done.map_err(|error| error.to_string())??);
    }
    Ok(all)
}

/// `count` of these requests over so many connections.
pub async fn requests(
    port: u16,
    requests: Vec<Vec<u8>>,
    (count, connections): (usize, usize),
    meter: &Meter,
) -> Result<Sample, String> {
    let requests = Arc::new(requests);
    let mut open = Vec::new();
    for _ in 0..connections {
        open.push(Connection::open(port).await?);
    }
    // Warm: connections to the upstream are open, caches and pools are filled.
    let open = in_time(round(open, &requests, count / 10)).await?;
    let before = meter.read()?;
    let open = in_time(round(open, &requests, count)).await?;
    let sample = meter.sample(&before, count);
    drop(open);
    sample
}

/// Opens streams, some at a time, and reads each one's head and first event.
pub async fn streams(port: u16, bytes: usize, count: usize, events: usize) -> Result<Vec<Stream>, String> {
    let requests = Arc::new(prompt::requests(bytes, "sim", Answer::Events(events)));
    let mut open = Vec::new();
    while open.len() < count {
        let mut tasks = JoinSet::new();
        for number in open.len()..count.min(open.len() + 32) {
            let requests = requests.clone();
            tasks.spawn(async move {
                let mut connection = Connection::open(port).await?;
                let (end, filled, _) = connection.ask(&requests[number % requests.len()]).await?;
                let mut stream = Stream { connection, events: 0, after_end: false };
                stream.count(end, filled);
                while stream.events == 0 {
                    stream.read().await?;
                }
                Ok(stream)
            });
        }
        open.extend(in_time(collect(tasks)).await?);
    }
    Ok(open)
}

/// An answer that comes in events.
pub struct Stream {
    connection: Connection,
    pub events: usize,
    /// The last byte was a line's end: one more ends an event.
    after_end: bool,
}

impl Stream {
    fn count(&mut self, from: usize, to: usize) {
        for byte in &self.connection.buffer[from..to] {
            let end = *byte == b'\n';
            self.events += usize::from(end && self.after_end);
            self.after_end = end && !self.after_end;
        }
    }

    pub async fn read(&mut self) -> Result<(), String> {
        let buffer = &mut self.connection.buffer;
        match self.connection.stream.read(buffer).await.map_err(io("reading events"))? {
            0 => Err(format!("a stream ended after {} events", self.events)),
            read => {
                self.count(0, read);
                Ok(())
            }
        }
    }
}

/// Memory once it does not fall any more.
async fn settled(pid: u32, same_looks: usize) -> Result<f64, String> {
    let mut least = meter::resident(pid)?;
    let mut same = 0;
    for _ in 0..LOOKS {
        sleep(LOOK).await;
        let now = meter::resident(pid)?;
        same = if now < least * 0.998 { 0 } else { same + 1 };
        least = least.min(now);
        if same >= same_looks {
            break;
        }
    }
    meter::resident(pid)
}

/// KiB of the proxy for each of `count` streams that are silent after one event.
pub async fn idle(
    port: u16,
    bytes: usize,
    count: usize,
    (proxy, same_looks): (u32, usize),
) -> Result<f64, String> {
    // What is made once for all requests shall not be charged to the streams.
    drop(streams(port, bytes, 4, 1).await?);
    let before = settled(proxy, same_looks).await?;
    let open = streams(port, bytes, count, 1).await?;
    let after = settled(proxy, same_looks).await?;
    drop(open);
    Ok((after - before) / count as f64)
}
