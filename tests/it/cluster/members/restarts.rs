//! A restart with a changed file equals a reload: it ends the changes that are older than the file, and no
//! others.

use super::*;
use tempfile::TempDir;
use vllm_lb::config::types::ListenAddress;

/// The balancers of one fleet, each with a listener by which it is found after a restart.
struct Circle {
    redis: Redis,
    engines: Vec<EngineServer>,
    folder: TempDir,
}

impl Circle {
    async fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        Circle { redis: Redis::start(&[]).await, engines: engines(4).await, folder }
    }

    /// The file of a balancer, of which each version has other entries for all upstreams but the last.
    fn file(&self, balancer: &str, version: u32) -> Config {
        let mut config = settings(&self.engines, &self.redis);
        config.listen[0].address = ListenAddress::Unix(self.folder.path().join(balancer));
        config.upstreams[..3].iter_mut().for_each(|upstream| upstream.max_active = Some(version));
        config
    }

    async fn start(&self, balancer: &str, version: u32) -> Configured {
        let one = Configured::start(self.file(balancer, version)).await;
        let names = self.names();
        // The last upstream is never removed.
        one.until_any(&names[3]).await;
        one
    }

    /// Starts a balancer again after its entries and its changes were written.
    async fn restart(&self, one: Configured, balancer: &str, version: u32) -> Configured {
        let key = format!("vllm-lb:{{lb}}:file:*{balancer}");
        eventually("the entries are stored", async || {
            let found = self.redis.ask(&["KEYS", &key]).await;
            found.as_sequence().is_some_and(|keys| keys.len() == 1).then_some(())
        })
        .await;
        // The changes are written with the next message.
        tokio::time::sleep(Duration::from_millis(300)).await;
        one.balancer.running.stop(Duration::from_secs(5)).await;
        self.start(balancer, version).await
    }

    fn names(&self) -> Vec<String> {
        names(&self.engines)
    }

    /// Changes all upstreams at run time: drained, heavier, removed, drained.
    async fn change(&self, by: &Configured) {
        let names = self.names();
        by.change("PATCH", &names[0], json!({"drain": true})).await.expect(200);
        by.change("PATCH", &names[1], json!({"weight": 7})).await.expect(200);
        by.change("DELETE", &names[2], Value::Null).await;
        by.change("PATCH", &names[3], json!({"drain": true})).await.expect(200);
    }

    /// Waits until a balancer has applied these changes.
    async fn until_changed(&self, one: &Configured) {
        let names = self.names();
        one.until(&names[0], "draining", 1.0).await;
        one.until(&names[1], "ready", 7.0).await;
        one.until(&names[2], "none", 0.0).await;
        one.until(&names[3], "draining", 1.0).await;
    }

    /// Waits until the changes of entries that have changed have ended, and the other one has not.
    async fn until_ended(&self, one: &Configured) {
        let names = self.names();
        for name in &names[..3] {
            one.until(name, "ready", 1.0).await;
        }
        one.until(&names[3], "draining", 1.0).await;
    }
}

impl Configured {
    async fn until_any(&self, name: &str) {
        eventually("the upstream is probed", async || {
            ["ready", "draining"].contains(&self.row(name).await.0.as_str()).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_with_a_changed_file_equals_a_reload() {
    for is_restart in [false, true] {
        let circle = Circle::new().await;
        let one = circle.start("one", 1).await;
        circle.change(&one).await;
        let one = match is_restart {
            true => circle.restart(one, "one", 2).await,
            false => {
                one.reload(circle.file("one", 2)).await;
                one
            }
        };
        circle.until_ended(&one).await;
        // Both last, as a restart with the same file shows.
        circle.until_ended(&circle.restart(one, "one", 2).await).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_with_the_same_file_ends_no_changes() {
    let circle = Circle::new().await;
    let (one, other) = (circle.start("one", 1).await, circle.start("other", 1).await);
    circle.change(&one).await;
    circle.until_changed(&other).await;
    let one = circle.restart(one, "one", 1).await;
    let other = circle.restart(other, "other", 1).await;
    // A balancer that joins with another file ends none either: it had no file before.
    let third = circle.start("third", 3).await;
    for balancer in [&one, &other, &third] {
        circle.until_changed(balancer).await;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    for balancer in [&one, &other, &third] {
        circle.until_changed(balancer).await;
    }
    // With a changed file, they end at both that run.
    let one = circle.restart(one, "one", 2).await;
    for balancer in [&one, &other] {
        circle.until_ended(balancer).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_of_another_type_are_replaced() {
    let circle = Circle::new().await;
    let one = circle.start("one", 1).await;
    circle.change(&one).await;
    let one = circle.restart(one, "one", 1).await;
    let found = circle.redis.ask(&["KEYS", "vllm-lb:{lb}:file:*one"]).await;
    let key = match found.as_sequence() {
        Some([::redis::Value::BulkString(key)]) => String::from_utf8(key.clone()).expect("is a text"),
        _ => panic!("{found:?}"),
    };
    circle.redis.ask(&["DEL", &key]).await;
    circle.redis.ask(&["LPUSH", &key, "of another program"]).await;
    let one = circle.restart(one, "one", 2).await;
    circle.until_changed(&one).await;
    eventually("the entries are stored", async || {
        (circle.redis.ask(&["TYPE", &key]).await == ::redis::Value::SimpleString("string".into()))
            .then_some(())
    })
    .await;
    circle.until_ended(&circle.restart(one, "one", 3).await).await;
}

/// The file changes at one balancer after the other; each takes it over by a restart, or by a reload.
#[tokio::test(flavor = "multi_thread")]
async fn changes_made_while_a_new_file_goes_round_last() {
    for is_restart in [false, true] {
        let circle = Circle::new().await;
        let (one, other) = (circle.start("one", 1).await, circle.start("other", 1).await);
        let one = circle.restart(one, "one", 2).await;
        // The first has the new file, and an operator changes its upstreams.
        circle.change(&one).await;
        circle.until_changed(&other).await;
        // A restart with the old file is no change of the file.
        let other = circle.restart(other, "other", 1).await;
        circle.until_changed(&other).await;
        let other = match is_restart {
            true => circle.restart(other, "other", 2).await,
            false => {
                other.reload(circle.file("other", 2)).await;
                other
            }
        };
        tokio::time::sleep(Duration::from_millis(300)).await;
        for balancer in [&one, &other] {
            circle.until_changed(balancer).await;
        }
    }
}
