//! The upstreams that a route leads to, as requests read them.
//!
//! A route names upstreams and sources. Its names never change; what they stand for is found once for each
//! snapshot of the fleet, and read as a set: with a thousand upstreams a list would be searched a thousand
//! times for each request.

use std::hash::{DefaultHasher, Hash, Hasher};

/// The bits of a word of a `PlaceSet`.
const WORD_BITS: usize = u64::BITS as usize;

/// A set of places in a list: one bit for each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlaceSet {
    words: Vec<u64>,
}

/// The upstreams that a route leads to at one moment.
#[derive(Debug, Default)]
pub struct RouteUpstreams {
    /// In ascending order.
    ids: Vec<usize>,
    /// The places of the upstreams in the snapshot of this version.
    places: PlaceSet,
    version: u64,
}

/// The names of the upstreams and sources that a route leads to. Equal in any order; cheap to compare and to
/// hash, since every waiting request of the route has them in its key.
#[derive(Debug)]
pub struct RouteNames {
    /// In ascending order.
    names: Vec<String>,
    hash: u64,
}

// === impl PlaceSet ===

impl PlaceSet {
    /// Adds a place.
    pub fn insert(&mut self, place: usize) {
        let word = place / WORD_BITS;
        if self.words.len() <= word {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= 1 << (place % WORD_BITS);
    }

    /// Returns 64 places as the bits of a word; no places behind the last word.
    pub fn word(&self, word: usize) -> u64 {
        self.words.get(word).copied().unwrap_or(0)
    }

    /// Returns the number of words up to the last place.
    pub fn words(&self) -> usize {
        self.words.len()
    }

    pub fn contains(&self, place: usize) -> bool {
        self.word(place / WORD_BITS) >> (place % WORD_BITS) & 1 == 1
    }

    /// Returns the number of places.
    pub fn count(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Returns the places of one word, in ascending order.
    pub fn places_in(word: usize, mut bits: u64) -> impl Iterator<Item = usize> {
        std::iter::from_fn(move || {
            let place = word * WORD_BITS + bits.trailing_zeros() as usize;
            (bits != 0).then(|| {
                bits &= bits - 1;
                place
            })
        })
    }

    /// Returns all places, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = usize> {
        let words = self.words.iter().enumerate();
        words.flat_map(|(word, bits)| PlaceSet::places_in(word, *bits))
    }
}

impl FromIterator<usize> for PlaceSet {
    fn from_iter<I: IntoIterator<Item = usize>>(places: I) -> Self {
        let mut set = PlaceSet::default();
        places.into_iter().for_each(|place| set.insert(place));
        set
    }
}

// === impl RouteUpstreams ===

impl RouteUpstreams {
    /// Builds the set from the ids of the upstreams. `place_of` returns the place of an upstream in the
    /// snapshot of this version, which is above 0.
    pub fn new(mut ids: Vec<usize>, version: u64, place_of: impl Fn(usize) -> Option<usize>) -> Self {
        ids.sort_unstable();
        ids.dedup();
        let places = ids.iter().filter_map(|id| place_of(*id)).collect();
        RouteUpstreams { ids, places, version }
    }

    /// Builds the set from ids alone.
    #[cfg(test)]
    pub fn of(ids: &[usize]) -> Self {
        RouteUpstreams::new(ids.to_vec(), 0, |_| None)
    }

    /// Returns the ids in ascending order. An unknown id means an upstream that may still be discovered.
    pub fn ids(&self) -> &[usize] {
        &self.ids
    }

    /// Whether the upstream of this id is among them.
    pub fn contains(&self, id: usize) -> bool {
        self.ids.binary_search(&id).is_ok()
    }

    /// Returns the places of the upstreams in the snapshot of this version; `None` when the set was made for
    /// another snapshot.
    pub fn places(&self, version: u64) -> Option<&PlaceSet> {
        (self.version == version && version > 0).then_some(&self.places)
    }
}

// === impl RouteNames ===

impl RouteNames {
    pub fn new(names: &[String]) -> Self {
        let mut names = names.to_vec();
        names.sort_unstable();
        names.dedup();
        let mut hasher = DefaultHasher::new();
        names.hash(&mut hasher);
        RouteNames { names, hash: hasher.finish() }
    }

    pub fn contains(&self, name: &str) -> bool {
        self.names.binary_search_by(|other| other.as_str().cmp(name)).is_ok()
    }
}

impl PartialEq for RouteNames {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other) || self.hash == other.hash && self.names == other.names
    }
}

impl Eq for RouteNames {}

impl Hash for RouteNames {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_set_of_places_agrees_with_an_ordered_set(places in prop::collection::vec(0usize..300, 0..90)) {
            let (set, model): (PlaceSet, BTreeSet<usize>) =
                (places.iter().copied().collect(), places.iter().copied().collect());
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            prop_assert!((0..400).all(|place| set.contains(place) == model.contains(&place)));
            prop_assert_eq!((set.count(), set.is_empty()), (model.len(), model.is_empty()));
        }
    }

    #[test]
    fn places_belong_to_one_version() {
        let place_of = |id| (id < 99).then(|| id - 10);
        let upstreams = RouteUpstreams::new(vec![12, 10, 12, usize::MAX], 7, place_of);
        assert_eq!(upstreams.ids(), [10, 12, usize::MAX]);
        assert!(upstreams.contains(12) && !upstreams.contains(11));
        let places = upstreams.places(7).map(|places| places.iter().collect::<Vec<_>>());
        assert_eq!(places, Some(vec![0, 2]));
        assert_eq!(upstreams.places(8), None);
        assert_eq!(RouteUpstreams::of(&[3]).places(0), None, "it was made for no snapshot");
    }

    #[test]
    fn names_are_equal_in_any_order() {
        let names =
            |names: &[&str]| RouteNames::new(&names.iter().map(|name| name.to_string()).collect::<Vec<_>>());
        let hash = |names: &RouteNames| {
            let mut hasher = DefaultHasher::new();
            names.hash(&mut hasher);
            hasher.finish()
        };
        let (one, other) = (names(&["b", "a", "c"]), names(&["c", "b", "a"]));
        assert_eq!(one, other);
        assert_eq!(hash(&one), hash(&other));
        assert_ne!(one, names(&["a", "b"]));
        assert!(one.contains("b") && !one.contains("bb"));
    }
}
