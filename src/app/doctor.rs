//! Asks upstreams, sources and Redis at the same time, and prints what is wrong.

use std::collections::HashMap;
use std::io::Write;
use std::time::Instant;

use futures_util::future::join_all;
use futures_util::stream::{self, StreamExt};
use rustix::process::{Resource, getrlimit};

use super::files::listener_problems;
use crate::cli::doctor::DoctorArgs;
use crate::config::types::{Config, UpstreamConfig};
use crate::doctor::facts::{RedisFacts, SetupFacts, SightReading, SourceFacts, UpstreamFacts};
use crate::doctor::{diagnose, report};
use crate::fleet::inspect::Inspector;
use crate::state::redis::inspect;

/// The most upstreams that are asked at once: each has up to four connections.
const MAX_CONCURRENT_UPSTREAMS: usize = 100;

/// Asks and prints; `colours`: with the escape codes of a terminal. Returns whether there are errors.
pub async fn run(
    config: &Config,
    args: &DoctorArgs,
    colours: bool,
    out: &mut impl Write,
) -> std::io::Result<bool> {
    let begun = Instant::now();
    let inspector = Inspector::new(config, args.timeout, args.request);
    let fleet = async {
        let (sources, upstreams) = listed(&inspector, config).await;
        (sources, asked(&inspector, upstreams).await)
    };
    let balancer = inspector.running_balancer(&config.admin);
    let ((sources, mut upstreams), found, redis) = tokio::join!(fleet, balancer, redis(config));
    let (found, missing) = match found {
        Ok(found) => (Some(found), None),
        Err(missing) => (None, Some(missing)),
    };
    // Without `--admin` the doctor needs no running balancer.
    let missing_balancer = missing.filter(|_| args.admin.is_some());
    let rows = found.iter().flat_map(|found| &found.rows);
    let readings: HashMap<&str, SightReading> = rows.map(|row| (row.url.as_str(), row.reading())).collect();
    for upstream in &mut upstreams {
        upstream.sight = readings.get(upstream.config.url.display().as_str()).cloned();
    }
    let is_ours = upstreams.iter().any(|upstream| upstream.sight.is_some());
    let balancer = found.as_ref().filter(|_| is_ours).map(|found| found.admin.clone());
    let open_files = getrlimit(Resource::Nofile).current;
    let unusable_certificates = listener_problems(&config.listen);
    let facts = SetupFacts {
        config,
        upstreams,
        sources,
        redis,
        unusable_certificates,
        open_files,
        balancer,
        missing_balancer,
    };
    let findings = diagnose(&facts);
    let text = match args.json {
        true => format!("{:#}\n", report::json(&facts, &findings, begun.elapsed())),
        false => report::text(&facts, &findings, begun.elapsed(), colours),
    };
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(report::counts(&findings).errors > 0)
}

/// Returns the upstreams of the configuration, and those that its sources list.
async fn listed(inspector: &Inspector, config: &Config) -> (Vec<SourceFacts>, Vec<UpstreamConfig>) {
    let polled = join_all(config.sources.iter().map(|source| inspector.source(source))).await;
    let (mut sources, mut upstreams) = (Vec::new(), config.upstreams.clone());
    for (source, discovered) in polled {
        sources.push(source);
        for upstream in discovered {
            // An engine that several sources or the operator name is one upstream.
            if !upstreams.iter().any(|known| known.url == upstream.url) {
                upstreams.push(upstream);
            }
        }
    }
    (sources, upstreams)
}

async fn asked(inspector: &Inspector, upstreams: Vec<UpstreamConfig>) -> Vec<UpstreamFacts> {
    let questions = upstreams.into_iter().map(|upstream| inspector.upstream(upstream));
    stream::iter(questions).buffered(MAX_CONCURRENT_UPSTREAMS).collect().await
}

async fn redis(config: &Config) -> Option<RedisFacts> {
    Some(inspect::inspect(config.redis.as_ref()?, &config.redis_options).await)
}
