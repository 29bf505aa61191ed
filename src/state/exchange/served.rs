//! The upstreams that a balancer serves, as hashes of their names.
//!
//! Siblings compare the hashes: two fleets on one prefix of Redis have no upstream in common.

use xxhash_rust::xxh3::xxh3_64;

use super::wire::WireReader;

/// The largest number of names that are sent.
const MAX_SERVED: usize = 16_384;

/// Returns the hash of an upstream's name.
pub fn name_hash(name: &str) -> u32 {
    let hash = xxh3_64(name.as_bytes());
    (hash ^ (hash >> 32)) as u32
}

/// Encodes the hashes.
pub fn encode(hashes: &[u32]) -> Vec<u8> {
    hashes.iter().take(MAX_SERVED).flat_map(|hash| hash.to_le_bytes()).collect()
}

/// Reads one hash.
pub fn read(part: &mut WireReader<'_>) -> Option<u32> {
    let bytes = [part.byte()?, part.byte()?, part.byte()?, part.byte()?];
    Some(u32::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_encodes() {
        let hashes = [name_hash("gpu-0"), name_hash("gpu-1"), 0, u32::MAX];
        assert_ne!(hashes[0], hashes[1]);
        let bytes = encode(&hashes);
        let mut reader = WireReader::new(&bytes);
        let read: Vec<Option<u32>> = (0..5).map(|_| read(&mut reader)).collect();
        assert_eq!(read, hashes.map(Some).into_iter().chain([None]).collect::<Vec<_>>());
    }
}
