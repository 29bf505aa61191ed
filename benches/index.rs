//! How fast the prefix index answers and learns: `cargo bench --bench index` (or with `--profile quick`).
//!
//! The index holds a million blocks, 256 to a conversation, so that hardly anything that is looked up lies in
//! a processor's cache. All conversations begin with the same 32 blocks, which every upstream holds; the rest
//! of each one to three of them hold. A lookup is followed by what every upstream is missing.
//!
//! | 256 blocks, µs of a core of an AMD EPYC | 8 upstreams | 64 | 256 |
//! | --- | --- | --- | --- |
//! | lookup, any of 4,000 conversations | 4.0 | 4.0 | 8.2 |
//! | lookup, the same chain again | 1.9 | 1.9 | 4.6 |
//! | learn a known chain | 9 | 12 | 18 |
//! | learn a new chain | 190 | 200 | 210 |
//!
//! Processor time, as the scheduler counts it: the machine had other work, and the clock on the wall tells
//! two to four times as much. Memory: 99 bytes a block with two holders each, about 75 with one.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
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

criterion_group!(benches, index);
criterion_main!(benches);
