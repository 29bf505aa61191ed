//! How fast the prefix index answers and learns: `cargo bench --bench index` (or with `--profile quick`).
//!
//! The index holds a million blocks, 256 to a conversation, so that hardly anything that is looked up lies in
//! a processor's cache. All conversations begin with the same 32 blocks, which every upstream holds; the rest
//! of each one to three of them hold. A lookup is followed by what every upstream is missing.
//!
//! Figures, and those before chains were stored thinly, stand in benches/notes.md.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use vllm_lb::prompt::chain::thinning::{last_stored, stored_count, stored_depth};
use vllm_lb::state::prefix_index::{Hits, Index, Slot};

const CONVERSATIONS: u64 = 4000;
const BLOCKS: u64 = 256;
const SHARED: u64 = 32;

/// Scatters numbers over 64 bits, as hashes are.
fn scatter(number: u64) -> u64 {
    let mixed = (number ^ (number >> 31)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed ^ (mixed >> 27)
}

fn chain(conversation: u64) -> Vec<u64> {
    let own = |block| if block < SHARED { block } else { (conversation + 1) << 16 | block };
    (1..=BLOCKS).map(|block| scatter(own(block))).collect()
}

fn filled(upstreams: u64) -> (Index, Vec<Slot>, Vec<Vec<u64>>) {
    let index = Index::new(4_000_000, 0x5EED);
    let slots: Vec<Slot> = (0..upstreams).map_while(|_| index.enter()).collect();
    let chains: Vec<Vec<u64>> = (0..CONVERSATIONS).map(chain).collect();
    for (number, chain) in (0u64..).zip(&chains) {
        for copy in 0..1 + scatter(number) % 3 {
            let slot = slots[(scatter(number + (copy << 32)) % upstreams) as usize];
            index.learn(chain, None, slot);
        }
    }
    (index, slots, chains)
}

fn index(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("index");
    group.measurement_time(Duration::from_secs(3)).warm_up_time(Duration::from_secs(1)).sample_size(50);
    for upstreams in [8, 64, 256] {
        let (index, slots, chains) = filled(upstreams);
        let size = index.size();
        let each = size.bytes as f64 / size.blocks as f64;
        eprintln!("{upstreams} upstreams: {size:?}, {each:.1} bytes a block");
        let mut hits = Hits::default();
        let mut turn = 0;
        let mut next = || {
            turn = (turn + 1597) % chains.len();
            &chains[turn]
        };
        group.bench_function(format!("lookup, {upstreams} upstreams"), |bencher| {
            bencher.iter(|| {
                index.lookup(next(), &mut hits);
                hits.charge(2.0, slots.len());
                black_box(slots.iter().map(|slot| hits.missing(*slot)).sum::<f64>())
            });
        });
        group.bench_function(format!("the same chain again, {upstreams} upstreams"), |bencher| {
            let chain = next();
            bencher.iter(|| {
                index.lookup(black_box(chain), &mut hits);
                hits.charge(2.0, slots.len());
                black_box(slots.iter().map(|slot| hits.missing(*slot)).sum::<f64>())
            });
        });
        let mut at = 0;
        group.bench_function(format!("learn a known chain, {upstreams} upstreams"), |bencher| {
            bencher.iter(|| {
                at = (at + 1) % slots.len();
                index.learn(next(), None, slots[at])
            });
        });
        let mut fresh = CONVERSATIONS;
        group.bench_function(format!("learn a new chain, {upstreams} upstreams"), |bencher| {
            let prepare = || {
                fresh += 1;
                (chain(fresh), slots[fresh as usize % slots.len()])
            };
            let learn = |(chain, slot): (Vec<u64>, Slot)| index.learn(&chain, None, slot);
            bencher.iter_batched(prepare, learn, BatchSize::SmallInput);
        });
    }
    group.finish();
}

/// What a tail of 16 new blocks costs: heard from a sibling, and sent here.
fn tails(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("index");
    group.measurement_time(Duration::from_secs(2)).warm_up_time(Duration::from_secs(1)).sample_size(20);
    for known in [16, 256, 1024] {
        let (index, slots, _) = filled(64);
        let mut fresh = 3 * CONVERSATIONS;
        let mut prepare = || {
            fresh += 1;
            let mut chain: Vec<u64> =
                (1..=known + 16).map(|block| scatter((fresh + 1) << 20 | block)).collect();
            let (tail, slot) = (chain.split_off(known as usize), slots[fresh as usize % slots.len()]);
            index.learn(&chain, None, slot);
            (chain, tail, slot)
        };
        group.bench_function(format!("learn a tail of 16 behind {known}"), |bencher| {
            let prepare = || {
                let (chain, tail, slot) = prepare();
                (chain.last().copied().unwrap_or(0), published(&tail, known as usize), slot)
            };
            let learn =
                |(parent, tail, slot): (u64, Vec<u64>, Slot)| index.learn_after(parent, &tail, None, slot);
            bencher.iter_batched(prepare, learn, BatchSize::SmallInput);
        });
        group.bench_function(format!("learn a prompt of 16 new behind {known}"), |bencher| {
            let prepare = || {
                let (mut chain, tail, slot) = prepare();
                chain.extend(tail);
                (chain, slot)
            };
            let learn = |(chain, slot): (Vec<u64>, Slot)| index.learn(&chain, None, slot);
            bencher.iter_batched(prepare, learn, BatchSize::SmallInput);
        });
    }
    group.finish();
}

/// Conversations that siblings' messages continue in turn, as `exchange_scale/siblings.rs` has them.
struct HeardTraffic {
    conversations: Vec<(u64, usize)>,
    next: usize,
    begun: u64,
    last_blocks: usize,
}

/// The tail of one prompt, as it is heard.
struct HeardTail {
    parent: Option<u64>,
    hashes: Vec<u64>,
    upstream: usize,
}

impl HeardTraffic {
    fn tail(&mut self) -> HeardTail {
        let at = self.next % self.conversations.len();
        self.next += 1;
        if self.conversations[at].1 >= self.last_blocks {
            self.begun += 1;
            self.conversations[at] = (self.begun, 0);
        }
        let (number, known) = self.conversations[at];
        self.conversations[at].1 += 16;
        let hash = |block: usize| scatter(number << 16 | block as u64);
        let (from, to) = (last_stored(known), known + 16);
        let hashes =
            (stored_count(known) + 1..=stored_count(to)).map(|one| hash(stored_depth(one))).collect();
        let parent = (from > 0).then(|| hash(from));
        HeardTail { parent, hashes, upstream: scatter(number) as usize % 64 }
    }
}

/// What a message of a sibling with 20 tails costs in an index that evicts as much as it learns.
fn hearing(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("index");
    group.measurement_time(Duration::from_secs(3)).warm_up_time(Duration::from_secs(1)).sample_size(50);
    for last_blocks in [256, 800] {
        let index = Index::new(1_000_000, 0x5EED);
        let slots: Vec<Slot> = (0..64).map_while(|_| index.enter()).collect();
        let conversations: Vec<_> = (0..2400).map(|number| (number, last_blocks)).collect();
        let mut traffic = HeardTraffic { conversations, next: 0, begun: 2400, last_blocks };
        let learn = |tail: &HeardTail| match tail.parent {
            Some(parent) => index.learn_after(parent, &tail.hashes, None, slots[tail.upstream]).is_some(),
            None => index.learn_stored(&tail.hashes, None, slots[tail.upstream]).is_some(),
        };
        while index.size().pairs < 999_000 {
            (0..1000).for_each(|_| _ = learn(&traffic.tail()));
        }
        (0..200_000).for_each(|_| _ = learn(&traffic.tail()));
        eprintln!("chains to {last_blocks} blocks: {:?}", index.size());
        group.bench_function(format!("hear 20 tails of chains to {last_blocks} blocks"), |bencher| {
            let message = || (0..20).map(|_| traffic.tail()).collect::<Vec<_>>();
            let hear = |tails: Vec<HeardTail>| tails.iter().filter(|tail| learn(tail)).count();
            bencher.iter_batched(message, hear, BatchSize::SmallInput);
        });
    }
    group.finish();
}

/// The blocks of a tail that siblings publish.
fn published(tail: &[u64], known: usize) -> Vec<u64> {
    let depths = known + 1..;
    depths.zip(tail).filter(|(depth, _)| last_stored(*depth) == *depth).map(|(_, block)| *block).collect()
}

criterion_group!(benches, index, tails, hearing);
criterion_main!(benches);
