//! A steady load: clients that ask one request after another, half of them for streams, until they are told
//! to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::task::JoinHandle;

use super::body::{chat, stream};
use super::wire::{Wire, post};
use super::{Balancer, eventually};

const CHAT: &str = "/v1/chat/completions";

/// Clients that ask one request after another until they are told to stop.
pub struct Clients {
    stop: Arc<AtomicBool>,
    asked: Arc<AtomicU64>,
    clients: Vec<JoinHandle<Vec<String>>>,
}

impl Clients {
    pub fn start(balancer: &Balancer, clients: usize) -> Self {
        let (stop, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let client = |number: usize| {
            let (stop, asked) = (stop.clone(), asked.clone());
            let address = balancer.address().to_string();
            tokio::spawn(async move {
                let mut wrong = Vec::new();
                let mut wire = Wire::connect(&address).await;
                while !stop.load(Ordering::Relaxed) {
                    let body = if number.is_multiple_of(2) { chat("sim") } else { stream("sim", 5) };
                    let answer = wire.ask(post(CHAT, body)).await;
                    if answer.status != 200 || !answer.whole {
                        wrong.push(format!("{} {}", answer.status, answer.text()));
                        wire = Wire::connect(&address).await;
                    }
                    asked.fetch_add(1, Ordering::Relaxed);
                }
                wrong
            })
        };
        let clients = (0..clients).map(client).collect();
        Clients { stop, asked, clients }
    }

    /// Waits until so many more requests have been answered.
    pub async fn until_more(&self, more: u64) {
        let goal = self.asked.load(Ordering::Relaxed) + more;
        eventually("more requests are answered", async || {
            (self.asked.load(Ordering::Relaxed) >= goal).then_some(())
        })
        .await;
    }

    /// Stops, and tells what went wrong.
    pub async fn end(self) -> Vec<String> {
        self.stop.store(true, Ordering::Relaxed);
        let mut wrong = Vec::new();
        for client in self.clients {
            wrong.extend(client.await.expect("clients do not panic"));
        }
        wrong
    }
}

/// What goes wrong when nothing does.
pub fn none() -> Vec<String> {
    Vec::new()
}
