//! Requests as the OpenAI SDK for Python sends them: its headers, compact JSON, the model behind the
//! messages. Bodies are distinct, or branch predictors and caches would flatter a proxy that reads them.

/// Distinct bodies of one size.
const DISTINCT: usize = 64;

/// What the upstream is asked to answer.
#[derive(Clone, Copy)]
pub enum Answer {
    /// One document.
    Whole,
    /// A stream of so many events at the pace of a model, which never ends.
    Events(usize),
    /// A stream of so many events at once, which ends.
    Burst(usize),
}

/// Head and body of requests with bodies of about `bytes`.
pub fn requests(bytes: usize, model: &str, answer: Answer) -> Vec<Vec<u8>> {
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let mut make = |_| request(&body(bytes, model, answer, &mut random), answer);
    (0..DISTINCT).map(&mut make).collect()
}

fn request(body: &str, answer: Answer) -> Vec<u8> {
    let asks = match answer {
        Answer::Whole => String::new(),
        Answer::Events(count) => format!("x-request-id-events: {count}\r\n"),
        Answer::Burst(count) => format!("x-request-id-burst: {count}\r\n"),
    };
    let head = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: 127.0.0.1:8000",
        "Accept-Encoding: gzip, deflate",
        "Connection: keep-alive",
        "Accept: application/json",
        "Content-Type: application/json",
        "User-Agent: OpenAI/Python 2.30.0",
        "X-Stainless-Lang: python",
        "X-Stainless-Package-Version: 2.30.0",
        "X-Stainless-OS: Linux",
        "X-Stainless-Arch: x64",
        "X-Stainless-Runtime: CPython",
        "X-Stainless-Runtime-Version: 3.12.3",
        "Authorization: Bearer EMPTY",
        "X-Stainless-Async: async:asyncio",
        "x-stainless-retry-count: 0",
        "x-stainless-read-timeout: 600",
    ];
    let head = head.join("\r\n");
    format!("{head}\r\n{asks}Content-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

fn body(bytes: usize, model: &str, answer: Answer, random: &mut Random) -> String {
    let stream = match answer {
        Answer::Whole => "false",
        Answer::Events(_) => "true",
        // It requests its usage itself, so that no proxy adds the request.
        Answer::Burst(_) => "true,\"stream_options\":{\"include_usage\":true}",
    };
    let end = format!("],\"model\":\"{model}\",\"max_tokens\":256,\"stream\":{stream},\"temperature\":0.7}}");
    let mut body = String::from("{\"messages\":[");
    let mut roles = ["system", "user"].into_iter().chain(["assistant", "user"].into_iter().cycle());
    while body.len() + end.len() < bytes {
        let role = roles.next().unwrap_or("user");
        if !body.ends_with('[') {
            body.push(',');
        }
        body.push_str(&format!("{{\"role\":\"{role}\",\"content\":\""));
        let most = body.len() + 200 + random.below(3000);
        // Some routers refuse a message without a word.
        let least = body.len() + 1;
        prose(&mut body, bytes.saturating_sub(end.len() + 2).clamp(least, most), random);
        body.push_str("\"}");
    }
    body.push_str(&end);
    body
}

/// Words until the text is `length` long. Six gaps in a hundred hold an escape or a letter of two bytes.
fn prose(text: &mut String, length: usize, random: &mut Random) {
    while text.len() < length {
        for _ in 0..1 + random.below(9) {
            text.push(char::from(b'a' + random.below(26) as u8));
        }
        text.push_str(match random.below(100) {
            0 | 1 => "\\n",
            2 | 3 => "\\\"",
            4 => "\\t",
            5 => "\u{e9} ",
            6..12 => ", ",
            12..18 => ". ",
            _ => " ",
        });
    }
}

/// Xorshift: the same bodies at every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }
}
