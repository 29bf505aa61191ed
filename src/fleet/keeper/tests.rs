//! What the keeper does with words that come late.

use std::sync::atomic::Ordering::Relaxed;

use super::*;
use crate::config::types::Config;
use crate::config::url;

fn keeper() -> Keeper {
    let config = UpstreamConfig::new(url::upstream("http://gpu:1").expect("is a URL"));
    let config = Config { upstreams: vec![config], ..Config::default() };
    Fleet::new(&config).expect("it needs no file").1
}

/// Between the last request's end and the keeper's look at it, one may come that chose by an older snapshot.
#[tokio::test(start_paused = true)]
async fn an_upstream_that_got_a_late_request_goes_when_that_has_ended() {
    for force in [false, true] {
        let mut keeper = keeper();
        let upstream = keeper.kept[0].upstream().clone();
        let (id, name) = (upstream.id, upstream.name().to_string());
        keeper.apply(vec![Change::Remove { name, force }]).expect("it is there");
        let word = keeper.inbox.recv().await.expect("the fleet lives");
        upstream.live.gauges.active.store(1, Relaxed);
        keeper.take_in(word);
        assert!(keeper.fleet.snapshot().watched(id).is_some(), "force {force}: one is in flight");
        upstream.live.gauges.active.store(0, Relaxed);
        upstream.live.emptied.notify_waiters();
        let word = tokio::time::timeout(Duration::from_secs(60), keeper.inbox.recv()).await;
        keeper.take_in(word.expect("it is told of again").expect("the fleet lives"));
        assert!(keeper.fleet.snapshot().watched(id).is_none(), "force {force}: nothing is");
    }
}
