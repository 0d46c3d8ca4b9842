//! A right PIN is known again without its hash, as long as the state on disk has that hash.

use super::*;

/// Puts a hash of another PIN, or of the same one, into the state that another process has written.
fn replaced(place: &Place, pin: &[u8]) {
    let elsewhere = Place::new();
    elsewhere.own(&elsewhere.claim(""), Some(&pin.into())).unwrap();
    fs::copy(elsewhere.state_file(), place.state_file()).unwrap();
}

#[test]
fn a_known_pin_counts_as_any_other() {
    for case in Case::all() {
        let (data, store) = (&case.data, Case::store());
        data.verify(&RIGHT.into(), &store).unwrap();
        assert_wrong(&data.verify(&WRONG.into(), &store), 2);
        assert_wrong(&data.verify(&NEW.into(), &store), 1);
        data.verify(&RIGHT.into(), &store).unwrap();
        assert_eq!(data.tries_left().unwrap(), 3);
        for left in [2, 1, 0] {
            assert_wrong(&data.verify(&WRONG.into(), &store), left);
        }
        // Blocked is blocked, for the PIN that is known, too.
        assert!(matches!(data.verify(&RIGHT.into(), &store), Err(PinError::Blocked)));
    }
}

#[test]
fn a_pin_that_is_no_more_is_not_known_any_more() {
    for case in Case::all() {
        let (data, store) = (&case.data, Case::store());
        data.verify(&RIGHT.into(), &store).unwrap();
        data.change(&RIGHT.into(), &NEW.into(), &store).unwrap();
        assert_wrong(&data.verify(&RIGHT.into(), &store), 2);
        data.verify(&NEW.into(), &store).unwrap();
        data.unblock(&PUK.into(), &WRONG.into()).unwrap();
        assert_wrong(&data.verify(&NEW.into(), &store), 2);
        data.verify(&WRONG.into(), &store).unwrap();
    }
}

/// By another process, or by an administrator who brings a backup back.
#[test]
fn what_is_on_disk_decides() {
    let place = Place::new();
    let claim = place.claim("");
    let store = Store::with(|_| Ok(()));
    let (data, _) = place.own(&claim, Some(&RIGHT.into())).unwrap();
    data.verify(&RIGHT.into(), &store).unwrap();
    replaced(&place, NEW);
    assert_wrong(&data.verify(&RIGHT.into(), &store), 2);
    data.verify(&NEW.into(), &store).unwrap();
    replaced(&place, NEW);
    data.verify(&NEW.into(), &store).unwrap();
    fs::write(place.state_file(), "rubbish").unwrap();
    assert!(matches!(data.verify(&NEW.into(), &store), Err(PinError::State(StateError::Damaged { .. }))));
    fs::remove_file(place.state_file()).unwrap();
    assert!(matches!(data.verify(&NEW.into(), &store), Err(PinError::State(StateError::NoPin { .. }))));
}
