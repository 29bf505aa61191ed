//! The records of run-time changes: what is kept, written and removed.

use super::*;
use crate::config::url;

const REMOVED: &str = r#"{"removed": true}"#;
const DRAINED: &str = r#"{"drain": true}"#;

fn days_ago(days: u64) -> u64 {
    clock() - millis(Duration::from_secs(days * 24 * 3600))
}

fn pair(name: &str, revision: u64, text: &str) -> (String, String) {
    (name.into(), MemberText { revision, text: text.into() }.write())
}

fn merge(members: &Members, pairs: &[(String, String)]) -> MergedMembers {
    members.merge(Some("mark".into()), whole(pairs), &UnwrittenMembers::default())
}

fn whole(pairs: &[(String, String)]) -> ListedMembers {
    ListedMembers { records: pairs.to_vec(), count: pairs.len(), is_whole: true }
}

fn names(members: &Members) -> Vec<String> {
    let mut names: Vec<String> = members.all().into_keys().collect();
    names.sort();
    names
}

#[test]
fn expires_removals_after_seven_days_and_no_other_change() {
    let members = Members::default();
    let list = [
        pair("removed", days_ago(8), REMOVED),
        pair("cleared", days_ago(8), "{}"),
        pair("drained", days_ago(800), DRAINED),
        pair("recent", days_ago(6), REMOVED),
        pair("unreadable", days_ago(8), "added"),
    ];
    assert!(merge(&members, &list).changed);
    assert_eq!(names(&members), ["drained", "recent", "unreadable"]);
    let mut deleted = members.unwritten(false).expired;
    deleted.sort();
    assert_eq!(deleted, ["cleared", "removed"]);
    // Deleted once, also where the list is read again.
    let written = members.unwritten(false);
    members.merge(Some("mark".into()), whole(&list[2..]), &written);
    assert!(!members.has_unwritten());
}

/// Regression: the command that restores a lost record wrote a change, too, for which the user of this
/// balancer had no permission.
#[test]
fn a_change_is_not_restored_as_a_lost_record() {
    let members = Members::default();
    merge(&members, &[pair("known", days_ago(1), DRAINED)]);
    assert!(members.put("changed", DRAINED.into()));
    let unwritten = members.unwritten(true);
    assert_eq!(unwritten.changed.keys().collect::<Vec<_>>(), ["changed"]);
    assert_eq!(unwritten.lost.keys().collect::<Vec<_>>(), ["known"]);
}

#[test]
fn an_older_state_does_not_bring_an_expired_name_back() {
    let members = Members::default();
    merge(&members, &[pair("a", days_ago(8), REMOVED)]);
    assert!(!merge(&members, &[pair("a", days_ago(30), DRAINED)]).changed);
    assert_eq!((names(&members).len(), members.unwritten(false).expired), (0, vec!["a".to_string()]));
    assert!(members.put("a", DRAINED.into()), "a new change of the name counts");
    assert_eq!(names(&members), ["a"]);
    assert!(members.unwritten(false).expired.is_empty());
}

#[test]
fn does_not_restore_texts_that_no_balancer_wrote() {
    let members = Members::default();
    let foreign = ("foreign".to_string(), "garbage".to_string());
    let list = [foreign, pair("own", days_ago(1), DRAINED), pair("ahead", u64::MAX, DRAINED)];
    merge(&members, &list);
    assert_eq!(names(&members), ["ahead", "foreign", "own"]);
    let lost = members.unwritten(true).lost;
    assert_eq!(lost.keys().collect::<Vec<_>>(), ["own"]);
    // All three are deleted; the balancer writes its own one again.
    assert!(merge(&members, &[]).changed);
    assert_eq!(names(&members), ["own"]);
    assert_eq!(members.unwritten(false).changed.keys().collect::<Vec<_>>(), ["own"]);
    // A change is newer than a text of the far future.
    merge(&members, &list);
    assert!(members.put("ahead", REMOVED.into()));
    merge(&members, &list);
    assert_eq!(members.get("ahead").as_deref(), Some(REMOVED));
}

