//! State files: two slots, written in turn, and what becomes of them in a power cut.

use super::*;

/// Spoils the slot that counts, as a write does that is cut short.
fn tear(file: &Path, at: usize) {
    let mut bytes = fs::read(file).unwrap();
    let newest = newest_slot(file);
    let start = if bytes.starts_with(newest.as_bytes()) { 0 } else { SLOT };
    bytes[start + at..start + SLOT].fill(0);
    fs::write(file, bytes).unwrap();
}

#[test]
fn a_torn_write_is_the_state_before_and_no_dead_card() {
    let place = Place::new();
    let (data, store) = (place.data(15), Store::new());
    assert_wrong(&data.verify(&WRONG.into(), &store), 14);
    for at in [0, 1, 30, 100, 200, SLOT - 1] {
        let before = data.tries_left().unwrap();
        assert_wrong(&data.verify(&WRONG.into(), &store), before - 1);
        // Wherever it is cut, what counts is as it was before it.
        tear(&place.state_file(), at);
        assert_eq!(data.tries_left().unwrap(), before, "{at}");
        assert_wrong(&data.verify(&WRONG.into(), &store), before - 1);
        assert_wrong(&data.verify(&WRONG.into(), &store), before - 2);
    }
}

/// All that may be on disk after a power cut: of what was not waited for, the old, the new, or rubbish.
#[test]
fn a_power_cut_at_any_moment_costs_a_try_and_gives_none() {
    let place = Place::new();
    let (data, store) = (place.data(5), Store::new());
    assert_wrong(&data.verify(&WRONG.into(), &store), 4);
    let file = place.state_file();
    // What the disk has for certain, when the PIN is compared.
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let (shown, path) = (seen.clone(), file.clone());
    let watched = Store::with(move |secret| {
        *shown.lock().unwrap() = fs::read(&path).unwrap();
        if secret == RIGHT { Ok(()) } else { Err(UnlockError::Wrong) }
    });
    let tries_with = |bytes: &[u8]| {
        fs::write(&file, bytes).unwrap();
        data.tries_left().unwrap()
    };
    let mut left = 4;
    for pin in [RIGHT, RIGHT, WRONG, RIGHT, WRONG, WRONG, RIGHT, RIGHT, WRONG] {
        let before = fs::read(&file).unwrap();
        let outcome = data.verify(&pin.into(), &watched);
        let compared = seen.lock().unwrap().clone();
        let after = fs::read(&file).unwrap();
        let now = data.tries_left().unwrap();
        assert_eq!(now, if pin == RIGHT { 5 } else { left - 1 });
        assert_eq!(outcome.is_ok(), pin == RIGHT);
        for half in [0, SLOT] {
            let half = half..half + SLOT;
            // Cut while it is written: nothing was compared for it, so all of what there was may be left.
            if before[half.clone()] != compared[half.clone()] {
                let mut torn = compared.clone();
                torn[half.clone()].fill(b'x');
                assert!(tries_with(&torn) <= left);
            }
            // Not written, or half, though the PIN was compared: for a wrong one there is nothing to lose.
            if compared[half.clone()] != after[half.clone()] {
                assert_eq!(pin, RIGHT);
                let mut torn = after.clone();
                torn[half].fill(b'x');
                assert!(tries_with(&torn) <= now);
                assert_eq!(tries_with(&compared), left - 1);
            }
        }
        fs::write(&file, &after).unwrap();
        left = now;
    }
}

#[test]
fn what_the_disk_may_not_have_yet_is_written_over_and_the_other_slot_is_left_alone() {
    let place = Place::new();
    let (data, store) = (place.data(5), Store::new());
    data.verify(&RIGHT.into(), &store).unwrap();
    let file = place.state_file();
    let halves = || {
        let bytes = fs::read(&file).unwrap();
        [bytes[..SLOT].to_vec(), bytes[SLOT..].to_vec()]
    };
    let changed = |pin: &[u8]| {
        let before = halves();
        let _ = data.verify(&pin.into(), &store);
        let after = halves();
        [before[0] != after[0], before[1] != after[1]]
    };
    for _ in 0..4 {
        data.verify(&RIGHT.into(), &store).unwrap();
        let newest = newest_slot(&file);
        assert!(newest.contains("\nflushed no\n"));
        let in_flight = halves().map(|half| half == newest.as_bytes());
        assert_eq!(changed(WRONG), in_flight);
        assert!(newest_slot(&file).contains("\nflushed yes\n"));
        assert_eq!(changed(WRONG), in_flight.map(|was| !was));
        assert_eq!(changed(WRONG), in_flight);
    }
}

