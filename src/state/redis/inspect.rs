//! Asks a Redis once for all that `vllm-lb doctor` judges.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use redis::{Cmd, Value, cmd};

use super::connect::{COMMAND_TIMEOUT, RedisLink};
use super::failure::{RedisFailure, RedisFailureKind};
use crate::config::types::{RedisOptions, RedisUrl};
use crate::doctor::facts::{ClockDifference, RedisFacts, RedisRefusal, RedisServer};

/// Connects as the exchange does, and asks.
pub(crate) async fn inspect(url: &RedisUrl, options: &RedisOptions) -> RedisFacts {
    let server = ask(url, options).await.map_err(|failure| {
        let denies_access = failure.cause == "password" || failure.kind == RedisFailureKind::NotPermitted;
        RedisRefusal { denies_access, text: failure.text }
    });
    RedisFacts { url: url.to_string(), server }
}

async fn ask(url: &RedisUrl, options: &RedisOptions) -> Result<RedisServer, RedisFailure> {
    let mut link = RedisLink::connect(url, options, COMMAND_TIMEOUT).await?;
    let mut server = RedisServer::default();
    let sent = SystemTime::now();
    let time = link.call(&cmd("TIME"), COMMAND_TIMEOUT).await;
    server.clock = clock(&time?, sent, SystemTime::now());
    let mut info: Cmd = cmd("INFO");
    info.arg("everything");
    match link.call(&info, COMMAND_TIMEOUT).await {
        Ok(answer) => read_info(&text(&answer).unwrap_or_default(), &mut server),
        // The login is good, since `TIME` has an answer: the user may not call `INFO`.
        Err(failure) if failure.kind == RedisFailureKind::NotPermitted => {
            server.info_refused = Some(failure.text);
        }
        Err(failure) => return Err(failure),
    }
    Ok(server)
}

/// Returns the text of an answer; of the nodes of a cluster the first one's.
fn text(value: &Value) -> Option<String> {
    match value {
        Value::BulkString(bytes) => Some(String::from_utf8_lossy(bytes).into_owned()),
        Value::SimpleString(text) => Some(text.clone()),
        Value::VerbatimString { text, .. } => Some(text.clone()),
        Value::Map(nodes) => nodes.iter().find_map(|(_, answer)| text(answer)),
        _ => None,
    }
}

/// Reads the lines `name:value` of `INFO`.
fn read_info(info: &str, server: &mut RedisServer) {
    for (name, value) in info.lines().filter_map(|line| line.trim_end().split_once(':')) {
        let value = value.to_string();
        match name {
            "redis_version" => server.version = Some(value),
            // Valkey reports the Redis that it is compatible with as its version.
            "server_name" if value != "redis" => server.product = Some(value),
            "role" => server.role = Some(value),
            "maxmemory" => server.max_memory = value.parse().ok(),
            "maxmemory_policy" => server.memory_policy = Some(value),
            _ => {}
        }
    }
}

/// Compares the answer to `TIME` with the middle of its round trip.
fn clock(answer: &Value, sent: SystemTime, received: SystemTime) -> Option<ClockDifference> {
    let Value::Array(parts) = answer else { return None };
    let [seconds, micros] = parts.as_slice() else { return None };
    let number = |value: &Value| text(value)?.parse::<u64>().ok();
    let redis = Duration::from_secs(number(seconds)?) + Duration::from_micros(number(micros)?.min(999_999));
    let since = |time: SystemTime| time.duration_since(UNIX_EPOCH).ok().map(|since| since.as_secs_f64());
    let (sent, received) = (since(sent)?, since(received)?);
    let trip = (received - sent).max(0.0);
    Some(ClockDifference { ahead: redis.as_secs_f64() - (sent + trip / 2.0), error: trip / 2.0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_servers_report() {
        let mut server = RedisServer::default();
        read_info(
            "# Server\r\nredis_version:7.2.4\r\nserver_name:valkey\r\nrole:master\r\nmaxmemory:1048576\r\n\
             maxmemory_policy:allkeys-lru\r\nmaxmemory_human:1.00M\r\nno colon\r\n",
            &mut server,
        );
        let expected = RedisServer {
            product: Some("valkey".into()),
            version: Some("7.2.4".into()),
            role: Some("master".into()),
            max_memory: Some(1_048_576),
            memory_policy: Some("allkeys-lru".into()),
            ..RedisServer::default()
        };
        assert_eq!(server, expected);
    }

    #[test]
    fn reads_the_clock_of_redis() {
        let bulk = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let at = |seconds: u64| UNIX_EPOCH + Duration::from_secs(seconds);
        let answer = Value::Array(vec![bulk("1790000010"), bulk("500000")]);
        let reading = clock(&answer, at(1_790_000_000), at(1_790_000_001)).expect("a reading");
        assert_eq!(reading, ClockDifference { ahead: 10.0, error: 0.5 });
        for strange in [Value::Nil, Value::Array(vec![bulk("1")]), Value::Array(vec![bulk("x"), bulk("1")])] {
            assert_eq!(clock(&strange, at(1), at(2)), None);
        }
    }
}