/// Regression: where one clock was wrong by more than a day, a change at the other balancer counted as older
/// than the one that it replaced, and both balancers wrote theirs again and again.
#[test]
fn a_change_replaces_one_by_a_balancer_whose_clock_is_ahead() {
    let (ahead, other) = (Members::default(), Members::default());
    let years = 3 * 365 * 24 * 3600 * 1000;
    assert!(ahead.adopt("a", MemberText { revision: clock() + years, text: DRAINED.into() }));
    let listed = |members: &Members| {
        let texts = members.revisions().into_iter();
        texts.map(|(name, text)| (name, text.write())).collect::<Vec<_>>()
    };
    merge(&other, &listed(&ahead));
    assert!(other.put("a", "{}".into()));
    let written = ahead.unwritten(false);
    ahead.merge(Some("mark".into()), whole(&listed(&other)), &written);
    assert_eq!(ahead.get("a").as_deref(), Some("{}"));
    assert!(!ahead.has_unwritten(), "it accepts the newer change");
    let written = other.unwritten(false);
    other.merge(Some("mark".into()), whole(&listed(&ahead)), &written);
    assert_eq!((other.get("a").as_deref(), other.has_unwritten()), (Some("{}"), false));
}

/// As at a balancer that may not write the list.
#[test]
fn an_unwritten_change_ends_with_a_newer_one_of_a_sibling() {
    let members = Members::default();
    assert!(members.put("a", DRAINED.into()) && members.put("b", DRAINED.into()));
    let own = members.revisions()["a"].revision;
    assert!(!merge(&members, &[pair("a", own - 1, "{}")]).changed);
    assert!(merge(&members, &[pair("a", own + 1, "{}")]).changed);
    assert_eq!((members.get("a"), members.get("b")), (Some("{}".into()), Some(DRAINED.into())));
    let unwritten = members.unwritten(false).changed;
    assert_eq!(unwritten.keys().collect::<Vec<_>>(), ["b"], "the record of the sibling is not written again");
    assert_eq!(unwritten["b"].text, DRAINED);
}

#[test]
fn a_list_that_was_read_in_part_loses_no_names() {
    let members = Members::default();
    merge(&members, &[pair("a", days_ago(1), DRAINED), pair("b", days_ago(1), DRAINED)]);
    let part = ListedMembers { count: 30_000, is_whole: false, ..whole(&[pair("a", days_ago(0), REMOVED)]) };
    let merged = members.merge(Some("mark".into()), part, &UnwrittenMembers::default());
    assert_eq!(merged, MergedMembers { changed: true, is_overfull: true });
    assert_eq!(members.get("b").as_deref(), Some(DRAINED));
    assert!(!members.has_unwritten(), "what was not read is not written again");
}

#[test]
fn keeps_the_removal_of_a_configured_upstream() {
    let members = Members::default();
    merge(&members, &[pair("a", days_ago(5), REMOVED), pair("b", days_ago(1), REMOVED)]);
    assert!(members.refresh("a") && !members.refresh("b") && !members.refresh("c"));
    let written = members.unwritten(false).changed;
    assert_eq!(written.keys().collect::<Vec<_>>(), ["a"]);
    assert!(written["a"].revision > days_ago(1));
}

#[test]
fn rejects_names_beyond_the_limit_and_reports_a_longer_list_once() {
    let members = Members::default();
    for number in 0..MAX_MEMBERS {
        assert!(members.put(&format!("{number}"), DRAINED.into()));
    }
    assert!(!members.put("more", DRAINED.into()) && !members.has_room(["more"]));
    assert!(members.put("7", REMOVED.into()), "a known name has room");
    let list: Vec<_> = (0..=MAX_MEMBERS).map(|number| pair(&format!("{number}"), 1, DRAINED)).collect();
    let full = |list: &[(String, String)]| merge(&members, list).is_overfull;
    assert_eq!([full(&list), full(&list), full(&list[1..]), full(&list)], [true, false, false, true]);
}

#[test]
fn adopts_newer_records_of_another_process() {
    let members = Members::default();
    let text = |revision, text: &str| MemberText { revision, text: text.into() };
    members.adopt("a", text(days_ago(1), DRAINED));
    members.adopt("a", text(days_ago(2), REMOVED));
    members.adopt("b", text(days_ago(8), REMOVED));
    assert_eq!(members.all(), HashMap::from([("a".to_string(), DRAINED.to_string())]));
}

/// Regression: a drain of a sibling ended with the first comparison, where Redis was reached long after the
/// start.
#[test]
fn a_late_comparison_ends_only_what_was_changed_before_the_start() {
    let upstream = UpstreamConfig::new(url::upstream("http://u:1").expect("is a URL"));
    let before = FileEntries::from([("u:1".to_string(), 1)]);
    for (later, ends) in [(-60_000, true), (60_000, false)] {
        let members = Members::default();
        members.set_entries(std::slice::from_ref(&upstream));
        let revision = clock().saturating_add_signed(later);
        assert!(members.adopt("u:1", MemberText { revision, text: r#"{"drain": true}"#.into() }));
        assert_eq!(members.end_outdated(&before), ends);
        assert_eq!(members.get("u:1").is_some_and(|text| text.contains("true")), !ends);
    }
}