#[test]
fn a_file_of_the_first_version_is_taken_over_with_its_counters() {
    let place = Place::new();
    let (data, store) = (place.data(3), Store::new());
    assert_wrong(&data.verify(&WRONG.into(), &store), 2);
    as_first_version(&place.state_file(), |text| text);
    assert_eq!(data.tries_left().unwrap(), 2);
    assert_wrong(&data.verify(&WRONG.into(), &store), 1);
    assert!(newest_slot(&place.state_file()).contains("tries-left 1\n"));
    as_first_version(&place.state_file(), |text| text);
    data.verify(&RIGHT.into(), &store).unwrap();
    assert_eq!(data.tries_left().unwrap(), 3);

    let place = Place::new();
    let claim = place.claim("");
    let (data, ..) = place.own_with_puk(&claim, Some(&RIGHT.into()), Some(&PUK.into())).unwrap();
    assert!(data.unblock(&WRONG.into(), &NEW.into()).is_err());
    assert_wrong(&data.verify(&WRONG.into(), &store), 2);
    let id = claim.id().clone();
    drop((claim, data));
    as_first_version(&place.state_file(), |text| text);
    let claim = place.claim("");
    assert_eq!(claim.id(), &id);
    let (data, _) = place.own(&claim, None).unwrap();
    assert_eq!((data.tries_left().unwrap(), data.puk_tries_left().unwrap()), (2, 2));
    data.verify(&RIGHT.into(), &Store::with(|_| Ok(()))).unwrap();
    data.unblock(&PUK.into(), &NEW.into()).unwrap();
}

#[test]
fn after_the_last_number_they_begin_anew() {
    let place = Place::new();
    let (data, store) = (place.data(3), Store::new());
    assert_wrong(&data.verify(&WRONG.into(), &store), 2);
    let file = place.state_file();
    let newest = newest_slot(&file);
    let end = newest.find("sha256 ").unwrap();
    let start = newest.find("flushed ").unwrap();
    let body = format!("vscard-state 2\nsequence {}\n{}", u64::MAX, &newest[start..end]);
    let mut slot = format!("{body}sha256 {}\n", sha256(&body));
    slot.extend(std::iter::repeat_n('\n', SLOT - slot.len()));
    fs::write(&file, format!("{slot}{newest}")).unwrap();
    assert_eq!(data.tries_left().unwrap(), 2);
    assert_wrong(&data.verify(&WRONG.into(), &store), 1);
    assert!(!newest_slot(&file).contains(&u64::MAX.to_string()));
    data.verify(&RIGHT.into(), &store).unwrap();
    assert_eq!(data.tries_left().unwrap(), 3);
}

/// A PIN that was changed is in neither slot.
#[test]
fn an_old_pin_does_not_come_back_with_a_damaged_slot() {
    let place = Place::new();
    let claim = place.claim("");
    let (data, ..) = place.own_with_puk(&claim, Some(&RIGHT.into()), Some(&PUK.into())).unwrap();
    let store = Store::with(|_| Ok(()));
    for change in [true, false] {
        let old = newest_slot(&place.state_file());
        let hash = old.lines().find(|line| line.starts_with("pin ")).unwrap();
        match change {
            true => drop(data.change(&RIGHT.into(), &NEW.into(), &store).unwrap()),
            false => data.unblock(&PUK.into(), &RIGHT.into()).unwrap(),
        }
        assert!(!fs::read_to_string(place.state_file()).unwrap().contains(hash));
    }
}

/// Whoever asks for the tries takes no lock, and never sees a file that is damaged, nor tries that there are not.
#[test]
fn half_written_counters_are_never_seen() {
    let place = Place::new();
    let (data, asking) = (place.data(3), place.data(3));
    let store = Store::new();
    data.verify(&RIGHT.into(), &store).unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..300 {
                data.verify(&RIGHT.into(), &store).unwrap();
            }
            done.store(true, Ordering::SeqCst);
        });
        while !done.load(Ordering::SeqCst) {
            let left = asking.tries_left().unwrap();
            assert!((2..=3).contains(&left), "{left}");
        }
    });
}
