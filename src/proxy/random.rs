//! Random numbers for draws and request ids: unique, but predictable. Callers that need unpredictable bytes
//! use `secret`.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use http::HeaderValue;
use rustls::crypto::{SecureRandom, ring};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Seeds for choices, and unpredictable bytes for ids.
pub(super) struct RandomSource {
    /// The system's generator, for unpredictable bytes.
    system: &'static dyn SecureRandom,
    seed: u64,
    count: AtomicU64,
}

impl RandomSource {
    /// Seeded by the system, as the standard hash maps are.
    pub(super) fn new() -> Self {
        RandomSource {
            system: ring::default_provider().secure_random,
            seed: RandomState::new().hash_one(0u64),
            count: AtomicU64::new(0),
        }
    }

    /// The next number: unique, and predictable.
    pub(super) fn next(&self) -> u64 {
        let count = self.count.fetch_add(1, Relaxed);
        xxh3_64_with_seed(&count.to_le_bytes(), self.seed)
    }

    /// Unpredictable bytes from the system; `None` if the system fails.
    pub(super) fn secret<const SECRET_BYTES: usize>(&self) -> Option<[u8; SECRET_BYTES]> {
        let mut bytes = [0; SECRET_BYTES];
        self.system.fill(&mut bytes).ok()?;
        Some(bytes)
    }

    /// A unique entry in `via` for one balancer.
    pub(super) fn mark(&self) -> HeaderValue {
        let mark = format!("1.1 vllm-lb-{:016x}", self.next());
        HeaderValue::try_from(mark).expect("digits and letters make a header's value")
    }

    /// A UUID of version 4 in its text form.
    pub(super) fn uuid(&self) -> String {
        let (high, low) = (self.next() & !0xf000 | 0x4000, self.next() & !(3 << 62) | 2 << 62);
        let (first, second, third) = (high >> 32, high >> 16 & 0xffff, high & 0xffff);
        format!("{first:08x}-{second:04x}-{third:04x}-{:04x}-{:012x}", low >> 48, low & 0xffff_ffff_ffff)
    }

    /// 32 hexadecimal digits, as uuid4's.
    pub(super) fn id(&self) -> String {
        format!("{:016x}{:016x}", self.next(), self.next())
    }
}
