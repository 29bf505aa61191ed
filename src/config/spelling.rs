//! Finds the word that a misspelt one most likely stands for.

/// The longest part of a word that is compared, in characters.
const MAX_COMPARED_CHARS: usize = 64;

/// The allowed word that is closest to this one, if any is close.
pub(crate) fn closest<'a>(word: &str, allowed: &[&'a str]) -> Option<&'a str> {
    let near = |candidate: &&&str| (distance(word, candidate), candidate.len());
    let best = allowed.iter().min_by_key(near)?;
    // One wrong letter in four: with more, any short word is close to any other.
    let limit = word.chars().count().max(best.chars().count()) / 4;
    (distance(word, best) <= limit).then_some(*best)
}

/// The number of single letters to insert, remove, replace or swap with their neighbour.
fn distance(a: &str, b: &str) -> usize {
    let letters = |word: &str| -> Vec<char> { word.chars().take(MAX_COMPARED_CHARS).collect() };
    let (a, b) = (letters(a), letters(b));
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 0..a.len() {
        let mut row = vec![i + 1];
        for j in 0..b.len() {
            let replaced = last[j] + usize::from(a[i] != b[j]);
            let mut cost = replaced.min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && a[i] == b[j - 1] && a[i - 1] == b[j] {
                cost = cost.min(before[j - 1] + 1);
            }
            row.push(cost);
        }
        before = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_closest_word() {
        let allowed = ["health", "listen", "log", "limits", "threads"];
        let table = [
            ("helth", Some("health")),
            ("haelth", Some("health")),
            ("lsiten", Some("listen")),
            ("limit", Some("limits")),
            ("thread", Some("threads")),
            ("logs", Some("log")),
            ("colour", None),
            ("x", None),
            ("", None),
        ];
        for (word, wanted) in table {
            assert_eq!(closest(word, &allowed), wanted, "{word}");
        }
    }
}
