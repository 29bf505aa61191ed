//! Upstreams that the fleet refuses.

use super::*;

/// Regression: every round tried it, with every change of the fleet and every answer of a source.
#[test]
fn tries_an_unusable_upstream_again_after_pauses_that_double() {
    let mut scene = ReconcileScene::new();
    assert_eq!(scene.reconcile(&engines(&[1])), ["+e:1"]);
    for seconds in [1, 2, 4, 8, 16, 30, 30] {
        let is_first = seconds == 1;
        assert_eq!(scene.refuse(1), is_first, "one warning");
        let pause = Duration::from_secs(seconds);
        assert_eq!(scene.ownerships.due(), Some(scene.now + pause));
        assert_eq!(scene.reconcile(&engines(&[1])), NOTHING);
        scene.now += pause - Duration::from_millis(1);
        assert_eq!(scene.reconcile(&engines(&[1])), NOTHING, "{pause:?}");
        scene.now += Duration::from_millis(1);
        assert_eq!(scene.reconcile(&engines(&[1])), ["+e:1"], "{pause:?}");
    }
    assert_eq!(scene.reconcile(&engines(&[1])), NOTHING, "it was accepted");
    assert_eq!(scene.ownerships.due(), None);
    // The next refusal is the first one again.
    scene.resend = true;
    scene.reconcile(&engines(&[1]));
    assert!(scene.refuse(1));
    assert_eq!(scene.ownerships.due(), Some(scene.now + MIN_REFUSAL_PAUSE));
}

#[test]
fn tries_an_unusable_upstream_at_once_when_its_settings_or_its_owner_change() {
    let refused = || {
        let mut scene = ReconcileScene::new();
        scene.reconcile(&engines(&[1]));
        scene.refuse(1);
        assert_eq!(scene.reconcile(&engines(&[1])), NOTHING);
        scene
    };
    let mut scene = refused();
    scene.resend = true;
    assert_eq!(scene.reconcile(&engines(&[1])), ["+e:1"], "files may have changed");
    let mut scene = refused();
    assert_eq!(scene.reconcile(&[UpstreamConfig { max_active: Some(7), ..engine(1) }]), ["+e:1"]);
    let mut scene = refused();
    assert_eq!(scene.reconcile(&[]), NOTHING);
    assert_eq!(scene.ownerships.due(), None);
    assert_eq!(scene.reconcile(&engines(&[1])), ["+e:1"], "listed again");
    let mut scene = refused();
    scene.upsert(named("http://e:1"));
    assert_eq!(scene.reconcile(&engines(&[1])), NOTHING);
    assert_eq!(scene.reconcile(&engines(&[1])), NOTHING);
    assert_eq!(scene.ownerships.due(), None, "it is the operator's");
    scene.remove("e:1");
    scene.end_requests();
    scene.now += MAX_REFUSAL_PAUSE;
    assert_eq!(scene.reconcile(&engines(&[1])), NOTHING, "the operator removed it");
}

/// An unusable upstream delays no release. An upstream stays when the fleet refuses its new settings.
#[test]
fn an_unusable_upstream_delays_no_release() {
    let mut scene = ReconcileScene::new();
    scene.reconcile(&engines(&[1, 2]));
    scene.make_all_ready();
    assert_eq!(scene.reconcile(&engines(&[2, 3])), ["+e:3"]);
    // The settings of the second one have changed, too, and neither can be used.
    scene.refuse(3);
    scene.ownerships.mark_unusable(&engine(2).url, scene.now);
    assert_eq!(scene.reconcile(&engines(&[2, 3])), ["-e:1"]);
    scene.end_requests();
    for _ in 0..3 {
        scene.now += MAX_RELEASE_WAIT;
        assert_eq!(scene.reconcile(&engines(&[2, 3])), ["+e:2", "+e:3"]);
        scene.refuse(3);
        scene.ownerships.mark_unusable(&engine(2).url, scene.now);
        assert_eq!(scene.reconcile(&engines(&[2, 3])), NOTHING);
        assert_eq!(scene.staying(), [("e:2", true)]);
    }
    scene.remove("e:2");
    scene.end_requests();
    scene.now += MAX_REFUSAL_PAUSE;
    assert_eq!(scene.reconcile(&engines(&[2, 3])), ["+e:3"], "the operator removed the second one");
    assert_eq!(scene.reconcile(&engines(&[2, 3])), NOTHING);
}

/// Regression: an upstream lost the weight of an operator when the fleet refused new settings for a while.
#[test]
fn a_refusal_keeps_an_operators_weight() {
    let with =
        |max_active: u32, weight: f64| [UpstreamConfig { max_active: Some(max_active), weight, ..engine(1) }];
    // The next settings, refused twice; those after them; the weight that follows from them.
    for (refused, accepted, wanted) in [
        (with(7, 1.0), with(7, 1.0), 5.0),
        (with(7, 1.0), with(8, 1.0), 5.0),
        (with(7, 2.0), with(7, 2.0), 2.0),
        (with(7, 2.0), with(8, 1.0), 5.0),
    ] {
        let mut scene = ReconcileScene::new();
        scene.reconcile(&engines(&[1]));
        scene.fleet[0].config.weight = 5.0;
        for _ in 0..2 {
            let before = scene.fleet.clone();
            assert_eq!(scene.reconcile(&refused), ["+e:1"]);
            scene.fleet = before;
            scene.ownerships.mark_unusable(&engine(1).url, scene.now);
            assert_eq!(scene.reconcile(&refused), NOTHING);
            scene.now += MAX_REFUSAL_PAUSE;
        }
        assert_eq!(scene.reconcile(&accepted), ["+e:1"]);
        assert_eq!(scene.fleet[0].config.weight, wanted, "{accepted:?}");
        assert_eq!(scene.reconcile(&accepted), NOTHING);
    }
}
