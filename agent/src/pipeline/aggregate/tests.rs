//! What is handed out of a row.

use super::*;

fn stats(count: u64, failed: u64, marked: u64) -> AggregateStats {
    AggregateStats {
        count,
        failed,
        marked,
        ..AggregateStats::EMPTY
    }
}

fn hand_out(state: &mut RowState, key: &AggregateKey, stats: &AggregateStats) -> [u64; CLASSES] {
    state.hand_out(classes(key, stats, true), stats.count)
}

#[test]
fn what_was_handed_out_under_one_word_is_not_handed_out_again_under_another() {
    let key = AggregateKey {
        kind: KIND_INVOCATION,
        detail: ENDED_BY_FAILED_CALL,
        ..AggregateKey::default()
    };
    let mut state = RowState::default();
    assert_eq!(hand_out(&mut state, &key, &stats(5, 0, 5)), [5, 0, 0]);
    assert_eq!(words(&key, false, true)[0], "host_error");
    // The import becomes known: only what is new has the new word.
    assert_eq!(hand_out(&mut state, &key, &stats(7, 0, 7)), [2, 0, 0]);
    assert_eq!(words(&key, true, true)[0], "exit");
    assert_eq!(hand_out(&mut state, &key, &stats(7, 0, 7)), [0; CLASSES]);
    // One that went on has caught an exception of the host's; where nothing tells which do, all have failed.
    assert_eq!(classes(&key, &stats(9, 0, 7), true), [7, 0, 2]);
    assert_eq!(classes(&key, &stats(9, 0, 7), false), [9, 0, 0]);
}

#[test]
fn an_end_that_changes_its_class_is_handed_out_once_and_classes_are_right_in_the_end() {
    let key = AggregateKey {
        kind: KIND_INVOCATION,
        ..AggregateKey::default()
    };
    let mut state = RowState::default();
    // It has ended, and the error that it ended with is made after it was read.
    assert_eq!(hand_out(&mut state, &key, &stats(1, 0, 0)), [0, 0, 1]);
    assert_eq!(hand_out(&mut state, &key, &stats(1, 0, 1)), [0; CLASSES]);
    assert_eq!(hand_out(&mut state, &key, &stats(3, 0, 1)), [1, 0, 1]);
    assert_eq!(state.classes, [1, 0, 2]);
}

#[test]
fn what_may_have_ended_unseen_is_not_guessed() {
    let invocation = AggregateKey {
        kind: KIND_INVOCATION,
        detail: ENDED_UNSURE,
        ..AggregateKey::default()
    };
    // Two traps that signals told of, three other failures.
    assert_eq!(classes(&invocation, &stats(9, 2, 3), true), [2, 3, 4]);
    assert_eq!(words(&invocation, false, true), ["trap", "unknown", "ok"]);
    let call = AggregateKey {
        kind: KIND_HOST_CALL,
        detail: CALL_UNFINISHED | u32::from(COMPONENT_CALL),
        ..AggregateKey::default()
    };
    assert_eq!(classes(&call, &stats(4, 0, 4), true), [4, 0, 0]);
    assert_eq!(words(&call, false, true)[0], "unfinished");
}

#[test]
fn what_a_process_has_no_rows_for_is_of_no_outcome_whatever_is_known_of_it() {
    for kind in [KIND_INVOCATION, KIND_HOST_CALL, KIND_SYSCALL] {
        let key = AggregateKey {
            kind,
            detail: DETAIL_OTHER,
            ..AggregateKey::default()
        };
        let mut state = RowState::default();
        assert_eq!(hand_out(&mut state, &key, &stats(9, 2, 3)), [9, 0, 0]);
        assert_eq!(words(&key, true, true)[0], "other");
    }
}

#[test]
fn nothing_is_kept_of_a_process_that_is_forgotten() {
    let mut collected = Collected::default();
    for pid in [7, 8] {
        collected.epochs.insert(pid, 3);
        let key = AggregateKey {
            pid,
            ..AggregateKey::default()
        };
        collected.rows.insert(key, RowState::default());
    }
    collected.forget(7);
    assert_eq!(collected.epochs.keys().collect::<Vec<_>>(), [&8]);
    assert!(collected.rows.keys().all(|key| key.pid == 8));
}
