//! A small DNS server on loopback, over UDP and TCP on one port: it answers what a test sets, or misbehaves.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;

use super::eventually;

/// The types of questions.
pub const A: u16 = 1;
pub const CNAME: u16 = 5;
pub const AAAA: u16 = 28;
pub const SRV: u16 = 33;

/// The largest answer over UDP, in bytes; a longer one is truncated.
const MAX_UDP_BYTES: usize = 1232;

/// The data of a record.
#[derive(Clone, Debug)]
pub enum RecordData {
    Address(IpAddr),
    Alias(&'static str),
    Service { priority: u16, weight: u16, port: u16, target: String },
}

/// What the server does with a question.
#[derive(Clone, Debug)]
pub enum DnsAnswer {
    /// Records with this TTL in seconds; without any, an empty answer.
    Records(u32, Vec<RecordData>),
    /// An answer without records and with this code: 2 for SERVFAIL, 3 for NXDOMAIN.
    Code(u8),
    /// No answer.
    Silence,
    /// The records under another id, as of a forger.
    WrongId(Vec<RecordData>),
    /// Bytes that are no message, under the right id.
    Garbage,
}

/// A question that was asked: the name in lower case, the type, and whether it came over TCP.
pub type AskedQuestion = (String, u16, bool);

#[derive(Default)]
struct DnsState {
    answers: HashMap<(String, u16), DnsAnswer>,
    asked: Vec<AskedQuestion>,
}

pub struct DnsServer {
    pub address: SocketAddr,
    state: Arc<Mutex<DnsState>>,
    _tasks: JoinSet<()>,
}

// === impl RecordData ===

impl RecordData {
    pub fn addresses<'a>(all: impl IntoIterator<Item = &'a str>) -> Vec<Self> {
        let parsed = |text: &str| RecordData::Address(text.parse().expect("is an address"));
        all.into_iter().map(parsed).collect()
    }

    fn kind(&self) -> u16 {
        match self {
            RecordData::Address(IpAddr::V4(_)) => A,
            RecordData::Address(IpAddr::V6(_)) => AAAA,
            RecordData::Alias(_) => CNAME,
            RecordData::Service { .. } => SRV,
        }
    }

    fn encode(&self) -> Vec<u8> {
        match self {
            RecordData::Address(IpAddr::V4(address)) => address.octets().to_vec(),
            RecordData::Address(IpAddr::V6(address)) => address.octets().to_vec(),
            RecordData::Alias(name) => encode_name(name),
            RecordData::Service { priority, weight, port, target } => {
                let numbers = [*priority, *weight, *port].into_iter().flat_map(u16::to_be_bytes);
                numbers.chain(encode_name(target)).collect()
            }
        }
    }
}

// === impl DnsServer ===

impl DnsServer {
    /// Starts a server that answers every question with NXDOMAIN.
    pub async fn start() -> Self {
        let (udp, tcp) = loop {
            let udp = UdpSocket::bind("127.0.0.1:0").await.expect("a free port is there");
            let address = udp.local_addr().expect("it is bound");
            if let Ok(tcp) = TcpListener::bind(address).await {
                break (udp, tcp);
            }
        };
        let address = udp.local_addr().expect("it is bound");
        let state: Arc<Mutex<DnsState>> = Arc::default();
        let mut tasks = JoinSet::new();
        tasks.spawn(serve_udp(udp, state.clone()));
        tasks.spawn(serve_tcp(tcp, state.clone()));
        DnsServer { address, state, _tasks: tasks }
    }

    fn lock(&self) -> MutexGuard<'_, DnsState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers questions for a name and a type like this from now on.
    pub fn set(&self, name: &str, kind: u16, answer: DnsAnswer) {
        self.lock().answers.insert((name.into(), kind), answer);
    }

    /// Answers questions for the addresses of a name with these, and with a TTL in seconds.
    pub fn set_addresses<'a>(&self, name: &str, ttl: u32, all: impl IntoIterator<Item = &'a str>) {
        let (four, six) =
            RecordData::addresses(all).into_iter().partition(|record: &RecordData| record.kind() == A);
        self.set(name, A, DnsAnswer::Records(ttl, four));
        self.set(name, AAAA, DnsAnswer::Records(ttl, six));
    }

    /// Answers all questions for the addresses of a name like this.
    pub fn set_both(&self, name: &str, answer: &DnsAnswer) {
        self.set(name, A, answer.clone());
        self.set(name, AAAA, answer.clone());
    }

    pub fn asked(&self) -> Vec<AskedQuestion> {
        self.lock().asked.clone()
    }

    /// Waits until a question for this name and type has come so often since this was called.
    pub async fn until_asked(&self, name: &str, kind: u16, times: usize) {
        let count = || self.asked().iter().filter(|(asked, of, _)| asked == name && *of == kind).count();
        let before = count();
        eventually(&format!("{name} is asked for"), async || (count() >= before + times).then_some(())).await;
    }
}

async fn serve_udp(socket: UdpSocket, state: Arc<Mutex<DnsState>>) {
    let mut buffer = [0; 4096];
    while let Ok((count, from)) = socket.recv_from(&mut buffer).await {
        if let Some(answer) = answer(&buffer[..count], &state, false) {
            // The client may have gone.
            drop(socket.send_to(&answer, from).await);
        }
    }
}

async fn serve_tcp(listener: TcpListener, state: Arc<Mutex<DnsState>>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        connections.spawn(serve_connection(stream, state.clone()));
    }
}

async fn serve_connection(mut stream: TcpStream, state: Arc<Mutex<DnsState>>) {
    while let Ok(length) = stream.read_u16().await {
        let mut question = vec![0; usize::from(length)];
        if stream.read_exact(&mut question).await.is_err() {
            return;
        }
        let Some(answer) = answer(&question, &state, true) else { continue };
        let length = u16::try_from(answer.len()).expect("an answer is short");
        if stream.write_all(&[&length.to_be_bytes()[..], &answer].concat()).await.is_err() {
            return;
        }
    }
}

/// Returns the message that answers a question, if one does.
fn answer(question: &[u8], state: &Mutex<DnsState>, over_tcp: bool) -> Option<Vec<u8>> {
    let (name, kind, end) = parse_question(question)?;
    let answer = {
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        state.asked.push((name.clone(), kind, over_tcp));
        state.answers.get(&(name, kind)).cloned().unwrap_or(DnsAnswer::Code(3))
    };
    let mut id = [question[0], question[1]];
    let (code, ttl, records) = match answer {
        DnsAnswer::Records(ttl, records) => (0, ttl, records),
        DnsAnswer::Code(code) => (code, 0, Vec::new()),
        DnsAnswer::Silence => return None,
        DnsAnswer::WrongId(records) => {
            id[1] ^= 1;
            (0, 60, records)
        }
        DnsAnswer::Garbage => return Some([&id[..], &[0x81, 0x80, 0, 1, 0, 9, 0, 0, 0, 0, 0xff]].concat()),
    };
    let body = encode_records(ttl, &records);
    let truncated = !over_tcp && end + body.len() > MAX_UDP_BYTES;
    let count = if truncated { 0 } else { u16::try_from(records.len()).expect("there are few") };
    let flags = 0x8180 | u16::from(code) | if truncated { 0x0200 } else { 0 };
    let mut message = id.to_vec();
    for number in [flags, 1, count, 0, 0] {
        message.extend(number.to_be_bytes());
    }
    message.extend(&question[12..end]);
    if !truncated {
        message.extend(body);
    }
    Some(message)
}

/// Encodes records; an alias is the owner of the records behind it.
fn encode_records(ttl: u32, records: &[RecordData]) -> Vec<u8> {
    // The name of the question.
    let mut owner = vec![0xc0, 12];
    let mut body = Vec::new();
    for record in records {
        let data = record.encode();
        body.extend(&owner);
        body.extend(record.kind().to_be_bytes());
        body.extend(1u16.to_be_bytes());
        body.extend(ttl.to_be_bytes());
        body.extend(u16::try_from(data.len()).expect("it is short").to_be_bytes());
        if let RecordData::Alias(_) = record {
            owner.clone_from(&data);
        }
        body.extend(data);
    }
    body
}

/// Returns the name, the type and the end of the first question.
fn parse_question(message: &[u8]) -> Option<(String, u16, usize)> {
    let (mut labels, mut at) = (Vec::new(), 12);
    loop {
        let length = usize::from(*message.get(at)?);
        if length == 0 {
            break;
        }
        labels.push(String::from_utf8_lossy(message.get(at + 1..at + 1 + length)?).to_lowercase());
        at += 1 + length;
    }
    let kind = u16::from_be_bytes([*message.get(at + 1)?, *message.get(at + 2)?]);
    Some((labels.join("."), kind, at + 5))
}

fn encode_name(name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for label in name.split('.').filter(|label| !label.is_empty()) {
        bytes.push(u8::try_from(label.len()).expect("a label is short"));
        bytes.extend(label.as_bytes());
    }
    bytes.push(0);
    bytes
}
